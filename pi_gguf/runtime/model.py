"""Running a GGUF file in llama.cpp: complete, chat, tokenize and score.

In: a path. Out: a `Model`. The size of the KV cache is predicted and compared with free memory before anything is
loaded.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import psutil

from pi_gguf.common.files import human_bytes
from pi_gguf.common.machine import cores
from pi_gguf.common.progress import say
from pi_gguf.documents.formats import Document, read_document
from pi_gguf.errors import GgufError, OptionError, ResourceError, TextError
from pi_gguf.gguf.file import GgufInfo, read_gguf
from pi_gguf.gguf.loadable import check_adapter, check_loadable, pieces_without_bytes, unreadable
from pi_gguf.llamacpp.cache import (
    CACHE_BLOCK,
    CACHE_TYPES,
    QUANTIZED_CACHES,
    head_size,
    is_one_tensor,
    predict_kv_cache,
)
from pi_gguf.llamacpp.library import compute, last_error, llama_cpp_library, log
from pi_gguf.llamacpp.opening import apply_adapters, open_beside, open_llama
from pi_gguf.llamacpp.quantizer import UNQUANTIZED
from pi_gguf.llamacpp.trial import check_opens, fast_buffers_work, machine
from pi_gguf.llamacpp.watch import Watch
from pi_gguf.measure.language_model import GAP, LanguageModel
from pi_gguf.runtime.batch import Batch
from pi_gguf.runtime.offload import choose_kv, choose_layers, gpu_memory, usual_k
from pi_gguf.runtime.reading import Reading
from pi_gguf.runtime.sampling import Sampling, SamplingKeywords
from pi_gguf.runtime.sequence import CachedSequence
from pi_gguf.runtime.session import Cancelled, Progress, Session, Stopped, check_fits, never, silent
from pi_gguf.runtime.states import States, file_digest, file_mark, identity_digest, user_states
from pi_gguf.runtime.text import stream
from pi_gguf.runtime.turns import Turns
from pi_gguf.scaling.rope import LONGROPE_TENSORS
from pi_gguf.vocabulary.templates import CUT, cut, render_chat

_TEMPLATE_NAMES = {
    "bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token", "seperator": "sep_token",
    "mask": "mask_token",
}  # fmt: skip
"""Special tokens: GGUF's word -> the one of chat templates."""

_BATCH = 512

_NO_ROOM = ("alloc", "memory", "buffer")
"""Words of llama.cpp's error where a GPU has no room."""

_PLAIN_ATTENTION = 2
"""An operation of plain attention on a CPU takes as long as so many of the products with weights (docs/log.md)."""

_SCORES_BYTES = 2**25
"""Memory for the attention scores of a batch, about, where they are made as a whole."""


