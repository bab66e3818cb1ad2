"""The door to the user's texts: files, folders of them or a data set of the Hub -> documents.

`read_texts` holds all of them, for evaluations. `open_texts` streams them, for training, where a row may be a
conversation. Nothing that comes with a data set is run.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pi_gguf.common.progress import progress_bar, say
from pi_gguf.common.provenance import sha256
from pi_gguf.errors import OptionError, TextError, one_line

SUFFIXES = (".txt", ".md")
TABLES = (".jsonl", ".parquet")
"""Files of many documents, a row each."""

FIELD = "text"
CHAT_FIELDS = ("messages", "conversations")
"""A row's document lies in the first of these that its file has: a text, or the turns of a conversation."""

_ABOUT_CHATS = ("tools", "system")
"""What a row of turns may hold beside them."""

_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?::([\w.-]+))?")

_WEIGHED = re.compile(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")

TEXT_SETS = {
    "pg19": ("emozilla/pg19:test", None),
    "proof-pile": ("hoskinson-center/proof-pile:test", "refs/convert/parquet"),
}
"""The paper's two evaluation texts, by the names of the Hub: a copy of PG19 in Parquet, and the Hub's own conversion of
Proof-pile, whose files are not of a kind that is read without running code. With the branch they lie in."""

HUB_DOCUMENTS = 128
"""Read of a data set of the Hub, at most: the paper's number."""

LONGEST = 2**23
"""Characters of a document that evaluations read, at most: more than any novel has."""

_LINE_BYTES = 2**28
"""A line of JSON at most."""

_BLOCK = 2**20
"""Characters of a text that are read at once."""


def read_texts(sources: Sequence[str], *, characters: int = 1) -> dict[str, str]:
    """Read texts to evaluate on, one document each.

    Args:
        sources: text files, folders of them, JSONL or Parquet files, or data sets of the Hub: pg19, proof-pile, or
            owner/name:split.
        characters: documents of the Hub that are shorter are passed over.

    Raises:
        TextError: a file is missing, empty or no UTF-8, a folder has no text files, or a data set cannot be read.
    """
    found: dict[str, str] = {}
    for source in sources:
        if _is_on_hub(source) or (source in TEXT_SETS and not Path(source).exists()):
            name, branch = TEXT_SETS.get(source, (source, None))
            stream = _only_texts(hub_documents(name, branch or _hub_revision(name)))
            long = (text for text in stream if len(text) >= characters)
            numbered = enumerate(itertools.islice(long, HUB_DOCUMENTS), 1)
            some = {name: _cut(text, LONGEST, name) for i, text in numbered for name in [f"{source} {i}"]}
            if not some:
                raise TextError(f"{source}: no document has {characters} characters", "give smaller --windows")
            found |= some
        elif Path(source).suffix in TABLES:
            (path,) = _find_files(source, TABLES)
            found |= {f"{path}:{i}": text for i, text in enumerate(_only_texts(_file_documents(path, LONGEST)), 1)}
        else:
            found |= {str(path): _read_text(path, LONGEST) for path in _find_files(source, SUFFIXES)}
    return found


def _cut(text: str, characters: int, name: object) -> str:
    """Return the first characters of a document, and say so where there are more."""
    if len(text) > characters:
        say(f"note: {name}: the first {characters:,} characters are read")
    return text[:characters]


@dataclass(frozen=True)
class Conversation:
    """A row of a data set that holds turns, as it stands there; a model's chat template makes a text of it.

    Args:
        where: it stands, for messages.
        turns: whatever its field holds.
        tools: the same of the field `tools`; None without one.
        system: the same of the field `system`.
    """

    where: str
    turns: Any
    tools: Any = None
    system: Any = None

    @property
    def size(self) -> int:
        """About how many characters it has."""
        return sum(len(str(part)) for part in (self.turns, self.tools, self.system))


def _only_texts(documents: Iterable[str | Conversation]) -> Iterator[str]:
    for document in documents:
        if isinstance(document, Conversation):
            raise TextError(f"{document.where}: holds a conversation, texts are read here", f"give a field {FIELD}")
        yield document


@dataclass(frozen=True)
class Texts:
    """Documents that are read when they are asked for, never all at once.

    Args:
        names: of the files or data sets, as messages give them.
        labels: the same, as a record gives them: without folders.
        sha256: hash of what is in them.
        read: begins to read; yields one document after another, texts to so many characters at most.
        count: documents, where it is known before they are read.
        chats: whether there are conversations among them.
        weight: their share of the tokens, beside those of others; None where none was given to any.
    """

    names: list[str]
    labels: list[str]
    sha256: str
    read: Callable[[int], Iterator[str | Conversation]]
    count: int | None = None
    chats: bool = False
    weight: float | None = None

    @property
    def name(self) -> str:
        """What messages call them."""
        return f"{self.names[0]}{' and others' if len(self.names) > 1 else ''}"


def held_texts(documents: dict[str, str]) -> Texts:
    """Return documents that are in memory already, in the order of their names."""
    names = sorted(documents)
    bodies = [documents[name] for name in names]
    return Texts(names, names, sha256(bodies), lambda _: iter(bodies), len(names))


def weighed(source: str) -> tuple[str, float | None]:
    """Take the weight off the name of a source: PATH:2.5. What exists under the whole name has none.

    Raises:
        OptionError: the weight is not above 0.
    """
    match = None if _is_there(source) else _WEIGHED.fullmatch(source)
    if not match:
        return source, None
    if not 0 < (weight := float(match[2])) < math.inf:
        raise OptionError(f"data {source}: the weight must be above 0, got {match[2]}", "leave out what is not read")
    return match[1], weight


def shares(sources: Sequence[str]) -> dict[str, float | None]:
    """Return the share of the tokens that each source gets, by its name; None for all where no weight is given.

    Raises:
        OptionError: a weight is not above 0.
    """
    named = [weighed(source) for source in sources]
    if all(weight is None for _, weight in named):
        return dict(named)
    whole = sum(1.0 if weight is None else weight for _, weight in named)
    found: dict[str, float | None] = {}
    for name, weight in named:
        found[name] = (found.get(name) or 0.0) + (1.0 if weight is None else weight) / whole
    return found


def open_mixture(sources: Sequence[str]) -> list[Texts]:
    """Find texts to train on, as `open_texts` does.

    Returns:
        All as one; or, where a weight is given to a source, each by itself, those without one weighing 1.
    """
    named = [weighed(source) for source in sources]
    if all(weight is None for _, weight in named):
        return [open_texts(sources)]
    return [replace(open_texts([name]), weight=1.0 if weight is None else weight) for name, weight in named]


def open_texts(sources: Sequence[str]) -> Texts:
    """Find texts to train on, and hash what is in them; reads no document yet.

    Args:
        sources: text files (a document each), JSONL and Parquet files (a document a row, in its field `text`, or a
            conversation in `messages` or `conversations`), folders of them, or data sets of the Hub as owner/name or
            owner/name:split (split train when left out).

    Raises:
        TextError: a file is missing, a folder has no such files, or a data set cannot be opened. While reading: a text
            is empty or no UTF-8, a row has no text, a file is broken.
    """
    files: set[Path] = set()
    on_hub: set[str] = set()
    for source in sources:
        if _is_on_hub(source):
            on_hub.add(source)
        else:
            files.update(_find_files(source, SUFFIXES + TABLES))
    paths = sorted(files, key=str)
    revisions = {name: _hub_revision(name) for name in sorted(on_hub)}
    digest = hashlib.sha256()
    with progress_bar("read", sum(path.stat().st_size for path in paths), "bytes") as advance:
        for path in paths:
            kind = path.suffix if path.suffix in TABLES else "text"
            digest.update(f"{kind} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    advance(len(block))
    for name, revision in revisions.items():
        digest.update(f"hub {name} {revision}\n".encode())

    def read(characters: int) -> Iterator[str | Conversation]:
        for path in paths:
            yield from _file_documents(path, characters)
        for name, revision in revisions.items():
            numbered = enumerate(hub_documents(name, revision), 1)
            yield from (_cut_text(document, characters, f"{name} {i}") for i, document in numbered)

    only_texts = not revisions and all(path.suffix not in TABLES for path in paths)
    return Texts(
        names=[*map(str, paths), *revisions],
        labels=[*(path.name for path in paths), *revisions],
        sha256=digest.hexdigest(),
        read=read,
        count=len(paths) if only_texts else None,
        chats=any(path.suffix in TABLES and _holds_chats(_table_rows(path)) for path in paths)
        or any(_holds_chats(_numbered_hub_rows(name, revision)) for name, revision in revisions.items()),
    )


def _holds_chats(rows: Iterator[tuple[str, Mapping[str, Any]]]) -> bool:
    """Tell whether the first row holds a conversation; False where there is none, as reading will tell."""
    try:
        return any(_field_of(row) in CHAT_FIELDS for _, row in itertools.islice(rows, 1))
    except TextError:
        return False


def _is_there(source: str) -> bool | None:
    """Tell whether there is such a file or folder; None where that is no name of one, nor of a data set."""
    try:
        return Path(source).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return None


def _is_on_hub(source: str) -> bool:
    if _is_there(source) is not False:
        return False
    return bool(_HUB_NAME.fullmatch(source)) and Path(source).suffix not in SUFFIXES + TABLES


PAIR_SETS = {"govreport": "ccdv/govreport-summarization:test"}
"""Documents with summaries, by the name of the Hub."""

PAIR_FIELDS = (("document", "summary"), ("report", "summary"))
"""What they are called; the second is GovReport's."""


def read_pairs(source: str) -> list[tuple[str, str]]:
    """Read documents with their summaries.

    Args:
        source: JSONL file with fields `document` and `summary`, `govreport`, or a data set of the Hub as owner/name or
            owner/name:split.

    Raises:
        TextError: there is no such file, a row lacks a field, or the data set cannot be read.
    """
    rows: Iterator[tuple[str, Mapping[str, Any]]]
    if _is_on_hub(source) or (source in PAIR_SETS and not Path(source).exists()):
        name = PAIR_SETS.get(source, source)
        rows = itertools.islice(_numbered_hub_rows(name, _hub_revision(name)), HUB_DOCUMENTS)
    else:
        (path,) = _find_files(source, (".jsonl",))
        rows = _jsonl_rows(path)
    found = []
    for where, row in rows:
        pair = next((tuple(row[name] for name in names) for names in PAIR_FIELDS if set(names) <= set(row)), ())
        if len(pair) != 2 or not all(isinstance(text, str) and text.strip() for text in pair):
            raise TextError(
                f"{where}: must have texts in fields document and summary, its fields are: "
                f"{', '.join(map(str, row)) or 'none'}"
            )
        found.append((pair[0], pair[1]))
    if not found:
        raise TextError(f"{source}: no rows")
    return found


def _find_files(name: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Return a file, or all files in a folder that end in one of `suffixes`, sorted."""
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            named = sorted(p for p in path.rglob("*") if p.suffix in suffixes)
            inside = [p for p in named if p.is_file()]
            for other in sorted(set(named) - set(inside)):
                if not other.is_dir():
                    say(f"note: {other} is left out: a pipe, a device or a link to nothing")
            if not inside:
                raise TextError(f"{path}: no {' or '.join(suffixes)} files in this folder", "give text files in UTF-8")
            return inside
        if not path.is_file():
            kind = "is a pipe or a device, not a file" if path.exists() else "no such file or folder"
            raise TextError(f"{path}: {kind}", "check the spelling, or write the text to a file first")
    except (OSError, ValueError, RuntimeError) as error:
        raise TextError(f"{name}: cannot be read ({one_line(error)})", "check the spelling") from error
    return [path]


def _read_text(path: Path, characters: int) -> str:
    """Read the first characters of a file.

    Raises:
        TextError: it cannot be read, is no UTF-8 or blank.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    parts, size, at = [], 0, 0
    try:
        with path.open("rb") as file:
            while size <= characters:
                data = file.read(_BLOCK)
                pending = len(decoder.getstate()[0])
                parts.append(decoder.decode(data, final=not data))
                size, at = size + len(parts[-1]), at + len(data)
                if not data:
                    break
    except UnicodeDecodeError as error:
        at += error.start - pending
        raise not_utf8(path, at) from error
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror})", "check that it may be read") from error
    body = _cut("".join(parts), characters, path).replace("\r\n", "\n").replace("\r", "\n")
    if not body.strip():
        raise TextError(f"{path}: the text is empty", "give a text that is longer than the window")
    return body


def not_utf8(path: object, byte: int) -> TextError:
    return TextError(f"{path}: not UTF-8 at byte {byte}", "convert it with iconv -t UTF-8")


def _cut_text(document: str | Conversation, characters: int, name: object) -> str | Conversation:
    """Return the first characters of a text; a conversation as it is, as it has no text yet."""
    return document if isinstance(document, Conversation) else _cut(document, characters, name)


def _file_documents(path: Path, characters: int) -> Iterator[str | Conversation]:
    """Yield the documents of a file, of texts so many characters at most."""
    if path.suffix not in TABLES:
        return iter([_read_text(path, characters)])
    rows = enumerate(_documents(_table_rows(path)), 1)
    return (_cut_text(document, characters, f"{path}:{i}") for i, document in rows)


def _table_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a file, with their places."""
    return _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the object of each line that is not blank, with its place."""
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(_LINE_BYTES)
            if not line:
                break
            where = f"{path}:{number}"
            if len(line) == _LINE_BYTES:
                raise TextError(
                    f"{where}: a line of more than {_LINE_BYTES:,} bytes", "a document a line, not all in one"
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise TextError(f"{where}: not UTF-8", "convert it with iconv -t UTF-8") from error
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise TextError(f"{where}: no JSON ({error})", "one object a line, as JSONL has it") from error
            if not isinstance(row, dict):
                raise TextError(f"{where}: must be an object with a field {FIELD}, got {type(row).__name__}")
            yield where, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the fields of each row that are read here; a few rows are in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            field = _field_of(schema.names)
            if field is None:
                strings = [field.name for field in schema if str(field.type).endswith("string")]
                raise _no_field(str(path), schema.names, strings)
            columns = [field, *(name for name in _ABOUT_CHATS if field != FIELD and name in schema.names)]
            number = itertools.count(1)
            for batch in file.iter_batches(batch_size=64, columns=columns):
                yield from ((f"{path}:{next(number)}", row) for row in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise TextError(f"{path}: no readable Parquet ({one_line(error)})", "write or download it again") from error


def hub_documents(name: str, revision: str | None) -> Iterator[str | Conversation]:
    """Stream the documents of a data set.

    Args:
        name: owner/name, or a folder that is laid out as a data set; with :split where it is not train.
        revision: commit of the data set; None for a folder.
    """
    return _documents(_numbered_hub_rows(name, revision))


def _numbered_hub_rows(name: str, revision: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a data set, with their places."""
    return ((f"{name} row {number}", row) for number, row in enumerate(_hub_rows(name, revision), 1))


def _hub_rows(name: str, revision: str | None) -> Iterator[Mapping[str, Any]]:
    import datasets

    repository, _, split = name.partition(":")
    try:
        yield from datasets.load_dataset(repository, split=split or "train", streaming=True, revision=revision)
    except Exception as error:  # datasets raises many kinds: names, splits, configurations, files, the network
        raise TextError(f"{name}: the data set cannot be read ({one_line(error)})", "check name and split") from error


def as_dataset(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return rows as a data set of `datasets`."""
    import datasets

    return datasets.Dataset.from_list([dict(row) for row in rows])


def _hub_revision(name: str) -> str:
    """Return the commit of a data set of the Hub, so that all of a run reads the same."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name.partition(":")[0]).sha)
    except Exception as error:  # offline, unknown, private: each a kind of its own
        raise TextError(
            f"{name}: no such file or folder, and no data set of the Hub that can be opened ({one_line(error)})",
            "check the name; a data set of the Hub needs the network, a file or folder does not",
        ) from error


def _field_of(names: Iterable[str]) -> str | None:
    """Return the field that holds a row's document."""
    there = set(names)
    return next((name for name in (FIELD, *CHAT_FIELDS) if name in there), None)


def _documents(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[str | Conversation]:
    """Yield the document of each row, in the field that the first one has it in; null and blank ones are left out."""
    field = None
    for where, row in rows:
        field = field or _field_of(row) or FIELD
        if field not in row:
            raise _no_field(where, list(row), [key for key, value in row.items() if isinstance(value, str)], field)
        if field in CHAT_FIELDS:
            if row[field]:
                yield Conversation(where, row[field], *(row.get(name) for name in _ABOUT_CHATS))
        elif (text := _text(row[field], where)).strip():
            yield text


def _text(value: Any, where: str) -> str:
    """Return what a field holds; nothing where it is null."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TextError(f"{where}: {FIELD} must be a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise TextError(f"{where}: {FIELD} is no valid Unicode ({error.reason})") from error
    return value


def _no_field(where: str, names: Sequence[str], strings: Sequence[str], field: str = FIELD) -> TextError:
    listed = ", ".join(map(str, names)) or "none"
    one = field == FIELD and len(strings) == 1
    hint = f"rename {strings[0]} to {field}" if one else f"put the documents into a field {field}"
    return TextError(f"{where}: must have a field {field}, its fields are: {listed}", hint)
