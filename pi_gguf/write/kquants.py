"""K-quants and IQ4 by ggml's search, many blocks at a time: one to a SIMD lane, compiled by numba.

In: rows of weights as 32-bit floats, and what each column weighs. Out: the bytes of ggml's `quantize_q2_K`, `q4_K`,
`q5_K`, `q6_K`, `iq4_nl` and `iq4_xs`. A block of 32 weights (16 of Q2_K and Q6_K) is quantized by trying some twenty
scales, for each of which ggml adds up the error weight by weight; no compiler may do that for several weights at once,
as sums of floats depend on their order. Here 64 blocks lie side by side, and each sum has ggml's order. Whether this
machine's ggml was compiled to the same arithmetic is tried once for each type (`gives_ggml_bytes`): a compiler may have
fused multiplications and additions.

Source: ggml's block formats and its search, `ggml-quants.c`; needs the extra `fast`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numba import njit

from pi_gguf.gguf.file import tensor_nbytes
from pi_gguf.llamacpp import quantizer as ggml

KINDS = ("Q2_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
"""Types that are quantized here."""

_LANES = 64
_BLOCK = 256
_GROUP = 32
_TINY = np.float32(1e-15)
_MAGIC = np.float32(12582912)  # 1.5 * 2**23: what is added to it is rounded to a whole number
_ZERO, _ONE = np.float32(0), np.float32(1)

_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
"""What the levels of IQ4 stand for."""

_STEPS = np.diff(_IQ4)
_BETWEEN = (_IQ4[:-1] + _IQ4[1:]) / np.float32(2)
"""Halfway to the next. It is nearer from there on: what ggml compares, two differences, is exact that close."""


F = TypeVar("F", bound=Callable[..., None])
Array: TypeAlias = Any
"""Of float32, where nothing else is said; numba finds the types."""

Value: TypeAlias = Any


def _jit(function: F) -> F:
    how = {"nogil": True, "error_model": "numpy"}  # x / 0 is no exception, but infinite
    try:
        compiled: F = njit(cache=True, **how)(function)
    except RuntimeError:  # there is no folder that what was compiled could be kept in
        compiled = njit(**how)(function)
    return compiled


@cache
def gives_ggml_bytes(kind: str) -> bool:
    """Tell whether ggml on this machine makes the same bytes of 64 rows, weighed by their columns and not."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((64, 2 * _BLOCK), np.float32) * np.exp2(rng.uniform(-12, 2, (64, 1))).astype(np.float32)
    weights = rng.random((rows.shape[1],)).astype(np.float32)
    for importance in (None, weights):
        ours, theirs = (np.empty((len(rows), tensor_nbytes(kind, (rows.shape[1],))), np.uint8) for _ in range(2))
        try:
            quantize_rows(kind, rows, ours, importance)
        except OSError:  # what was compiled could not be kept: the disk is full
            return False
        ggml.quantize_rows(kind, rows, theirs, importance)
        if not np.array_equal(ours, theirs):
            return False
    return True


def quantize_rows(kind: str, rows: np.ndarray, out: np.ndarray, importance: np.ndarray | None = None) -> None:
    """Quantize rows of weights; several threads may do so at once.

    Args:
        kind: one of `KINDS`.
        rows: weights (rows, columns), float32; columns a multiple of 256, of IQ4_NL of 32.
        out: uint8 of the quantized rows' size, written to.
        importance: weight of each column, float32; none when None.
    """
    size = _GROUP if kind == "IQ4_NL" else _BLOCK
    blocks = np.ascontiguousarray(rows).reshape(-1, size)
    columns = np.empty((0, size), np.float32) if importance is None else importance.reshape(-1, size)
    to = out.reshape(len(blocks), -1)
    with np.errstate(all="ignore"):  # blocks of zeros
        if kind == "Q6_K":
            _quantize_q6(blocks, columns, to)
        elif kind == "Q2_K":
            _quantize_q2(blocks, columns, to)
        elif kind in ("Q4_K", "Q5_K"):
            _quantize_q45(kind, blocks, columns, to)
        else:
            _quantize_iq4(blocks, columns, to)