class Model(LanguageModel):
    """A GGUF file opened by llama.cpp. Use it as a context manager, or call `close`.

    Args:
        path: the GGUF file.
        n_ctx: window to open, in tokens; the file's own when None.
        type_k: type of the K cache: f32, f16, q8_0 or q4_0; when None q8_0 on a CPU, which reads and writes faster with
            it, and f16 on a GPU, with flash attention or where heads are not of whole blocks of 32.
        type_v: type of the V cache.
        flash_attn: use flash attention; when None where every layer is on a GPU and with a quantized V cache, which
            needs it. On a CPU llama.cpp's adds up in 16 bits with an f16 cache, in which what thousands of tokens weigh
            together is lost.
        device: `auto` (GPU when llama.cpp was built for one), `cpu` or `cuda`.
        gpu_layers: how many layers lie on the GPU with their part of the cache, counted from the last as llama.cpp
            does, the output matrix as one; all when None, with `auto` as many as fit its memory. With 0 it only helps
            to read batches.
        kv: `auto` takes fewer bits, and says so, where the usual types of cache do not fit free memory; `type_k` and
            `type_v` when None.
        n_threads: threads; all cores when None.
        lora: GGUF adapters to apply, of this model.
        sequences: how many texts the one cache can hold at a time; this class uses the first (`server.engine` all).
        watch: sees what the weights are multiplied with.

    Raises:
        GgufError: the file, or an adapter, does not open.
        OptionError: an option that cannot work.
        ResourceError: weights and cache do not fit in free memory.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        n_ctx: int | None = None,
        type_k: str | None = None,
        type_v: str = "f16",
        flash_attn: bool | None = None,
        device: str = "auto",
        gpu_layers: int | Literal["auto"] | None = None,
        kv: Literal["auto"] | None = None,
        n_threads: int | None = None,
        lora: Sequence[str | Path] = (),
        sequences: int = 1,
        watch: Watch | None = None,
    ) -> None:
        info = read_gguf(Path(path))
        check_loadable(info)
        adapters = [read_gguf(Path(adapter)) for adapter in lora]
        for adapter in adapters:
            check_adapter(adapter, info)
        self.info, self.path, self.name = info, Path(path), str(path)
        self._marks = [(path, file_mark(path)) for path in (self.path, *map(Path, lora))]
        self.turns = Turns()
        self.users: list[Callable[[], None]] = []
        """What ends those who compute with it in a thread of their own."""
        self._pieces = pieces_without_bytes(info.header)
        self.window = info.rope.max_position_embeddings
        self.n_ctx = self.window if n_ctx is None else n_ctx
        gpu = _use_gpu(device)
        type_k, type_v = self._types = _cache_types(info, self.n_ctx, (type_k, type_v), kv, gpu, flash_attn)
        _check_options(info, self.n_ctx, type_k, type_v, flash_attn)
        wanted = gpu_layers
        if gpu_layers == "auto":
            wanted = _layers_that_fit(info, self.n_ctx, (type_k, type_v)) if gpu else None
        layers = _layers_on_gpu(info, device, gpu, wanted)
        self.flash_attn = layers == -1 or type_v in QUANTIZED_CACHES if flash_attn is None else flash_attn
        self.kv_cache_bytes = predict_kv_cache(info, self.n_ctx, type_k, type_v)
        if layers == 0:
            _check_memory(info, self.kv_cache_bytes, self.n_ctx)
        threads = n_threads or cores()
        check_opens(info.header, [adapter.header for adapter in adapters])
        # On a GPU few tokens at a time are slow, and at a long window llama.cpp ends (recipes/gpu).
        batch = _BATCH if self.flash_attn or layers else _scores_batch(info, self.n_ctx)
        opening = partial(
            _open, path, info, lora, n_ctx=self.n_ctx, n_ubatch=batch, type_k=CACHE_TYPES[type_k][0],
            type_v=CACHE_TYPES[type_v][0], flash_attn=self.flash_attn, op_offload=gpu, n_threads=threads,
            n_threads_batch=threads, sequences=sequences, watch=watch,
        )  # fmt: skip
        fewer = gpu_layers == "auto" and layers != 0
        self._llama = _open_what_fits(opening, layers, info) if fewer else opening(n_gpu_layers=layers)
        self._watch, self._batch = watch, batch
        self.session = Session(self._llama, batch=batch, interrupted=self._stop)
        self.sequences = [self.session, *(CachedSequence(self._llama, number) for number in range(1, sequences))]

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the weights and the cache; nothing can be asked afterwards. Who computes with them ends first."""
        for end in [*self.users]:
            end()
        for sequence in self.sequences:
            sequence.close()
        compute(self._llama.close)  # behind what may still be running there, where a signal came in between

    def batch(self) -> Batch:
        """Return what reads several of the model's sequences at once."""
        return Batch(self._llama, self._batch)

    @contextlib.contextmanager
    def beside(
        self, watch: Watch, known: int, held: tuple[Sequence[int], np.ndarray] | None = None
    ) -> Iterator[Session]:
        """Open a session beside the model's own that has read the same, in which a watch sees what is computed.

        It computes without flash attention; what was read with it has to be read again there.

        Args:
            watch: sees it.
            known: how many ids are needed. With sliding windows the model's own cache forgets the others: of such only
                what the last token sees is copied.
            held: ids and the state after them, where that is not the session's own.
        """
        with open_beside(self._llama, watch) as llama:
            beside = Session(llama, batch=self._batch)
            ids, state = held or self._held(known)
            if len(state):
                beside.restore(state, ids)
            del state, held
            yield beside

    def _held(self, known: int) -> tuple[Sequence[int], np.ndarray]:
        if self.sliding_window:
            self.session.rewind(min(known, len(self.session.ids)))
        state = np.empty(self.session.state_bytes(), np.uint8)
        self.session.save(state)
        return self.session.ids, state

    def looking_bytes(self) -> int:
        """Return what `beside` takes of memory, about."""
        return self.kv_cache_bytes + self.session.state_bytes()

    @cached_property
    def identity(self) -> dict[str, str]:
        """What must be the same for a kept state to be this model's: file, adapters, cache, llama.cpp and CPU."""
        file, *adapters = (file_digest(path, mark) for path, mark in self._marks)
        type_k, type_v = self._types
        by_window = any(tensor.name in LONGROPE_TENSORS for tensor in self.info.tensors)  # which of them are used
        return {
            "file": file, "adapters": " ".join(adapters), "type_k": type_k, "type_v": type_v,
            "flash_attn": str(self.flash_attn), "window": str(self.n_ctx) if by_window else "any",
            "llama_cpp": machine(),
        }  # fmt: skip

    def name_of_states(self) -> str:
        """Return the name that kept states of this model have in common."""
        return identity_digest(self.identity)

    # What llama.cpp read

    @property
    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self.session.n_vocab

    @property
    def n_ctx_train(self) -> int:
        """Window that llama.cpp read from the file, in tokens."""
        return int(llama_cpp_library().llama_model_n_ctx_train(self._llama.model))

    @property
    def rope_freq_scale_train(self) -> float:
        """What llama.cpp multiplies positions with: the inverse of the factor, dimensionless."""
        return float(llama_cpp_library().llama_model_rope_freq_scale_train(self._llama.model))

    @property
    def sliding_window(self) -> int:
        """How far back layers look that do not see the whole window, as llama.cpp read it, in tokens; 0 for none."""
        return int(llama_cpp_library().llama_model_n_swa(self._llama.model))

    @property
    def bos(self) -> list[int]:
        begin = self.info.metadata.get("tokenizer.ggml.bos_token_id")
        return [int(begin)] if begin is not None and self.tokenize("a")[:1] == [begin] else []

    def is_end(self, token: int) -> bool:
        return self.session.is_end(token)

    # Text

    def tokenize(self, text: str, *, add_special: bool = True, special: bool = True) -> list[int]:
        """Return token ids.

        Args:
            text: what to tokenize.
            add_special: put the begin token before it, where the model has one.
            special: whether special tokens written out in the text are those tokens, and not text.

        Raises:
            TextError: the vocabulary has not all bytes, and a character of the text needs some that are not there.
        """
        if self._pieces is not None and (lost := unreadable(self._pieces, frozenset(text))):
            raise TextError(
                f"{self.path}: its vocabulary has no token and no bytes for {min(lost)!r}, at which llama.cpp ends",
                "leave such characters out of the text",
            )
        llama_cpp, data = llama_cpp_library(), text.encode()
        vocabulary, room = self.session.vocab, len(data) + 3
        while True:  # a token has a byte or more, but for those that are put before and behind a text
            ids = (llama_cpp.llama_token * room)()
            count = llama_cpp.llama_tokenize(vocabulary, data, len(data), ids, room, add_special, special)
            if count >= 0:
                return list(ids[:count])
            room = -count

    def detokenize(self, ids: Sequence[int]) -> str:
        data = b"".join(map(self.session.piece, ids))
        if data[:1] == b" " and ids[0] == self.info.metadata.get("tokenizer.ggml.bos_token_id"):
            data = data[1:]  # the one that SentencePiece puts before a text
        return data.decode(errors="replace")

    def complete(
        self,
        prompt: str,
        *,
        max_tokens: int | None = None,
        cancelled: Cancelled = never,
        on_progress: Progress = silent,
        **sampling: Unpack[SamplingKeywords],
    ) -> Generator[str, None, str]:
        """Continue `prompt`, yielding text as it comes.

        What the prompt has in common with what was read and written last is not read again.

        Args:
            prompt: text; it must fit the window together with `max_tokens`.
            max_tokens: limit in tokens; up to 256, as the window allows, when None.
            cancelled: asked before each batch and token whether to stop, e.g. `threading.Event().is_set`.
            on_progress: told how many tokens of the prompt were read, how many must be, and how many were written.
            sampling: the fields of `Sampling`: temperature, top_k, top_p, min_p, repeat_penalty,
                frequency_penalty, presence_penalty, seed, stop, grammar, json_schema, logit_bias.

        Returns:
            Why it ended: `stop` at an end token or a stop string, `length` at the limit, or `cancelled`.

        Raises:
            OptionError: prompt and `max_tokens` do not fit the window; nothing is ever cut. Or a value of the sampling.
        """
        ids, how = self.tokenize(prompt), Sampling(**sampling)
        return (yield from self._continue(ids, max_tokens, how, cancelled, on_progress))

    def _continue(
        self, ids: list[int], max_tokens: int | None, sampling: Sampling, cancelled: Cancelled, on_progress: Progress
    ) -> Generator[str, None, str]:
        excess = len(ids) + (max_tokens or 1) - self.n_ctx
        hint = f"shorten the prompt by {excess} tokens or open a larger --n-ctx"
        room = check_fits("prompt", len(ids), self.n_ctx, max_tokens, hint)
        if not ids:
            raise TextError(
                f"{self.path}: a prompt without a token, and the model has none to begin with", "write some"
            )
        with self.turns(cancelled) as mine:
            if not mine:
                return "cancelled"
            limit = max_tokens or min(256, room)
            tokens = self.session.write(ids, limit, sampling, cancelled=cancelled, on_progress=on_progress)
            return (yield from stream(tokens, self.session.piece, sampling.stop))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        cancelled: Cancelled = never,
        on_progress: Progress = silent,
        **sampling: Unpack[SamplingKeywords],
    ) -> Generator[str, None, str]:
        """Answer a conversation with the file's own chat template, yielding text as it comes.

        Of a conversation that goes on only what is new is read.

        Args:
            messages: objects with `role` (system, user, assistant) and `content`.
            max_tokens: as in `complete`.
            cancelled: as in `complete`.
            on_progress: as in `complete`.
            sampling: as in `complete`.

        Returns:
            Why it ended, as in `complete`.

        Raises:
            GgufError: the file has no chat template, or none that can be run.
            OptionError: conversation and `max_tokens` do not fit the window. Or a value of the sampling.
        """
        ids, how = self.chat_ids(messages), Sampling(**sampling)  # the template writes the begin token where it is due
        return (yield from self._continue(ids, max_tokens, how, cancelled, on_progress))

    @property
    def has_chat_template(self) -> bool:
        """Whether the file states how a conversation is written."""
        return "tokenizer.chat_template" in self.info.metadata

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
        """Return a conversation as the file's chat template writes it, up to where the assistant answers.

        Special tokens that a message spells out are cut by `templates.CUT`, by which `rendered_ids` knows them.

        Args:
            messages: objects with `role` and `content`.
            tools: what the template shows the model as tools.

        Raises:
            GgufError: the file has no chat template, or none that can be run.
        """
        if not self.has_chat_template:
            raise GgufError(
                f"{self.path}: tokenizer.chat_template is missing",
                "it is a base model: pi-gguf run or Model.complete goes on from a text, pi-gguf ask takes a document",
            )
        template = self.info.metadata["tokenizer.chat_template"]
        plain, shown = cut(list(messages), self._controls), cut(tools and list(tools), self._controls)
        return render_chat(template, plain, self._special_tokens(), str(self.path), tools=shown)

    def rendered_ids(self, text: str) -> list[int]:
        """Return the tokens of what `render` returned, or of a part of it: what messages spell out stays text."""
        return [token for part in text.split(CUT) for token in self.tokenize(part, add_special=False)]

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """Return the tokens of a conversation, as `render` writes it."""
        return self.rendered_ids(self.render(messages, tools))

    def chat_around(self, message: str) -> tuple[list[int], list[int]] | None:
        if not self.has_chat_template:
            return None
        before, _, behind = self.render([{"role": "user", "content": message}]).partition(GAP)
        return (self.rendered_ids(before), self.rendered_ids(behind)) if behind and GAP not in behind else None

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        """What spells out a token that is no text."""
        llama_cpp, vocab = llama_cpp_library(), self.session.vocab
        no_text = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        names = {
            llama_cpp.llama_vocab_get_text(vocab, i).decode(errors="replace")
            for i in range(self.n_vocab)
            if llama_cpp.llama_vocab_get_attr(vocab, i) & no_text
        } - {""}
        return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)")

    def read(
        self,
        source: str | Path | Document,
        *,
        part: tuple[int, int] = (1, 1),
        form: str | None = None,
        states: States | Literal["user"] | None = "user",
        cancelled: Cancelled = never,
        on_progress: Progress = silent,
    ) -> Reading:
        """Read a document, to be asked about as often as one likes.

        What was read is kept on disk, as private as the document, and not read again another time.

        Args:
            source: a file of txt, md, html, pdf, docx or epub, - for standard input, or what `read_document` returned.
            part: which of how many parts to read, e.g. (2, 3); for a document that does not fit the window.
            form: chat (the file's chat template), question (question and answer as plain text) or plain (the question
                goes on where the document ends); the first where the file has a template, else the second, when None.
            states: where what was read is kept: `user`, the user's cache folder or `PI_GGUF_CACHE`; None keeps nothing.
            cancelled: asked before each batch whether to stop; what was read is kept, and the next `ask` goes on.
            on_progress: told how many tokens were read, how many have to be, and 0.

        Raises:
            GgufError: the file's chat template cannot be used.
            OptionError: the document does not fit the window; nothing is ever cut. Or a value that cannot work.
            TextError: the document cannot be read.

        Example:
            >>> with pi_gguf.open("m.gguf") as model, model.read("book.epub") as book:  # doctest: +SKIP
            ...     print("".join(book.ask("Who keeps the lighthouse?")))
        """
        document = source if isinstance(source, Document) else read_document(source)
        reading = Reading(self, document, part=part, form=form, states=user_states() if states == "user" else states)
        with contextlib.suppress(Stopped):
            reading.read(cancelled=cancelled, on_progress=on_progress)
        return reading

    def reading_cost(self, start: int, end: int) -> float:
        """Return the operations that reading the tokens from `start` to before `end` takes, roughly."""
        attention = self.attention_cost() * (1 if self.flash_attn else _PLAIN_ATTENTION)
        return 2.0 * self._weights * (end - start) + attention * (end**2 - start**2) / 2

    def attention_cost(self) -> float:
        """Return the operations by which a token looks at another one."""
        width = self.info.hyperparameter("attention.head_count") * head_size(self.info, "key_length")
        return 4.0 * self.info.hyperparameter("block_count") * width

    @cached_property
    def _weights(self) -> int:
        return sum(math.prod(t.shape) for t in self.info.tensors if len(t.shape) > 1)

    def _special_tokens(self) -> dict[str, str]:
        """Return the spellings of the file's special tokens by the names that chat templates know."""
        llama_cpp, vocab, found = llama_cpp_library(), self.session.vocab, {}
        for key, name in _TEMPLATE_NAMES.items():
            index = self.info.metadata.get(f"tokenizer.ggml.{key}_token_id")
            if isinstance(index, int) and 0 <= index < self.n_vocab:
                found[name] = llama_cpp.llama_vocab_get_text(vocab, index).decode(errors="replace")
        return found

    # Scoring

    def logits_chunks(self, ids: Sequence[int], last: int) -> Iterator[np.ndarray]:
        if len(ids) > self.n_ctx:
            raise OptionError(f"{len(ids)} tokens do not fit the open window of {self.n_ctx}", "open a larger n_ctx")
        with self.turns():
            yield from self.session.read(ids, last)

    def evaluate(self, ids: Sequence[int]) -> Iterator[int]:
        """Read `ids` from their start, every layer for every one, and yield how many each batch had.

        Raises:
            OptionError: they do not fit the window.
        """
        for logits in self.logits_chunks(ids, len(ids)):
            if self._watch:
                self._watch.check()
            yield len(logits)

    def _stop(self) -> None:
        """Let llama.cpp leave out the rest of a batch, where a watch can tell it."""
        if self._watch:
            self._watch.stopping = True


