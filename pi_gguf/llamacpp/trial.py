"""Whether llama.cpp lives through a file, tried in a child process before this one opens it.

Two things end llama.cpp, and with it every process that it runs in: a library that was compiled wrongly for this CPU,
and a file that states what no check foresaw. In: a file. Out: nothing, or a `GgufError` with what llama.cpp said last;
and whether its fast buffers work here. Verdicts are kept in the user's cache, so that each costs once.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pi_gguf.common.children import run_child
from pi_gguf.common.files import open_plain, user_cache
from pi_gguf.common.progress import say
from pi_gguf.errors import GgufError, ResourceError
from pi_gguf.gguf.file import TensorInfo, padded, tensor_nbytes, write_header
from pi_gguf.gguf.header import MEASURED, Header
from pi_gguf.llamacpp.library import last_line, llama_cpp_library
from pi_gguf.llamacpp.quantizer import mixture

_LIVES, _REFUSES = "lives", 3
"""The verdict that is kept; the child's exit code where llama.cpp itself says no, which this process then hears."""

_LONGEST_VERDICT = 64

_REBUILD = 'CXXFLAGS="-fno-tree-dse -fno-dse" pip install --force-reinstall --no-deps --no-cache-dir llama-cpp-python'
"""Keeps all stores, among them those that GCC 12 drops."""

_SECONDS, _BYTES_A_SECOND = 15, 2**25
"""How long a child may take: so much, and the time to read the file from a slow disk."""

_WARNINGS = (3, 4)
"""llama.cpp's levels of warnings and errors."""

_FAULTS = (signal.SIGSEGV, signal.SIGILL, signal.SIGFPE, signal.SIGBUS)
"""What wrong machine code ends in; other deaths, such as of too little memory, are not the CPU's and are not kept."""

_TEXT = b"Once upon a time, 12 cats."
_MANY = 33
"""Tokens of a prompt that llama.cpp multiplies as a matrix, not one by one."""

_WIDTH, _ROWS = 256, 64
_KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
"""Types of weights of which llama.cpp has a fast form on some CPU; the tiny model has a layer of each."""


