"""The four operations in plain torch: slow, obviously right. Every kernel is tested against this file.

All four take the same description of the selected entries (see `pattern.py`):

    rows   int32 [R]     active rows of all layers, layer after layer, each in its sorted order
    cols   int32 [C]     active columns, likewise
    tiles  int64 [n, 5]  the worklist: LAYER, ROW0 and COL0 (offsets into rows and cols), ENTRY0, ENTRY1
    local  int16 [k]     position r * tile[1] + c inside the tile, its 16 bits read as unsigned
    tile   (BM, BN)      rows and columns of a tile, BM * BN <= 65536

A worklist may be any subset of the tiles: entries of absent tiles are neither read nor written. What `pack` makes and
every implementation may rely on: tiles ascend in ENTRY0 and do not overlap, so no entry belongs to two of them; inside
a tile the positions of its entries ascend; no matrix element is selected twice, so writes need no atomics.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LAYER, ROW0, COL0, ENTRY0, ENTRY1 = range(5)


def decode(rows: Tensor | None, cols: Tensor | None, tiles: Tensor, local: Tensor, tile: Sequence[int]):
    """Entry numbers, layers, rows and columns (int64, [m] each) of the m entries in the worklist.

    With `rows` (or `cols`) None the operand is already compact: its own coordinate is the tile's.
    """
    lengths = tiles[:, ENTRY1] - tiles[:, ENTRY0]
    owner = torch.repeat_interleave(torch.arange(len(tiles), device=tiles.device), lengths)
    offset = torch.arange(len(owner), device=tiles.device) - (lengths.cumsum(0) - lengths)[owner]
    entry = tiles[owner, ENTRY0] + offset
    position = local[entry].long() & 0xFFFF
    row = tiles[owner, ROW0] + position // tile[1]
    col = tiles[owner, COL0] + position % tile[1]
    if rows is not None:
        row = rows[row].long()
    if cols is not None:
        col = cols[col].long()
    return entry, tiles[owner, LAYER], row, col


def masked_grad_(out, grad_out, input, rows, cols, tiles, local, tile, accumulate):
    """out[s] (+)= sum_t grad_out[t, row(s)] * input[t, col(s)], summed in out's dtype."""
    entry, _, row, col = decode(rows, cols, tiles, local, tile)
    for part in range(0, len(entry), 4096):  # bounds the [T, 4096] temporaries
        s = slice(part, part + 4096)
        dots = (grad_out[:, row[s]].to(out.dtype) * input[:, col[s]].to(out.dtype)).sum(0)
        out[entry[s]] = out[entry[s]] + dots if accumulate else dots


def scatter_delta_(weights, values, rows, cols, tiles, local, tile, mode, alpha):
    """Write values into the weights' selected entries: add, copy or swap (values receive what was there)."""
    entry, layer, row, col = decode(rows, cols, tiles, local, tile)
    for number, weight in enumerate(weights):
        mine = layer == number
        e, at = entry[mine], (row[mine], col[mine])
        if mode == "add":
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight[at] = (weight[at].to(wide) + alpha * values[e].to(wide)).to(weight.dtype)
        elif mode == "copy":
            weight[at] = values[e].to(weight.dtype)
        else:
            old = weight[at].clone()
            weight[at] = values[e]
            values[e] = old


def sparse_adamw_(
    weights, values, grad, exp_avg, exp_avg_sq, base, step, born, rows, cols, tiles, local, tile,
    lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf, seed=None,
):  # fmt: skip
    """AdamW (Loshchilov & Hutter, 2019) on the selected entries; then weights[entry] = values, rounded.

    An entry's age for bias correction is step[layer] - born[entry] (born: the step before its first).

    Without `seed` the values are masters in the precision of the state. With `seed` there are no masters: values have
    the weights' 16 bits, and what the step makes of them is rounded stochastically, to the same in values and weights.
    """
    if found_inf is not None and bool(found_inf):
        return
    e, layer, row, col = decode(rows, cols, tiles, local, tile)
    g, old = grad[e], values[e].to(grad.dtype)
    g = g if grad_scale is None else g * grad_scale.to(g.dtype)
    g = -g if maximize else g
    age = step[layer].double() - (0 if born is None else born[e])
    correction1, correction2 = 1 - beta1**age, 1 - beta2**age
    rate = lr.double()
    target = 0 if base is None else base[e].to(g.dtype)
    w = old - (rate * weight_decay).to(g.dtype) * (old - target)
    m = torch.lerp(exp_avg[e], g, 1 - beta1)
    v = exp_avg_sq[e] * beta2 + (1 - beta2) * g * g
    denominator = v.sqrt() / correction2.sqrt().to(v.dtype) + eps
    w = w - (rate / correction1).to(w.dtype) * m / denominator
    if seed is not None:
        w = round_stochastically(w, values.dtype, random_bits(seed, step[layer], e))
    values[e], exp_avg[e], exp_avg_sq[e] = w, m, v
    for number, weight in enumerate(weights):
        mine = layer == number
        weight[row[mine], col[mine]] = w[mine].to(weight.dtype)


def random_bits(seed: int, step: Tensor, entry: Tensor) -> Tensor:
    """16 random bits (int64) of each entry: a function of seed, step and entry number, so the same on every device.

    The upper bits of output `entry` of a SplitMix64 generator (Steele, Lea & Flood, "Fast splittable pseudorandom
    number generators", 2014) that is seeded with output `step` of the one seeded with `seed`.
    """
    gamma = 0x9E3779B97F4A7C15 - 2**64
    return _shifted(_mix(_mix(seed + step * gamma) + entry * gamma), 48)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shifted(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, count: int) -> Tensor:
    """z >> count of the 64 bits read as unsigned."""
    return (z >> count) & (2 ** (64 - count) - 1)


def round_stochastically(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """fp32 to bf16 or fp16: towards zero, or away from zero if floor(2^16 * the part that is cut off) + random >= 2^16.

    The part is measured in spacings of the result's numbers, `random` holds 16 random bits: x is the expected result
    (up to 2^-16 of a spacing among fp16's subnormals, where the floor cuts). Infinities and NaN become what a cast
    makes of them; the number after the largest is infinity.
    """
    cut = 16 if dtype == torch.bfloat16 else 13  # mantissa bits that the result has no place for
    bits = x.view(torch.int32).long()
    rounded = (((bits + (random >> (16 - cut))) >> cut) << cut).int().view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 its numbers are the multiples of 2^-24
        small = x.abs() < 2.0**-14
        steps = ((torch.where(small, x.abs(), 0) * 2.0**40).long() + random) >> 16
        rounded = torch.where(small, torch.copysign(steps * 2.0**-24, x), rounded)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def select_topk(scores, others, k, score):
    """Sorted int64 positions (in the concatenation of `scores`) of the k largest; ties to the lower position."""
    keys = [s.reshape(-1) for s in scores]
    if score == "product":
        wide = [torch.promote_types(s.dtype, torch.float32) for s in keys]
        keys = [s.to(t) * o.reshape(-1).to(t) for s, o, t in zip(keys, others, wide, strict=True)]
    key = torch.cat(keys).abs()
    return torch.sort(key, descending=True, stable=True).indices[:k].sort().values