def open_model(path: str | Path, **options: Any) -> Model:
    """Open a GGUF file with llama.cpp; `options` as for `Model`."""
    return Model(path, **options)


def _open(path: str | Path, info: GgufInfo, lora: Sequence[str | Path], **options: Any) -> Any:
    """Open a file in llama.cpp with adapters applied; `options` as for `open_llama`."""
    log.clear()
    try:
        fast_buffers = all(t.type in UNQUANTIZED for t in info.tensors) or fast_buffers_work()
        llama = open_llama(path, fast_buffers=fast_buffers, n_batch=_BATCH, verbose=False, **options)
    except (ValueError, RuntimeError) as error:
        raise GgufError(
            f"{path}: llama.cpp does not open it ({last_error() or error})",
            f"pi-gguf inspect {path} shows what it states; or copy or convert it again",
        ) from error
    try:
        apply_adapters(llama, lora)
    except GgufError:
        compute(llama.close)
        raise
    return llama


def _cache_types(
    info: GgufInfo, n_ctx: int, asked: tuple[str | None, str], kv: str | None, gpu: bool, flash_attn: bool | None
) -> tuple[str, str]:
    """Return the types of K and V: those asked for, the usual ones, or with `kv` those that fit."""
    if kv not in (None, "auto"):
        raise OptionError(f"kv must be auto, got {kv}", "or leave it out and give --type-k and --type-v")
    if kv:
        chosen = choose_kv(info, n_ctx, psutil.virtual_memory().available, gpu=gpu, flash_attn=flash_attn)
        if chosen.why:
            say(chosen.why)
        return chosen.type_k, chosen.type_v
    type_k, type_v = asked
    return type_k or usual_k(info, plain=not (gpu or flash_attn or type_v in QUANTIZED_CACHES)), type_v


