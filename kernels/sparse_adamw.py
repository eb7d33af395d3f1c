"""sparse_adamw: one AdamW step over the selected entries of all layers, with the write into their weights: one launch.

Learning rate, step counts, gradient scale and the overflow flag are read from device memory: the launch can be
captured in a CUDA graph and replayed.
"""

import math

import triton
import triton.language as tl
from sparseft.kernels.entries import CHUNK, address_table, locate, plan
from sparseft.kernels.launch import on


@triton.jit
def _one_minus_power(log_beta, age):
    """1 - beta**age. In fp32 the difference would cancel for young entries: there, the series of expm1."""
    y = age * log_beta
    if age.dtype == tl.float64:
        return 1 - tl.exp(y)
    series = 1 + y * (1 / 7)
    for n in tl.static_range(6, 1, -1):
        series = 1 + y * (1 / n) * series
    return tl.where(y > -0.5, -y * series, 1 - tl.exp(y))


@triton.jit
def _divide(x, y):
    """x / y to nearest: Triton's `/` is it in fp64 only."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _root(x):
    """The square root to nearest; in fp32 `tl.sqrt` takes subnormal numbers for zero."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _random_word(seed, number):
    """Output `number` of the SplitMix64 generator seeded with `seed`, uint64; see `reference.random_bits`."""
    z = seed + number.to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _round_stochastically(x, random, dtype: tl.constexpr):
    """fp32 to bf16 or fp16 with 16 random bits (int32); see `reference.round_stochastically`."""
    bits = x.to(tl.int32, bitcast=True)
    cut: tl.constexpr = 16 if dtype == tl.bfloat16 else 13
    rounded = (((bits + (random >> (16 - cut))) >> cut) << cut).to(tl.float32, bitcast=True)
    if dtype == tl.float16:
        size = tl.abs(x)
        small = size < 2.0**-14
        steps = ((tl.where(small, size, 0.0) * 2.0**40).to(tl.int32) + random) >> 16
        least = (steps.to(tl.float32) * 2.0**-24).to(tl.int32, bitcast=True) | ((bits >> 31) << 31)
        rounded = tl.where(small, least.to(tl.float32, bitcast=True), rounded)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, x).to(dtype)


@triton.jit(do_not_specialize=["reach", "seed"])
def _adamw(
    weight, values, grad, exp_avg, exp_avg_sq, base, step, born, table, rows, cols, tiles, spans, reach, local,
    count, lr, beta1: tl.float64, beta2: tl.float64, log_beta1: tl.float64, log_beta2: tl.float64, eps: tl.float64,
    weight_decay: tl.float64, grad_scale, found_inf, seed,
    STOCHASTIC: tl.constexpr, MAXIMIZE: tl.constexpr, TILE_COLS: tl.constexpr, COMPLETE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    state: tl.constexpr = exp_avg.dtype.element_ty
    chunk = tl.program_id(0)
    entry = chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    within = entry < count
    position = tl.load(local + entry, mask=within, other=0).to(tl.int32) & 0xFFFF
    layer, offset, held = locate(entry, position, chunk, tiles, spans, reach, table, rows, cols, TILE_COLS)
    mask = within if COMPLETE else held

    now = tl.load(step + layer, mask=mask, other=1)
    age = now
    if born is not None:
        age -= tl.load(born + entry, mask=mask, other=0)
    correction1 = _one_minus_power(tl.cast(log_beta1, state), age.to(state))
    correction2 = _one_minus_power(tl.cast(log_beta2, state), age.to(state))

    g = tl.load(grad + entry, mask=mask, other=0.0)
    if grad_scale is not None:
        g *= tl.load(grad_scale).to(state)
    if MAXIMIZE:
        g = -g
    m = tl.load(exp_avg + entry, mask=mask, other=0.0)
    m += tl.cast(1 - beta1, state) * (g - m)
    v = tl.load(exp_avg_sq + entry, mask=mask, other=0.0)
    v = v * tl.cast(beta2, state) + tl.cast(1 - beta2, state) * g * g

    rate = tl.load(lr).to(tl.float64)
    w = tl.load(values + entry, mask=mask, other=0.0).to(state)
    pull = w if base is None else w - tl.load(base + entry, mask=mask, other=0.0).to(state)
    w -= (rate * weight_decay).to(state) * pull
    denominator = _divide(_root(v), _root(correction2)) + tl.cast(eps, state)
    w -= _divide(_divide(rate.to(state), correction1) * m, denominator)

    if STOCHASTIC:
        word = _random_word(_random_word(tl.cast(seed, tl.uint64), now), entry)
        w = _round_stochastically(w, (word >> 48).to(tl.int32), values.dtype.element_ty)
    tl.store(values + entry, w, mask=mask)
    tl.store(exp_avg + entry, m, mask=mask)
    tl.store(exp_avg_sq + entry, v, mask=mask)
    tl.store(weight + offset, w.to(weight.dtype.element_ty), mask=mask)


def sparse_adamw_(
    weights, values, grad, exp_avg, exp_avg_sq, base, step, born, rows, cols, tiles, local, tile,
    lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf, seed=None,
):  # fmt: skip
    """See `reference.sparse_adamw_`. An `lr` in host memory is copied to the device, which a graph would freeze."""
    count = local.shape[0]
    if count == 0 or tiles.shape[0] == 0:
        return
    with on(weights[0]):
        ordered, spans, reach, complete = plan(tiles, count)
        _adamw[(spans.shape[0],)](
            weights[0], values, grad, exp_avg, exp_avg_sq, base, step, born, address_table(weights), rows, cols,
            ordered, spans, reach, local, count, lr.to(local.device), beta1, beta2, _log(beta1), _log(beta2), eps,
            weight_decay, grad_scale, found_inf, seed or 0,
            STOCHASTIC=seed is not None, MAXIMIZE=maximize, TILE_COLS=tile[1], COMPLETE=complete, CHUNK=CHUNK,
            num_warps=8,  # four entries a thread: with eight, registers are spilled
        )  # fmt: skip


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf
