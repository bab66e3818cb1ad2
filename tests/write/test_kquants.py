"""K-quants and IQ4 searched side by side: the bytes of ggml, for whatever weights and whatever they weigh."""

import os
import subprocess
import sys

import numpy as np
import pytest

import pi_gguf
from pi_gguf.errors import OptionError
from pi_gguf.gguf.file import read_gguf, tensor_nbytes
from pi_gguf.llamacpp import quantizer as ggml
from pi_gguf.write import kquants, writer

COLUMNS = 768


def _normal(rng, shape):
    return rng.standard_normal(shape) * 0.02


def _heavy(rng, shape):
    return rng.standard_cauchy(shape).clip(-3e4, 3e4)


def _blocks_of_many_sizes(rng, shape):
    return _normal(rng, shape) * np.exp2(rng.uniform(-40, 18, (shape[0], shape[1] // 16))).repeat(16, axis=1)


def _few_levels(rng, shape):
    return rng.integers(-2, 3, shape) * np.exp2(rng.integers(-8, 3, (shape[0], 1)))


def _flat(rng, shape):
    """Zeros, one value throughout, one value among zeros."""
    rows = np.zeros(shape)
    rows[1::3] = rng.standard_normal((len(rows[1::3]), 1))
    rows[2::3, rng.integers(0, shape[1], 20)] = 1.5
    return rows


def _far_from_zero(rng, shape):
    return rng.choice([-1, 1], (shape[0], 1)) * (1000 + rng.standard_normal(shape))


def _nearly_one_value(rng, shape):
    """Groups so flat, beside one so far away, that rounding passes what ggml's way to round can hold."""
    rows = -1400 + rng.integers(0, 3, shape) / 2**14
    rows.reshape(len(rows), -1, 256)[:, :, :32] = -60000
    return rows


def _half_gone(rng, shape):
    return _normal(rng, shape) * (rng.random(shape) < 0.1)


def _as_small_as_can_be(rng, shape):
    return rng.standard_normal(shape) * np.exp2(rng.uniform(-149, -100, (shape[0], 1)))


def _next_to_nothing(rng, shape):
    """Around 1e-15, where a group counts as empty."""
    return rng.standard_normal(shape) * np.exp2(rng.uniform(-62, -44, (shape[0], 1)))


def _on_the_levels_of_iq4(rng, shape):
    """And two of each 32 halfway between two, on either side of 0: met there where -128 is largest."""
    rows = rng.choice(kquants._IQ4, shape)
    groups = rows.reshape(-1, 32)
    groups[:, 7], groups[:, 9] = (rng.choice(part, len(groups)) for part in np.split(kquants._BETWEEN, [8]))
    groups[:, 5] = rng.choice([-127, -128], len(groups))
    return rows


WEIGHTS = [
    _normal,
    _heavy,
    _blocks_of_many_sizes,
    _few_levels,
    _flat,
    _far_from_zero,
    _nearly_one_value,
    _half_gone,
    _as_small_as_can_be,
    _next_to_nothing,
    _on_the_levels_of_iq4,
]


@pytest.mark.parametrize("kind", kquants.KINDS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("weighed", ["plain", "weighed", "some of it nothing"])
def test_bytes_are_those_of_ggml(kind, weights, weighed):
    rng = np.random.default_rng(7)
    rows = weights(rng, (61, COLUMNS)).astype(np.float32)  # not a multiple of what is done at once
    importance = None if weighed == "plain" else rng.random(COLUMNS).astype(np.float32) ** 4
    if weighed == "some of it nothing":
        importance[rng.random(COLUMNS) < 0.5] = 0
    ours, theirs = (np.full((61, tensor_nbytes(kind, (COLUMNS,))), 85, np.uint8) for _ in range(2))
    kquants.quantize_rows(kind, rows, ours, importance)
    ggml.quantize_rows(kind, rows, theirs, importance)
    assert np.flatnonzero((ours != theirs).any(1)).tolist() == []


@pytest.mark.parametrize("kind", kquants.KINDS)
def test_ggml_here_is_compiled_to_the_same_arithmetic(kind):
    """On this machine, as on every x86 one: its library of quantizers is compiled for the oldest of them."""
    assert kquants.gives_ggml_bytes(kind)


def _convert(out, **options):
    pi_gguf.convert("bundled:tiny", out, check="none", certify=False, **options)
    return out.read_bytes()


def test_a_file_is_the_same(tmp_path, monkeypatch):
    used = []

    def counted(kind, rows, *rest):
        used.append(kind)
        real(kind, rows, *rest)

    real = kquants.quantize_rows
    plain = _convert(tmp_path / "ggml.gguf", quantizer="ggml")
    monkeypatch.setattr(kquants, "quantize_rows", counted)
    assert _convert(tmp_path / "small.gguf") == plain
    assert not used  # a model so small is not worth compiling for
    assert _convert(tmp_path / "numba.gguf", quantizer="numba") == plain
    assert {*used} == {"Q4_K", "Q6_K"}
    used.clear()
    monkeypatch.setattr(writer, "_WORTH_COMPILING", 1)
    assert _convert(tmp_path / "auto.gguf") == plain
    assert {*used} == {"Q4_K", "Q6_K"}
    used.clear()
    monkeypatch.setattr(kquants, "gives_ggml_bytes", lambda kind: kind != "Q4_K")  # as where ggml fuses operations
    assert _convert(tmp_path / "other.gguf") == plain
    assert {*used} == {"Q6_K"}


@pytest.mark.parametrize("quant", ["IQ4_XS", "IQ4_NL", "Q2_K"])
def test_files_of_fewer_bits_are_the_same(tmp_path, quant):
    plain = _convert(tmp_path / "ggml.gguf", quant=quant, quantizer="ggml")
    assert _convert(tmp_path / "numba.gguf", quant=quant, quantizer="numba") == plain
    assert quant in {tensor.type for tensor in read_gguf(tmp_path / "numba.gguf").tensors}


def test_without_numba(tmp_path):
    """What asks for it says what to install; nothing else does."""
    code = """
import sys
sys.modules["numba"] = None
import pi_gguf
from pi_gguf.errors import OptionError
pi_gguf.convert("bundled:tiny", "auto.gguf", check="none", certify=False)
try:
    pi_gguf.convert("bundled:tiny", "numba.gguf", check="none", certify=False, quantizer="numba")
except OptionError as error:
    print(error, error.hint)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "quantizer numba: numba is not installed pip install 'pi-gguf[fast]'"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["auto.gguf"]


def test_where_nothing_can_be_kept():
    """In a read-only folder of a machine without a home it is compiled each time."""
    code = """
from pi_gguf.write import kquants
assert kquants.gives_ggml_bytes("Q4_K")
assert not kquants._search_lines.stats.cache_path
"""
    nowhere = {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator", "NUMBA_CACHE_DIR": "/proc/none"}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **nowhere}, check=True)


def test_where_the_disk_is_full(tmp_path):
    """It is ggml's work then: what was compiled cannot be kept, and how far that went is not known."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
from pi_gguf.write import kquants
assert not kquants.gives_ggml_bytes("Q4_K")
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}, check=True)


def test_a_name_that_is_none(tmp_path):
    with pytest.raises(OptionError, match="quantizer must be one of auto, ggml, numba, got fast"):
        _convert(tmp_path / "x.gguf", quantizer="fast")