def _check_options(info: GgufInfo, n_ctx: int, type_k: str, type_v: str, flash_attn: bool | None) -> None:
    """Check that llama.cpp can keep a file's keys and values in a cache of this size and these types."""
    if n_ctx < 1:
        raise OptionError(f"n_ctx must be at least 1 token, got {n_ctx}")
    for name, value, length in (("type_k", type_k, "key_length"), ("type_v", type_v, "value_length")):
        if value not in CACHE_TYPES:
            raise OptionError(
                f"{name} must be one of {', '.join(CACHE_TYPES)}, got {value}",
                "leave it out, or q8_0, which takes half of f16",
            )
        if value in QUANTIZED_CACHES and (size := head_size(info, length)) % CACHE_BLOCK:
            raise OptionError(
                f"{name} {value} needs heads of a multiple of {CACHE_BLOCK}, {info.path} has heads of {size}",
                "f16 has no blocks",
            )
    if type_k != type_v and is_one_tensor(info):
        raise OptionError(
            f"type_k {type_k} and type_v {type_v} must be the same for {info.path}, whose keys and values are one",
            "leave both out",
        )
    if type_v in QUANTIZED_CACHES and flash_attn is False:
        raise OptionError(f"type_v {type_v} needs flash attention", "leave flash attention on")