@cache
def fast_buffers_work() -> bool:
    """Tell whether the installed llama.cpp lives through weights in the forms that it holds for this CPU's speed.

    With GCC 12 and AMX it does not, unless it was built as the Makefile builds it: the compiler drops stores that the
    CPU's tile configuration is then loaded from. Plain buffers avoid that code.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        _write_tiny(path)
        died = _tried("buffers", machine(), [str(path)])
    if died is None:
        return True
    say(
        f"note: the installed llama.cpp crashes on quantized weights on this CPU ({died}); files are opened with plain "
        f"buffers, which is slower; a build that works: {_REBUILD}"
    )
    return False


def check_opens(header: Header, adapters: Sequence[Header] = ()) -> None:
    """Have a child open a file that is not ours, with its adapters, and read one token.

    Args:
        header: of the file. One that holds a certificate of this very header was opened before.
        adapters: headers of adapters to apply.

    Raises:
        GgufError: the child died, or did not come back.
        ResourceError: it was killed from outside, as the system does where memory ends.
    """
    if not adapters and header.metadata.get(f"{MEASURED}header_sha256") == header.fingerprint():
        return
    _check("open it", [header, *adapters])


def check_quantizes(header: Header, quant: str) -> None:
    """Have a child ask llama.cpp how it would quantize a file that is not ours.

    Raises:
        GgufError, ResourceError: as `check_opens`.
    """
    _check(f"quantize it to {quant}", [header], quant)


def trust(header: Header) -> None:
    """Remember a file that this package wrote whole."""
    _keep(_key("open it", _identity([header])))


def _check(what: str, headers: Sequence[Header], *more: str) -> None:
    path, paths = headers[0].path, [header.path for header in headers]
    died = _tried(what, _identity(headers), [*map(str, paths), *more], _seconds(paths))
    if died == signal.Signals.SIGKILL.name:
        raise ResourceError(f"{path}: a process that opened it was killed, as systems do out of memory", "free some")
    if died is not None:
        names = " with ".join(map(str, paths))
        raise GgufError(
            f"{names}: llama.cpp ends when asked to {what} ({died})",
            f"pi-gguf inspect {path} shows what its header states; download or convert it again",
        )


def _seconds(paths: Sequence[Path]) -> float:
    return _SECONDS + sum(path.stat().st_size for path in paths) / _BYTES_A_SECOND


# Verdicts


def _identity(headers: Sequence[Header]) -> str:
    return " ".join(header.fingerprint() for header in headers)


@cache
def machine() -> str:
    """Return what tells this llama.cpp on this CPU from another."""
    digest = hashlib.sha256(f"{platform.machine()} {platform.processor()}".encode())
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        digest.update("\n".join(dict.fromkeys(s for s in lines if s.startswith(("model name", "flags")))).encode())
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    spec = find_spec("llama_cpp")
    places = [folder] if folder else [f"{p}/lib" for p in (spec and spec.submodule_search_locations) or ()]
    for place in places:
        for library in sorted(Path(place).glob("*")):
            if any(part in library.name for part in ("llama", "ggml-base", "ggml-cpu")) and library.is_file():
                digest.update(library.read_bytes())
    return digest.hexdigest()


def _key(what: str, identity: str) -> Path | None:
    """Return where a verdict is kept; None for a user without a home."""
    folder = user_cache()
    return folder and folder / hashlib.sha256(f"{what} {identity} {machine()}".encode()).hexdigest()


def _kept(key: Path | None) -> str | None:
    """Return a verdict; None where there is none, or what no trial wrote."""
    if key is None:
        return None
    try:
        with open_plain(key) as file:
            verdict = file.read(_LONGEST_VERDICT).decode()
    except (OSError, ValueError):
        return None
    return verdict if verdict in (_LIVES, *(fault.name for fault in _FAULTS)) else None


def _keep(key: Path | None, verdict: str = _LIVES) -> None:
    if key is None:
        return
    with contextlib.suppress(OSError, ValueError):  # a cache that cannot be written costs a child each time
        key.parent.mkdir(parents=True, exist_ok=True)
        partial = key.with_name(f"{key.name}.{os.getpid()}")
        partial.write_text(verdict)
        partial.replace(key)


def _tried(what: str, identity: str, arguments: Sequence[str], seconds: float = _SECONDS) -> str | None:
    """Return what a child died of; None where it lived. A verdict on the CPU is kept, on a file a good one only."""
    key = _key(what, identity)
    if verdict := _kept(key):
        return None if verdict == _LIVES else verdict
    if not sys.executable:  # Python inside another program: there is nothing to start
        return None
    try:
        child = run_child(
            "llamacpp.trial",
            what.split()[0],
            *arguments,
            seconds=seconds,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
    except subprocess.TimeoutExpired:
        return f"it did not come back within {seconds:.0f} seconds"
    if child.returncode == 0 and not child.stdout.endswith(_LIVES.encode()):
        return "it did not end as it should"  # where a parent has ignored SIGCHLD, every code is 0
    if child.returncode >= 0:
        if child.returncode == 0:
            _keep(key)
        return None  # llama.cpp, or Python, says by itself what is wrong
    died = signal.Signals(-child.returncode).name
    if what != "buffers" and died != "SIGKILL" and (said := last_line(child.stderr.decode(errors="replace"))):
        died = f"{died}: {said}"
    if what == "buffers" and -child.returncode in _FAULTS:
        _keep(key, died)
    return died


# The child


def _write_tiny(path: Path) -> None:
    """Write a Llama of zeros with a layer of each of the types."""
    arch, width = "llama", _WIDTH
    metadata: dict[str, int | float | str] = {
        f"{arch}.context_length": 64, f"{arch}.embedding_length": width, f"{arch}.block_count": len(_KINDS),
        f"{arch}.feed_forward_length": width, f"{arch}.attention.head_count": 4,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5, f"{arch}.vocab_size": _ROWS,
        "tokenizer.ggml.model": "none",
    }  # fmt: skip
    shapes = [("token_embd.weight", (_ROWS, width), "F32"), ("output_norm.weight", (width,), "F32")]
    shapes += [("output.weight", (_ROWS, width), "Q6_K")]
    for i, kind in enumerate(_KINDS):
        shapes += [(f"blk.{i}.{name}_norm.weight", (width,), "F32") for name in ("attn", "ffn")]
        products = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        shapes += [(f"blk.{i}.{name}.weight", (width, width), kind) for name in products]
    tensors = [TensorInfo(name, shape, kind, tensor_nbytes(kind, shape)) for name, shape, kind in shapes]
    write_header(path, arch, metadata, tensors)
    os.truncate(path, padded(path.stat().st_size) + sum(padded(tensor.nbytes) for tensor in tensors))


def _read_tokens(path: str, adapters: Sequence[str], *, fast_buffers: bool, tokens: Sequence[int] = ()) -> None:
    """Open a file and read some tokens, those of a short text where none are given."""
    llama_cpp = llama_cpp_library()
    warn = llama_cpp.llama_log_callback(lambda level, text, _: level in _WARNINGS and os.write(2, text) and None)
    llama_cpp.llama_log_set(warn, None)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts, params.n_gpu_layers = fast_buffers, 0
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        sys.exit(_REFUSES)
    if not tokens:
        vocab, found = llama_cpp.llama_model_get_vocab(model), (ctypes.c_int32 * 64)()
        count = llama_cpp.llama_tokenize(vocab, _TEXT, len(_TEXT), found, len(found), True, True)
        tokens = list(found)[: max(1, count)]
        piece = ctypes.create_string_buffer(64)
        llama_cpp.llama_token_to_piece(vocab, tokens[-1], piece, len(piece), 0, True)
    settings = llama_cpp.llama_context_default_params()
    settings.op_offload = False  # it is the CPU that is tried, where llama.cpp was built for a GPU too
    settings.n_ctx = min(512, max(64, llama_cpp.llama_model_n_ctx_train(model)))
    settings.n_threads = settings.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        sys.exit(_REFUSES)
    loaded = [llama_cpp.llama_adapter_lora_init(model, os.fsencode(adapter)) for adapter in adapters]
    if not all(loaded):
        sys.exit(_REFUSES)
    if loaded:
        kind, scales = llama_cpp.llama_adapter_lora_p_ctypes, (ctypes.c_float * len(loaded))(*[1.0] * len(loaded))
        llama_cpp.llama_set_adapters_lora(context, (kind * len(loaded))(*loaded), len(loaded), scales)
    for part in (tokens, tokens[-1:]):
        ids = (ctypes.c_int32 * len(part))(*part)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(part))):
            sys.exit(_REFUSES)


def _main(what: str, path: str = "", *more: str) -> None:
    if what == "works":
        sys.exit(not fast_buffers_work())
    if hasattr(signal, "alarm"):  # it does not go on for ever where its parent was killed
        signal.alarm(1 + int(_seconds([file for file in map(Path, (path, *more)) if file.exists()])))
    if what == "quantize":
        mixture(Path(path), *more, importance={})
    elif what == "buffers":
        _read_tokens(path, (), fast_buffers=True, tokens=range(_MANY))
    else:
        _read_tokens(path, more, fast_buffers=False)
    os.write(1, _LIVES.encode())


if __name__ == "__main__":
    _main(*sys.argv[1:])
