"""The four operations in plain torch: slow, obviously right. Every kernel is tested against this file.

All four take the same description of the selected entries (see `pattern.py`):

    rows   int32 [R]     active rows of all layers, layer after layer, each in its sorted order
    cols   int32 [C]     active columns, likewise
    tiles  int64 [n, 5]  the worklist: LAYER, ROW0 and COL0 (offsets into rows and cols), ENTRY0, ENTRY1
    local  int16 [k]     position r * tile[1] + c inside the tile, its 16 bits read as unsigned
    tile   (BM, BN)      rows and columns of a tile, BM * BN <= 65536

A worklist may be any subset of the tiles: entries of absent tiles are neither read nor written.
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
    lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf,
):  # fmt: skip
    """AdamW (Loshchilov & Hutter, 2019) on the selected entries; then weights[entry] = values, rounded.

    An entry's age for bias correction is step[layer] - born[entry] (born: the step before its first).
    """
    if found_inf is not None and bool(found_inf):
        return
    e, layer, row, col = decode(rows, cols, tiles, local, tile)
    g = grad[e].to(values.dtype)
    g = g if grad_scale is None else g * grad_scale.to(g.dtype)
    g = -g if maximize else g
    age = step[layer].double() - (0 if born is None else born[e])
    correction1, correction2 = 1 - beta1**age, 1 - beta2**age
    rate = lr.double()
    target = 0 if base is None else base[e].to(values.dtype)
    w = values[e] - (rate * weight_decay).to(values.dtype) * (values[e] - target)
    m = torch.lerp(exp_avg[e], g, 1 - beta1)
    v = exp_avg_sq[e] * beta2 + (1 - beta2) * g * g
    denominator = v.sqrt() / correction2.sqrt().to(v.dtype) + eps
    w = w - (rate / correction1).to(w.dtype) * m / denominator
    values[e], exp_avg[e], exp_avg_sq[e] = w, m, v
    for number, weight in enumerate(weights):
        mine = layer == number
        weight[row[mine], col[mine]] = w[mine].to(weight.dtype)


def select_topk(scores, others, k, score):
    """Sorted int64 positions (in the concatenation of `scores`) of the k largest; ties to the lower position."""
    keys = [s.reshape(-1) for s in scores]
    if score == "product":
        wide = [torch.promote_types(s.dtype, torch.float32) for s in keys]
        keys = [s.to(t) * o.reshape(-1).to(t) for s, o, t in zip(keys, others, wide, strict=True)]
    key = torch.cat(keys).abs()
    return torch.sort(key, descending=True, stable=True).indices[:k].sort().values