def _scores_batch(info: GgufInfo, n_ctx: int) -> int:
    """Return how many tokens llama.cpp computes at a time where every head has a score of each with each of `n_ctx`."""
    fitting = _SCORES_BYTES // (4 * n_ctx * info.hyperparameter("attention.head_count"))
    return max(32, min(_BATCH, fitting // 32 * 32))


def _check_memory(info: GgufInfo, cache_bytes: int, n_ctx: int) -> None:
    weights = sum(t.nbytes for t in info.tensors)
    free = psutil.virtual_memory().available
    sizes = (
        f"{info.path}: {human_bytes(weights)} of weights and {human_bytes(cache_bytes)} of KV cache at {n_ctx} tokens, "
        f"{human_bytes(free)} of memory free"
    )
    if cache_bytes > free:
        raise ResourceError(sizes, "open a smaller window, or --type-k q8_0 --type-v q8_0")
    if weights + cache_bytes > free:  # the weights are mapped from disk: slow, not impossible
        say(f"note: {sizes}; weights will be read from disk again and again")


def _use_gpu(device: str) -> bool:
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"device must be auto, cpu or cuda, got {device}")
    built = bool(llama_cpp_library().llama_supports_gpu_offload())
    if device == "cuda" and not built:
        raise OptionError(
            "device cuda: this llama.cpp was built without a GPU",
            "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-deps --no-cache-dir llama-cpp-python",
        )
    return built and device != "cpu"


def _layers_that_fit(info: GgufInfo, n_ctx: int, kv: tuple[str, str]) -> int | None:
    """Return how many layers fit the GPU, and say it where not all do; None for all."""
    free = gpu_memory()
    if free is None:
        return None
    chosen = choose_layers(info, n_ctx, kv, _BATCH, free)
    if chosen.why:
        say(chosen.why)
    return None if chosen.layers == -1 else chosen.layers


def _open_what_fits(opening: Callable[..., Any], layers: int, info: GgufInfo) -> Any:
    """Open a file with so many layers on the GPU, -1 for all; with fewer where llama.cpp does not get the memory."""
    left = layers if layers >= 0 else info.hyperparameter("block_count") + 1
    while True:
        try:
            return opening(n_gpu_layers=-1 if left > info.hyperparameter("block_count") else left)
        except GgufError as error:
            if left == 0 or not any(word in str(error).lower() for word in _NO_ROOM):
                raise
            left = 3 * left // 4
            say(f"{info.path}: the GPU has no room; {left} layers are tried on it")


def _layers_on_gpu(info: GgufInfo, device: str, gpu: bool, gpu_layers: int | Literal["auto"] | None) -> int:
    """Return llama.cpp's number of layers on the GPU: 0 without one, -1 for all, which are one more than the blocks."""
    if gpu_layers is None:
        return -1 if gpu else 0
    if not isinstance(gpu_layers, int) or gpu_layers < 0:
        raise OptionError(f"gpu_layers must be auto or at least 0, got {gpu_layers}", "leave it out for all layers")
    if not gpu and (gpu_layers or device == "cpu"):
        where = "is for a GPU, device is cpu" if device == "cpu" else "needs a llama.cpp that was built for a GPU"
        raise OptionError(f"gpu_layers {where}", "leave it out, and every layer is on the CPU")
    return -1 if gpu_layers > info.hyperparameter("block_count") else gpu_layers