def _quantize_q2(blocks: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    """Quantize blocks (n, 256) to scale and minimum of each 16 weights, in 4 bits of the block's largest each."""
    weighed = len(columns) > 0
    found = np.empty((5, len(blocks), 16), np.float32)
    tried = (-0.9, 0.05, 36) if weighed else (-0.5, 0.1, 15)
    _search_lines(blocks, columns, 3, _ONE, not weighed, _trials(*tried), found.reshape(5, -1))
    (scales, minima), halves = _quantize_scales(found, 15, weighed)
    both = scales | minima << 4
    out[:, :16] = both
    out[:, 80:] = halves.T.copy().view(np.uint8)
    wide = halves.astype(np.float32)[:, :, None] * np.stack([both & 15, both >> 4])
    weights = np.empty(blocks.shape, np.uint8)
    _levels(blocks, np.stack([wide[0], wide[1], found[2], found[3]], 2), 0, 3, weights)
    quarters = weights.reshape(-1, 2, 4, 32) << np.array([[0], [2], [4], [6]], np.uint8)
    out[:, 16:80] = np.bitwise_or.reduce(quarters, 2).reshape(-1, 64)


def _quantize_q45(kind: str, blocks: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    """Quantize blocks (n, 256) to scale and minimum of each 32 weights, in 6 bits of the block's largest each."""
    weighed, top = len(columns) > 0, 15 if kind == "Q4_K" else 31
    tried = (-0.9, 0.05, 36) if weighed else (-1.0, 0.1, 20) if kind == "Q4_K" else (-0.5, 0.1, 15)
    found = np.empty((5, len(blocks), 8), np.float32)
    _search_lines(blocks, columns, top, np.float32(2), False, _trials(*tried), found.reshape(5, -1))
    levels, halves = _quantize_scales(found, 63, weighed)
    if kind == "Q5_K" or not weighed:
        levels = np.minimum(levels, 63)
    out[:, :4] = halves.T.copy().view(np.uint8)
    scales, minima = levels
    out[:, 4:8] = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    out[:, 8:12] = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    out[:, 12:16] = scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4
    wide = halves.astype(np.float32)[:, :, None] * (levels & 63)
    weights = np.empty(blocks.shape, np.uint8)
    _levels(blocks, np.stack([wide[0], wide[1], found[2], found[3]], 2), 0, top, weights)
    pairs = weights.reshape(-1, 4, 2, 32)
    if kind == "Q5_K":  # the fifth bit of each
        out[:, 16:48] = np.bitwise_or.reduce(
            weights.reshape(-1, 8, 32) >> 4 << np.arange(8, dtype=np.uint8)[:, None], 1
        )
    out[:, -128:] = (pairs[:, :, 0] & 15 | pairs[:, :, 1] << 4).reshape(-1, 128)


def _trials(begin: float, step: float, steps: int) -> tuple[np.float32, np.float32, int]:
    return np.float32(begin), np.float32(step), steps


def _quantize_scales(found: np.ndarray, top: int, weighed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Quantize scales and minima to levels, at most `top`, of the largest of a block.

    Args:
        found: what `_search_lines` found, (5, n, groups).

    Returns:
        Levels, uint8 (2, n, groups), and what one of them is, float16 (2, n).
    """
    scale, minimum, _, _, weight = found
    if weighed:
        levels, largest = np.empty((2, *scale.shape), np.uint8), np.empty((2, len(scale)), np.float32)
        for of, values in enumerate((scale, minimum)):
            _quantize_weighed(values, weight, top, levels[of], largest[of])
        return levels, largest.astype(np.float16)
    most = np.maximum(np.stack([scale.max(1), minimum.max(1)]), 0)
    inverses = np.where(most > 0, np.float32(top) / most, _ZERO)
    raw = np.rint(inverses[:, :, None] * np.stack([scale, minimum])).astype(np.int64).astype(np.uint8)
    return raw, (most / np.float32(top)).astype(np.float16)


def _quantize_q6(blocks: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    """Quantize blocks (n, 256) to the scale of each 16 weights, in 8 bits of the block's largest."""
    found = np.empty((2, len(blocks), 16), np.float32)
    _search_q6(blocks, columns, found.reshape(2, -1))
    scale, inverse = found
    largest = np.take_along_axis(scale, np.abs(scale).argmax(1)[:, None], 1)
    empty = np.abs(largest[:, 0]) < _TINY
    over = np.float32(-128) / largest
    half = (_ONE / over).astype(np.float16)
    levels = np.minimum(np.rint(over * scale), 127).astype(np.int8)
    half[empty], levels[empty], inverse[empty] = 0, 0, 0
    out[:, 192:208] = levels.view(np.uint8)
    out[:, 208:] = half.view(np.uint8)
    nothing = np.zeros_like(scale)
    weights = np.empty(blocks.shape, np.uint8)
    _levels(blocks, np.stack([half.astype(np.float32) * levels, nothing, inverse, nothing], 2), -32, 31, weights)
    quarters = weights.reshape(-1, 2, 4, 32)
    low, high = quarters & 15, quarters >> 4 << np.array([[0], [2], [4], [6]], np.uint8)
    out[:, :128] = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    out[:, 128:192] = np.bitwise_or.reduce(high, 2).reshape(-1, 64)


def _quantize_iq4(blocks: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    """Quantize blocks to the scale of each 32 weights: IQ4_NL's (n, 32) to 16 bits, IQ4_XS's (n, 256) to 6 bits of the
    block's largest."""
    scale = np.empty((len(blocks), blocks.shape[1] // _GROUP), np.float32)
    _search_table(blocks, columns, scale.reshape(-1))
    if scale.shape[1] == 1:
        out[:, :2] = scale.astype(np.float16).view(np.uint8)
    else:
        largest = np.take_along_axis(scale, np.abs(scale).argmax(1)[:, None], 1)
        unit = -largest / np.float32(32)
        out[:, :2] = unit.astype(np.float16).view(np.uint8)
        levels = np.clip(np.rint(np.where(unit != 0, _ONE / unit, _ZERO) * scale), -32, 31)
        scale = unit * levels
        high, low = np.divmod(levels.astype(np.int64) + 32, 16)
        out[:, 2:4] = np.bitwise_or.reduce(high << np.arange(0, 16, 2), 1).astype(np.uint16)[:, None].view(np.uint8)
        out[:, 4:8] = low[:, ::2] | low[:, 1::2] << 4
    weights = np.empty(blocks.shape, np.uint8)
    _nearest(blocks, np.where(scale != 0, _ONE / scale, _ZERO), weights)
    halves = weights.reshape(len(blocks), -1, 2, 16)
    out[:, -halves[0, :, 0].size :] = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(blocks), -1)


@_jit
def _transpose(blocks: Array, first: int, each: int, x: Array) -> None:
    """Lay groups of `each` weights side by side in x (each, lanes), from a block on; the last one is repeated."""
    groups = blocks.shape[1] // each
    for lane in range(_LANES):
        block, group = min(first + lane // groups, len(blocks) - 1), lane % groups
        for i in range(each):
            x[i, lane] = blocks[block, group * each + i]


@_jit
def _weigh(blocks: Array, columns: Array, first: int, share: Value, x: Array, w: Array) -> None:
    """Weigh x (each, lanes), from a block on, by its columns and its size beside `share` of the block's mean square."""
    each, size = len(x), blocks.shape[1]
    groups = size // each
    for lane in range(_LANES):
        block, group = min(first + lane // groups, len(blocks) - 1), lane % groups
        if group == 0:
            squares = _ZERO
            for value in blocks[block]:
                squares += value * value
            mean = share * squares / np.float32(size)
        for i in range(each):
            w[i, lane] = columns[block % len(columns), group * each + i] * np.sqrt(mean + x[i, lane] * x[i, lane])


@_jit
def _search_lines(
    blocks: Array, columns: Array, top: int, share: Value, mad: bool, trials: tuple[Value, Value, int], found: Array
) -> None:
    """Find scale and minimum of each group of weights of blocks (n, 256), for levels 0 to `top`.

    Args:
        share: of the block's mean square, that weights are weighed by beside their own, where columns weigh.
        mad: whether errors count by their size instead of its square, and weights by their own alone.
        trials: the first number of levels that is tried is the first of these more than `top`, each next one the second
            more, as often as the third says.
        found: by group, row by row: scale, minimum (positive), the scale's inverse that gave it with the least weight
            (for blocks whose scale is rounded to nothing), and the sum of what the weights weigh.
    """
    each = blocks.size // found.shape[1]
    groups = blocks.shape[1] // each
    x, w = np.empty((each, _LANES), np.float32), np.empty((each, _LANES), np.float32)
    levels, lanes = np.empty((each, _LANES), np.float32), np.empty((16, _LANES), np.float32)
    mean = np.empty(_LANES, np.float32)
    for first in range(0, len(blocks), _LANES // groups):
        _transpose(blocks, first, each, x)
        if len(columns):
            _weigh(blocks, columns, first, share, x, w)
        else:
            mean[:] = _ZERO
            if not mad:
                for i in range(each):
                    for v in range(_LANES):
                        mean[v] += x[i, v] * x[i, v]
                for v in range(_LANES):
                    mean[v] = np.sqrt(mean[v] / np.float32(each))
            for i in range(each):
                for v in range(_LANES):
                    w[i, v] = mean[v] + abs(x[i, v])
        _try_scales(x, w, levels, lanes, np.float32(top), mad, trials)
        for v in range(min(_LANES, (len(blocks) - first) * groups)):
            for of in range(5):
                found[of, first * groups + v] = lanes[of, v]


@_jit
def _try_scales(
    x: Array, w: Array, levels: Array, lanes: Array, top: Value, mad: bool, trials: tuple[Value, Value, int]
) -> None:
    """Find scale and minimum of each lane of x (each, lanes), the error of each weight weighed by w.

    Row by row, lanes get: scale, minimum (positive), the inverse and the least weight that gave the levels, sum of w;
    and for the search sum of weighed x, the best minimum so far, its error, the largest weight.
    """
    scale, minimum, inverse, least, sum_w = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    sum_x, low, best, high = lanes[5], lanes[6], lanes[7], lanes[8]
    for v in range(_LANES):
        low[v] = high[v] = x[0, v]
        sum_w[v], sum_x[v] = w[0, v], w[0, v] * x[0, v]
    for i in range(1, len(x)):
        for v in range(_LANES):
            low[v], high[v] = min(low[v], x[i, v]), max(high[v], x[i, v])
            sum_w[v] += w[i, v]
            sum_x[v] += w[i, v] * x[i, v]
    flat = np.empty(_LANES, np.bool_)
    for v in range(_LANES):
        low[v] = min(low[v], _ZERO)
        flat[v] = high[v] == low[v]
        inverse[v], least[v] = top / (high[v] - low[v]), low[v]
        scale[v], best[v] = _ONE / inverse[v], _ZERO
    for i in range(len(x)):
        for v in range(_LANES):
            level = min(top, max(_ZERO, np.rint(inverse[v] * (x[i, v] - low[v]))))
            off = scale[v] * level + low[v] - x[i, v]
            best[v] += w[i, v] * (abs(off) if mad else off * off)
    begin, step, steps = trials
    for trial in range(steps + 1):
        _try_scale(x, w, levels, lanes, top, mad, begin + step * np.float32(trial) + top)
    for v in range(_LANES):
        inverse[v] = _ZERO if flat[v] else inverse[v]  # it is infinite, and the scale nothing
        minimum[v] = -low[v]


@_jit
def _try_scale(x: Array, w: Array, levels: Array, lanes: Array, top: Value, mad: bool, wanted: Value) -> None:
    """Round each lane from its minimum so far to `wanted` levels, fit a line to that, and keep it if it is better."""
    scale, inverse, least, sum_w = lanes[0], lanes[2], lanes[3], lanes[4]
    sum_x, low, best, high = lanes[5], lanes[6], lanes[7], lanes[8]
    over, sum_l, sum_l2, sum_xl, slope, base, error = (
        lanes[9], lanes[10], lanes[11], lanes[12], lanes[13], lanes[14], lanes[15],
    )  # fmt: skip
    for v in range(_LANES):
        over[v] = wanted / (high[v] - low[v])
        sum_l[v] = sum_l2[v] = sum_xl[v] = error[v] = _ZERO
    for i in range(len(x)):
        for v in range(_LANES):
            level = min(top, max(_ZERO, np.rint(over[v] * (x[i, v] - low[v]))))
            levels[i, v] = level
            weighed = w[i, v] * level
            sum_l[v] += weighed
            sum_l2[v] += weighed * level
            sum_xl[v] += weighed * x[i, v]
    for v in range(_LANES):
        spread = sum_w[v] * sum_l2[v] - sum_l[v] * sum_l[v]
        fitted = (sum_l2[v] * sum_x[v] - sum_l[v] * sum_xl[v]) / spread
        both = (sum_w[v] * sum_xl[v] - sum_x[v] * sum_l[v]) / spread
        alone = sum_xl[v] / sum_l2[v]
        slope[v] = alone if fitted > _ZERO else both
        base[v] = _ZERO if fitted > _ZERO else fitted
        sum_l[v] = spread
    for i in range(len(x)):
        for v in range(_LANES):
            off = slope[v] * levels[i, v] + base[v] - x[i, v]
            error[v] += w[i, v] * (abs(off) if mad else off * off)
    for v in range(_LANES):
        better = (sum_l[v] > _ZERO) & (error[v] < best[v])
        best[v] = error[v] if better else best[v]
        scale[v] = slope[v] if better else scale[v]
        least[v] = low[v] if better else least[v]
        low[v] = base[v] if better else low[v]
        inverse[v] = over[v] if better else inverse[v]


@_jit
def _search_q6(blocks: Array, columns: Array, found: Array) -> None:
    x, w = np.empty((16, _LANES), np.float32), np.empty((16, _LANES), np.float32)
    lanes = np.empty((8, _LANES), np.float32)
    for first in range(0, len(blocks), _LANES // 16):
        _transpose(blocks, first, 16, x)
        if len(columns):
            for lane in range(_LANES):
                block = min(first + lane // 16, len(blocks) - 1)
                for i in range(16):
                    w[i, lane] = columns[block % len(columns), lane % 16 * 16 + i]
        else:
            for i in range(16):
                for v in range(_LANES):
                    w[i, v] = x[i, v] * x[i, v]
        _try_symmetric(x, w, lanes)
        for v in range(min(_LANES, (len(blocks) - first) * 16)):
            for of in range(2):
                found[of, first * 16 + v] = lanes[of, v]


@_jit
def _try_symmetric(x: Array, w: Array, lanes: Array) -> None:
    """Find the scale of each lane of x (16, lanes), from levels -32 to 31; lanes get scale and inverse."""
    scale, inverse, largest, size, best, over, sum_lx, sum_l2 = (
        lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5], lanes[6], lanes[7],
    )  # fmt: skip
    low, high = np.float32(-32), np.float32(31)
    largest[:] = _ZERO
    size[:] = _ZERO
    for i in range(16):
        for v in range(_LANES):
            larger = abs(x[i, v]) > size[v]
            size[v] = abs(x[i, v]) if larger else size[v]
            largest[v] = x[i, v] if larger else largest[v]
    for trial in range(-10, 10):
        if trial == 0:
            continue
        wanted = np.float32(32) if trial == -10 else np.float32(32) + np.float32(0.1) * np.float32(trial)
        for v in range(_LANES):
            over[v] = -wanted / largest[v]
        for v in range(_LANES):
            lx, l2 = _ZERO, _ZERO
            for i in range(16):
                level = min(high, max(low, np.rint(over[v] * x[i, v])))
                lx += w[i, v] * x[i, v] * level
                l2 += w[i, v] * level * level
            sum_lx[v], sum_l2[v] = lx, l2
        for v in range(_LANES):
            fitted = sum_lx[v] / sum_l2[v] if sum_l2[v] != _ZERO else _ZERO
            better = (sum_l2[v] > _ZERO) & (sum_lx[v] * sum_lx[v] > best[v] * sum_l2[v])
            better = better if trial > -10 else True
            scale[v] = fitted if better else scale[v]
            best[v] = fitted * sum_lx[v] if better else best[v]
            inverse[v] = over[v] if better else inverse[v]
    for v in range(_LANES):
        empty = size[v] < _TINY
        scale[v] = _ZERO if empty else scale[v]
        inverse[v] = _ZERO if empty else inverse[v]


@_jit
def _quantize_weighed(values: Array, weights: Array, top: Value, levels: Array, largest: Array) -> None:
    """Quantize each row of values (n, groups), scales or minima, to 0 to `top` of one scale; `make_qp_quants`."""
    for row in range(len(values)):
        x, w, out = values[row], weights[row], levels[row]
        most = _ZERO
        for value in x:
            most = max(most, value)
        if most < _TINY:
            out[:] = 0
            largest[row] = _ZERO
            continue
        inverse, best = np.float32(top) / most, _ZERO
        for trial in range(-5, 5):  # the first is the plain one
            if trial == 0:
                continue
            tried = inverse if trial == -5 else (np.float32(0.1) * np.float32(trial) + np.float32(top)) / most
            scale, error = _ONE / tried, _ZERO
            for i in range(len(x)):
                level = np.rint(tried * x[i])
                level = np.float32(np.uint8(np.int32(level))) if trial == -5 else min(np.float32(top), level)
                off = x[i] - scale * level
                error += w[i] * off * off
            if trial == -5 or error < best:
                best = error
                chosen = tried
        sum_lx, sum_l2 = _ZERO, _ZERO
        for i in range(len(x)):
            level = min(top, np.int32(np.rint(chosen * x[i])))
            out[i] = np.uint8(level)
            sum_lx += w[i] * x[i] * np.float32(level)
            sum_l2 += w[i] * np.float32(level) * np.float32(level)
        for _ in range(5):
            changed = False
            for i in range(len(x)):
                old = np.float32(out[i])
                lx, l2 = sum_lx - w[i] * x[i] * old, sum_l2 - w[i] * old * old
                if lx > _ZERO and l2 > _ZERO:
                    level = min(top, np.int32(np.rint(x[i] * l2 / lx)))
                    if level != out[i]:
                        new = np.float32(level)
                        lx += w[i] * x[i] * new
                        l2 += w[i] * new * new
                        if lx * lx * sum_l2 > sum_lx * sum_lx * l2:
                            out[i] = np.uint8(level)
                            sum_lx, sum_l2, changed = lx, l2, True
            if not changed:
                break
        largest[row] = sum_lx / sum_l2 if sum_l2 > _ZERO else _ZERO


@_jit
def _search_table(blocks: Array, columns: Array, found: Array) -> None:
    """Find the scale of each 32 weights, from the levels of IQ4."""
    x, w = np.empty((_GROUP, _LANES), np.float32), np.empty((_GROUP, _LANES), np.float32)
    lanes = np.empty((6, _LANES), np.float32)
    groups = blocks.shape[1] // _GROUP
    for first in range(0, len(blocks), _LANES // groups):
        _transpose(blocks, first, _GROUP, x)
        if len(columns):
            _weigh(blocks, columns, first, np.float32(2), x, w)
        else:
            for i in range(_GROUP):
                for v in range(_LANES):
                    w[i, v] = x[i, v] * x[i, v]
        _try_table(x, w, lanes)
        for v in range(min(_LANES, (len(blocks) - first) * groups)):
            found[first * groups + v] = lanes[0, v]


@_jit
def _value(at: Value) -> Value:
    """Return what the level of IQ4 that is nearest stands for."""
    value = _IQ4[0]
    for k in range(15):
        value += _ZERO if at < _BETWEEN[k] else _STEPS[k]
    return value


@_jit
def _try_table(x: Array, w: Array, lanes: Array) -> None:
    """Find the scale of each lane of x (32, lanes); lanes get it first."""
    scale, largest, best, over, sum_qx, sum_q2 = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5]
    largest[:] = _ZERO
    for i in range(_GROUP):
        for v in range(_LANES):
            largest[v] = x[i, v] if abs(x[i, v]) > abs(largest[v]) else largest[v]
    for trial in range(-8, 8):  # the first is the plain one
        for v in range(_LANES):
            plain = _ONE / (-largest[v] / _IQ4[0])
            over[v] = plain if trial == -8 else (np.float32(trial) + _IQ4[0]) / largest[v]
            sum_qx[v] = sum_q2[v] = _ZERO
        for i in range(_GROUP):
            for v in range(_LANES):
                value = _value(over[v] * x[i, v])
                sum_qx[v] += w[i, v] * value * x[i, v]
                sum_q2[v] += w[i, v] * value * value
        for v in range(_LANES):
            fitted = sum_qx[v] / sum_q2[v] if sum_q2[v] > _ZERO else _ZERO
            better = (sum_q2[v] > _ZERO) & (sum_qx[v] * sum_qx[v] > best[v] * sum_q2[v])
            better = better if trial > -8 else True
            scale[v] = fitted if better else scale[v]
            best[v] = fitted * sum_qx[v] if better else best[v]
    for v in range(_LANES):
        scale[v] = _ZERO if abs(largest[v]) < _TINY else scale[v]


@_jit
def _nearest(blocks: Array, inverses: Array, out: Array) -> None:
    """Round the weights of blocks, by the inverse of the scale of each 32, to levels of IQ4."""
    at, level = np.empty(_GROUP, np.float32), np.empty(_GROUP, np.uint8)
    for block in range(len(blocks)):
        for group in range(inverses.shape[1]):
            for i in range(_GROUP):
                at[i], level[i] = inverses[block, group] * blocks[block, group * _GROUP + i], 0
            for k in range(15):
                for i in range(_GROUP):
                    level[i] += 0 if at[i] < _BETWEEN[k] else 1
            out[block, group * _GROUP : group * _GROUP + _GROUP] = level


@_jit
def _levels(blocks: Array, lines: Array, low: Value, high: Value, out: Array) -> None:
    """Round the weights of blocks (n, 256) to levels, 0 standing for `low`.

    Args:
        lines: by block and group of weights (n, groups, 4): scale and minimum as they are written, and the inverse and
            least weight that the search ended with, which count where the scale was rounded to nothing.
        out: uint8 (n, 256).
    """
    each = _BLOCK // lines.shape[1]
    rounded = np.empty(each, np.float32)
    whole = rounded.view(np.int32)
    for block in range(len(blocks)):
        for group in range(lines.shape[1]):
            x = blocks[block, group * each : group * each + each]
            to = out[block, group * each : group * each + each]
            line = lines[block, group]
            scale, minimum, inverse, least = line[0], line[1], line[2], line[3]
            if scale != _ZERO:
                for i in range(each):
                    rounded[i] = (x[i] + minimum) / scale + _MAGIC
                for i in range(each):
                    to[i] = max(low, min(high, (whole[i] & 0x7FFFFF) - 0x400000)) - low
            elif inverse != _ZERO:
                for i in range(each):
                    to[i] = max(low, min(high, np.int32(np.rint(inverse * (x[i] - least))))) - low
            else:
                to[:] = 0
