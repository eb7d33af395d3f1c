"""masked_grad: the gradient of the selected entries only, on tensor cores. The dense gradient never exists in memory.

A tile's 64 rows and 64 columns lie anywhere in the operands, and reading single 2-byte elements would waste 15/16 of
every memory sector and leave the tensor cores idle. So each operand is first copied to its active columns (once per
call, [T, active]; the layers of one worklist side by side), and the tiles are plain dense products of the copies:

    programs walk the worklist -> one tile's product in registers -> its entries picked out -> added in place

Every entry has one owner and a fixed order of summation: results are the same bits on every run, without atomics.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft.kernels.launch import Remembered, architecture, on, processors
from sparseft.reference import COL0, LAYER, ROW0

ALIGNMENT = 16  # elements; where a layer's columns start in a compact copy


@triton.jit
def _compact(source, order, copy, tokens, width, stride_source, stride_token, stride_column,
             columns, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """copy[t, c] = source[t, order[c]]; columns that the source does not have are another layer's: left alone."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    column = tl.load(order + c, mask=c < width, other=columns)
    mask = (t < tokens)[:, None] & (column < columns)[None, :]
    picked = tl.load(source + t[:, None] * stride_source + column[None, :], mask=mask)
    tl.store(copy + t[:, None] * stride_token + c.to(tl.int64)[None, :] * stride_column, picked, mask=mask)


