"""Correct the metadata of a GGUF file: a new header before the same data, to the byte.

In: a file, and the checkpoint it was made from or single values. Out: another file, under its name only when it is
whole and llama.cpp opens it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pi_gguf.checkpoint.checkpoint import load_checkpoint
from pi_gguf.common.files import check_writable, disk_errors, publish, remove, replace_when_complete, temporary, writes
from pi_gguf.common.progress import say
from pi_gguf.errors import GgufError, OptionError, ResourceError
from pi_gguf.gguf.defects import Expectation, expect, find_defects, mend
from pi_gguf.gguf.file import TensorInfo
from pi_gguf.gguf.findings import CONVERT, Finding, in_short
from pi_gguf.gguf.header import TYPES, Entry, Header, type_of_key, write_changed
from pi_gguf.gguf.parts import SPLIT_KEYS, Whole, complete, part_paths
from pi_gguf.prove.check import LEVELS, CheckReport, Reference, check_gguf
from pi_gguf.runtime.model import Model

_FIXED = ("general.alignment", *SPLIT_KEYS)
"""Keys that say where the data lies."""


@dataclass(frozen=True)
class Change:
    """A key with its value before and after; None where there is none."""

    key: str
    old: Any
    new: Any


@dataclass(frozen=True)
class Repair:
    """What was repaired.

    Args:
        source: file that was read.
        path: file that was written; None where nothing was to be repaired.
        changes: keys that differ.
        left: what is still wrong.
        checks: what was compared with the checkpoint.
    """

    source: str
    path: str | None
    changes: list[Change]
    left: list[Finding]
    checks: list[CheckReport]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "left": [finding.to_json() for finding in self.left]}


@writes("out")
def repair(
    source: str | Path,
    out: str | Path,
    *,
    against: str | None = None,
    set: Sequence[str] = (),
    check: str = "quick",
    strict_tokenizer: bool = False,
    overwrite: bool = False,
) -> Repair:
    """Correct the metadata of a GGUF file; its tensors are copied as they are.

    Without --against only what the file itself tells is corrected, such as a window that is not original window times
    factor. Where nothing is wrong, nothing is written. A tensor that is lost cannot be brought back: convert again.

    Args:
        source: GGUF file to read; of a split one any part.
        out: GGUF file to write; of a split one the name without its numbers, and each part gets its own.
        against: MODEL that the file was made from; every key that can be read off it is corrected.
        set: KEY=VALUE: state this, whatever else is found. A key that is there keeps its type, a new one gets the type
            that GGUF has for it. Repeatable.
        check: as for convert; without --against llama.cpp only has to open the file. none skips it.
        strict_tokenizer: as for convert, with --against.
        overwrite: replace the file that is there.

    Example:
        pi-gguf repair model.gguf model-repaired.gguf --against ./my-llama
    """
    source, out = Path(source), Path(out)
    if check not in LEVELS:
        raise OptionError(f"check must be one of {', '.join(LEVELS)}, got {check}", "leave it out for quick")
    if out.suffix != ".gguf":
        raise OptionError(f"{out}: the name must end in .gguf", f"try {out}.gguf")
    found = complete(source)
    header, tensors, finals = found.header, found.tensors, part_paths(out, len(found.headers))
    _bring_back(out)
    for final in finals:
        check_writable(final, overwrite)
        if final.exists() and any(final.samefile(part) for part in found.paths):
            raise OptionError(f"{final}: source and target are the same file", "give another name")
    assigned = dict(read_assignment(text, header) for text in set)
    stated = header.changed(assigned)
    checkpoint = load_checkpoint(against, weights=check != "none") if against is not None else None
    expected = expect(stated, tensors, checkpoint) if checkpoint is not None else None
    mended, left = _mend_all(stated, tensors, expected, frozenset(assigned))
    changes = _changes(header, mended)
    if not changes:
        return _nothing(source, left, against)
    checks = []
    with _written(out, finals) as partials:
        for part, partial in zip([_first(found, mended), *found.headers[1:]], partials, strict=True):
            write_changed(part, partial)
        if check != "none":
            _open(partials[0])
            if expected is not None:
                reference = Reference(expected.checkpoint, check, strict_tokenizer=strict_tokenizer)
                checks.append(check_gguf(partials[0], reference))
                say(str(checks[-1]))
    return Repair(str(source), str(finals[0]), changes, left, checks)


def _first(found: Whole, mended: Header) -> Header:
    """Return the first part's header with what was mended in that over all parts."""
    before = found.header
    changed = {key: mended.entries.get(key) for key in {**before.entries, **mended.entries}}
    changed = {key: entry for key, entry in changed.items() if entry != before.entries.get(key)}
    return found.first.changed(changed, [*mended.entries])


@contextmanager
def _written(out: Path, finals: Sequence[Path]) -> Iterator[list[Path]]:
    """Give temporary paths for the parts of a file; on success these get their names, the one to open last.

    Parts that are replaced wait in the work folder, and have their names again after any failure.
    """
    if finals == [out]:
        with replace_when_complete(out) as partial:
            yield [partial]
        return
    with temporary(out, "made") as made, temporary(out, "whole") as ready, disk_errors(out):
        made.mkdir()
        yield [made / final.name for final in finals]
        publish(made, ready)  # on the disk, all of them, before one has its name
        before = _replaced(out)
        try:
            before.mkdir()
            for final in finals:
                if os.path.lexists(final):
                    final.rename(before / final.name)
            for final in reversed(finals):
                publish(ready / final.name, final)
            before.rename(made)  # in one step: what is left of a few is never brought back
        except BaseException:
            for final in finals if before.is_dir() else ():
                if not os.path.lexists(ready / final.name):
                    remove(final)
            _bring_back(out)
            raise