@triton.jit
def _tiles(
    out, squares, a, b, tiles, local, shifts, count, tokens, width_a, width_b, stride_a, stride_b,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, SHIFT_A: tl.constexpr, SHIFT_B: tl.constexpr, ALIGN_A: tl.constexpr, ALIGN_B: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[e] (+)= sum_t a[t, row(e)] * b[t, col(e)] over the tiles of a worklist; squares[i] = tile i's sum of out^2."""
    wide: tl.constexpr = out.dtype.element_ty
    for number in range(tl.program_id(0), count, tl.num_programs(0)):
        tile = tiles + 5 * number
        layer = tl.load(tile)
        row0 = tl.load(tile + 1)
        col0 = tl.load(tile + 2)
        if SHIFT_A:
            row0 += tl.load(shifts + 2 * layer)
        if SHIFT_B:
            col0 += tl.load(shifts + 2 * layer + 1)
        row0 = tl.multiple_of(row0.to(tl.int32), ALIGN_A)
        col0 = tl.multiple_of(col0.to(tl.int32), ALIGN_B)
        entry0 = tl.load(tile + 3)
        entry1 = tl.load(tile + 4)
        total = tl.zeros((BLOCK_E,), wide)
        for m0 in tl.static_range(0, TILE_M, BLOCK_M):  # one block, unless the tile is larger than a program can hold
            for n0 in range(0, TILE_N, BLOCK_N):
                acc = _product(a, b, row0 + m0, col0 + n0, tokens, width_a, width_b, stride_a, stride_b,
                               BLOCK_M, BLOCK_N, BLOCK_T, wide, PRECISION)  # fmt: skip
                flat = tl.reshape(acc, (BLOCK_M * BLOCK_N,))
                for start in range(entry0, entry1, BLOCK_E):
                    entry = start + tl.arange(0, BLOCK_E)
                    mask = entry < entry1
                    position = tl.load(local + entry, mask=mask, other=0).to(tl.int32) & 0xFFFF
                    m = position // TILE_N - m0
                    n = position % TILE_N - n0
                    mask &= (m >= 0) & (m < BLOCK_M) & (n >= 0) & (n < BLOCK_N)
                    value = tl.gather(flat, tl.where(mask, m * BLOCK_N + n, 0), 0)
                    if ACCUMULATE:
                        value += tl.load(out + entry, mask=mask, other=0.0)
                    tl.store(out + entry, value, mask=mask)
                    if squares is not None:
                        total += tl.where(mask, value * value, 0.0)
        if squares is not None:
            tl.store(squares + number, tl.sum(total, 0))


@triton.jit
def _product(a, b, row0, col0, tokens, width_a, width_b, stride_a, stride_b, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """sum_t a[t, row0 + m] * b[t, col0 + n], [BLOCK_M, BLOCK_N]."""
    t = tl.arange(0, BLOCK_T)
    m = row0 + tl.arange(0, BLOCK_M)
    n = col0 + tl.arange(0, BLOCK_N)
    stride_a = tl.cast(stride_a, tl.int64)
    stride_b = tl.cast(stride_b, tl.int64)
    at_a = a + t[:, None] * stride_a + m[None, :]  # [BLOCK_T, BLOCK_M]
    at_b = b + t[:, None] * stride_b + n[None, :]  # [BLOCK_T, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    for t0 in range(0, tokens, BLOCK_T):
        there = (t < tokens - t0)[:, None]
        x = tl.load(at_a, mask=there & (m < width_a)[None, :], other=0.0)
        y = tl.load(at_b, mask=there & (n < width_b)[None, :], other=0.0)
        acc = tl.dot(tl.trans(x), y, acc, input_precision=PRECISION, out_dtype=WIDE)
        at_a += BLOCK_T * stride_a
        at_b += BLOCK_T * stride_b
    return acc


class Span(NamedTuple):
    """Where one layer's active rows and columns lie in the layout, and where their copies start."""

    layer: int
    rows: tuple[int, int]
    cols: tuple[int, int]
    row_start: int
    col_start: int


class Plan(NamedTuple):
    """What a worklist says about its operands; known to the host."""

    spans: list[Span]
    width_a: int  # of the compact copies, all layers
    width_b: int
    shifts: Tensor  # int64 [layers, 2] on the device: from ROW0 and COL0 to the place in the copies
    align: dict[bool, tuple[int, int]]  # what ROW0 and COL0 are multiples of, in compact copies (True) or as they are


def _plan(tiles: Tensor, tile: tuple[int, int]) -> Plan:
    table = tiles.cpu()
    spans, width_a, width_b = [], 0, 0
    shifts = torch.zeros(int(table[:, LAYER].max()) + 1, 2, dtype=torch.int64)
    for layer in table[:, LAYER].unique().tolist():
        mine = table[table[:, LAYER] == layer]
        rows = int(mine[:, ROW0].min()), int(mine[:, ROW0].max()) + tile[0]
        cols = int(mine[:, COL0].min()), int(mine[:, COL0].max()) + tile[1]
        spans.append(Span(layer, rows, cols, width_a, width_b))
        shifts[layer] = torch.tensor([width_a - rows[0], width_b - cols[0]])
        width_a += triton.cdiv(rows[1] - rows[0], ALIGNMENT) * ALIGNMENT
        width_b += triton.cdiv(cols[1] - cols[0], ALIGNMENT) * ALIGNMENT
    raw = table[:, [ROW0, COL0]]
    align = {moved: tuple(_hint(start) for start in at.T) for moved, at in ((False, raw), (True, raw + shifts[table[:, LAYER]]))}
    return Plan(spans, width_a, width_b, shifts.to(tiles.device), align)


def _hint(starts: Tensor) -> int:
    return ALIGNMENT if bool((starts % ALIGNMENT == 0).all()) else 1


_plans = Remembered(_plan)


def masked_grad_(out, grad_out, input, rows, cols, tiles, local, tile, accumulate, squares=None):
    """See `reference.masked_grad_`.

    Args:
        grad_out: [T, N]; or one [T, N_i] per layer of the layout, for layers that share `input` (q, k, v).
        squares: optional, out's dtype [n]: receives each tile's sum of squares of its entries in `out`.
    """
    if tiles.shape[0] == 0:
        return
    grad_outs = grad_out if isinstance(grad_out, (list, tuple)) else None
    with on(out.device):
        plan = _plans(tiles, tuple(tile))
        pieces = [(grad_outs[s.layer] if grad_outs else grad_out, s.rows, s.row_start) for s in plan.spans]
        a = grad_out if rows is None else _copy(pieces, rows, plan.width_a)
        pieces = [(input, s.cols, s.col_start) for s in plan.spans]
        b = input if cols is None else _copy(pieces, cols, plan.width_b)
        config = configuration(architecture(out.device), a.dtype, tile)
        programs = min(tiles.shape[0], 4 * processors(out.device))
        _tiles[(programs,)](
            out, squares, a, b, tiles, local, plan.shifts, tiles.shape[0], a.shape[0], a.shape[1], b.shape[1],
            a.stride(0), b.stride(0), TILE_M=tile[0], TILE_N=tile[1],
            SHIFT_A=rows is not None, SHIFT_B=cols is not None,
            ALIGN_A=plan.align[rows is not None][0], ALIGN_B=plan.align[cols is not None][1],
            ACCUMULATE=accumulate, PRECISION=precision(), **config,
        )  # fmt: skip


def _copy(pieces: list[tuple[Tensor, tuple[int, int], int]], order: Tensor, width: int) -> Tensor:
    """[T, width]: of each source the columns order[first:last], from column `start` on."""
    tokens = pieces[0][0].shape[0]
    copy = pieces[0][0].new_empty(tokens, width)
    for source, (first, last), start in pieces:
        part, place = order[first:last], copy[:, start:]
        grid = triton.cdiv(tokens, 32), triton.cdiv(len(part), 128)
        if tokens and len(part):
            _compact[grid](source, part, place, tokens, len(part), source.stride(0), *place.stride(), source.shape[1],
                           BLOCK_T=32, BLOCK_C=128)  # fmt: skip
    return copy


def configuration(arch: int, dtype: torch.dtype, tile: tuple[int, int]) -> dict:
    """Block sizes, warps and pipeline depth for a tile shape on an architecture (80, 90, ...; 0: interpreter)."""
    m, n = (min(max(triton.next_power_of_2(size), 16), 128) for size in tile)
    tokens = 128 // dtype.itemsize
    stage = (m + n) * tokens * dtype.itemsize
    depth = 4 if arch in (90, 100) else 3
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_T": tokens,
        "BLOCK_E": min(1024, m * n),
        "num_warps": min(8, max(1, m * n // 1024)),
        "num_stages": max(2, min(depth, 96 * 1024 // stage)),  # 96 KiB: what the smallest architecture has
    }


def precision() -> str:
    """How fp32 operands are multiplied: three TF32 products keep fp32's accuracy; one, where torch is told so."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