def _replaced(out: Path) -> Path:
    """Return the folder of parts that are being replaced."""
    return out.with_name(f"{out.name}.partial") / "replaced"


def _bring_back(out: Path) -> None:
    """Give parts that were to be replaced their names again, here or after a kill."""
    before = _replaced(out)
    if before.is_dir():
        for part in before.iterdir():
            part.replace(out.with_name(part.name))
        before.rmdir()


def _mend_all(
    header: Header, tensors: Sequence[TensorInfo], expected: Expectation | None, assigned: frozenset[str]
) -> tuple[Header, list[Finding]]:
    """Mend until nothing is left that can be; return the header and what cannot be, or was assigned so."""
    for _ in range(4):  # one correction may show another: a type, then the windows
        findings = find_defects(header, tensors, expected)
        wanted = [finding for finding in findings if finding.repairable and finding.key not in assigned]
        if not wanted:
            break
        header = mend(header, wanted, expected)
    return header, findings


def _changes(before: Header, after: Header) -> list[Change]:
    keys = dict.fromkeys([*before.entries, *after.entries])
    pairs = [(key, before.entries.get(key), after.entries.get(key)) for key in keys]
    return [Change(key, _shown(old, new), _shown(new, old)) for key, old, new in pairs if old != new]


def _shown(entry: Entry | None, other: Entry | None) -> Any:
    if entry is None:
        return None
    retyped = other is not None and other.type != entry.type
    return f"{in_short(entry.value)} ({entry.type})" if retyped else in_short(entry.value)


def _nothing(source: Path, left: list[Finding], against: str | None) -> Repair:
    """Report that nothing was to be done.

    Raises:
        GgufError: there are defects, and none that can be mended.
    """
    defects = [finding for finding in left if finding.severity == "defect"]
    if defects:
        lost = any(finding.remedy == CONVERT for finding in defects)
        hint = "convert the checkpoint again" if lost else "say what it should be: --set KEY=VALUE"
        raise GgufError(
            f"{source}: {defects[0]}" + (f" ({len(defects) - 1} more)" if len(defects) > 1 else ""),
            hint if against or lost else "give the model it was made from, --against MODEL, or --set KEY=VALUE",
        )
    return Repair(str(source), None, [], left, [])


# Values from the command line


def read_assignment(text: str, header: Header) -> tuple[str, Entry]:
    """Read KEY=VALUE; an array is written as in JSON.

    Raises:
        OptionError: no known key, or a value that does not fit its type.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise OptionError(f"set must be KEY=VALUE, got {text!r}", "for example --set tokenizer.ggml.add_bos_token=true")
    if key in _FIXED:
        raise OptionError(f"set {key}: it says where the data lies, which stays", "leave it out")
    kind = header.entries[key].type if key in header.entries else type_of_key(key)
    if key not in header.entries and not key.startswith(("general.", "tokenizer.", f"{header.arch}.")):
        raise OptionError(
            f"set {key}: no key of a {header.arch} file", f"keys begin with {header.arch}., as inspect shows"
        )
    if kind is None:
        raise OptionError(f"set {key}: the file has no such key, and its type is not known", "check the spelling")
    try:
        return key, Entry.of(_parse(value, kind), kind)
    except (ValueError, OverflowError, RecursionError) as error:
        raise OptionError(f"set {key} must be {_said(kind)}, got {value[:80]!r}", "check the value") from error


def _parse(text: str, kind: str) -> Any:
    if kind[0] == "[":
        values = json.loads(text)
        if not isinstance(values, list):
            raise ValueError("no list")
        item = kind.strip("[]")
        return [_parse(part if isinstance(part, str) else json.dumps(part), item) for part in values]
    if kind == "STRING":
        return text
    if kind == "BOOL":
        return {"true": True, "false": False}.get(text.lower(), text)
    if "FLOAT" not in kind:
        return int(text)
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("no number")
    return number


def _said(kind: str) -> str:
    if kind[0] == "[":
        return f"a list of {kind.strip('[]')} in JSON"
    bits = "".join(c for c in kind if c.isdigit())
    words = {"BOOL": "true or false", "STRING": "text", "FLOAT": f"a number of {bits} bits"}
    sign = "from 0" if kind[0] == "U" else "with a sign"
    assert kind in TYPES
    return words.get(kind.rstrip("0123456789"), f"a whole number {sign} in {bits} bits")


# Writing


def _open(path: Path) -> None:
    """Open a file with llama.cpp and close it again.

    Raises:
        GgufError: it does not open.
    """
    try:
        Model(path, n_ctx=512, device="cpu").close()
    except GgufError as error:
        raise GgufError(
            str(error), "correct what is left with --set, or write it all the same with --check none"
        ) from error
    except ResourceError as error:
        say(f"check: {error}; the file is not opened")
