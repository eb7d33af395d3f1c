"""masked_grad where tiles hold few entries: only the columns that have an entry are multiplied.

The rows are cut into panels of 16. The columns with an entry in a panel, 64 at a time, form a chunk: their tokens are
gathered as rows of input^T and multiplied with the panel's 16 columns of grad_out. The gathered side is the larger
one, as tensor cores want it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from sparseft.kernels.launch import Remembered
from torch import Tensor

from sparseft.reference import decode

PANEL = 16  # rows
CHUNK = 64  # columns


@triton.jit
def _panels(
    out, a, b, work, columns, local, entries, count, tokens, width_a, stride_a, stride_b,
    PANEL: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[entries[i]] (+)= sum_t b[column(i), t] * a[t, row(i)], the entries i in the order of the chunks."""
    wide: tl.constexpr = out.dtype.element_ty
    stride_a = tl.cast(stride_a, tl.int64)
    stride_b = tl.cast(stride_b, tl.int64)
    t = tl.arange(0, BLOCK_T)
    for number in range(tl.program_id(0), count, tl.num_programs(0)):
        row = tl.multiple_of(tl.load(work + 3 * number), PANEL) + tl.arange(0, PANEL)
        column = tl.load(columns + number * CHUNK + tl.arange(0, CHUNK))
        at_a = a + t[:, None] * stride_a + row[None, :]  # [BLOCK_T, PANEL]
        at_b = b + column[:, None] * stride_b + t[None, :]  # [CHUNK, BLOCK_T]
        acc = tl.zeros((CHUNK, PANEL), wide)
        for t0 in range(0, tokens, BLOCK_T):
            there = t < tokens - t0
            x = tl.load(at_b, mask=there[None, :], other=0.0)
            y = tl.load(at_a, mask=there[:, None] & (row < width_a)[None, :], other=0.0)
            acc = tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=wide)
            at_a += BLOCK_T * stride_a
            at_b += BLOCK_T
        flat = tl.reshape(acc, (CHUNK * PANEL,))
        end = tl.load(work + 3 * number + 2)
        for start in range(tl.load(work + 3 * number + 1), end, BLOCK_E):
            i = start + tl.arange(0, BLOCK_E)
            mask = i < end
            place = out + tl.load(entries + i, mask=mask, other=0)
            value = tl.gather(flat, tl.load(local + i, mask=mask, other=0).to(tl.int32), 0)
            if ACCUMULATE:
                value += tl.load(place, mask=mask, other=0.0)
            tl.store(place, value, mask=mask)


class Chunks(NamedTuple):
    """The entries of a worklist, by panel and column."""

    work: Tensor  # int64 [chunks, 3]: first row of the panel, first entry and the one after the last
    columns: Tensor  # int32 [chunks * CHUNK], rows of input^T; unused places hold 0
    local: Tensor  # int16 [k]: place of the column in its chunk * PANEL + row in the panel
    entries: Tensor  # int32 [k], int64 in an arena of 2^31 entries and more: where in the arena


def _chunks(tiles: Tensor, local: Tensor, tile: tuple[int, int], shifts: Tensor, *compact: bool) -> Chunks:
    """`compact`: whether the rows' (columns') operand came so, and is not shifted."""
    entry, layer, row, col = decode(None, None, tiles, local, list(tile))
    row, col = (at if compact[i] else at + shifts[layer, i] for i, at in enumerate((row, col)))
    width = int(col.max()) + 1
    order = (row // PANEL * width + col).argsort(stable=True)
    entry, row, col = entry[order], row[order], col[order]
    pairs, pair = torch.unique_consecutive(row // PANEL * width + col, return_inverse=True)  # (panel, column)
    panels, panel, sizes = torch.unique_consecutive(pairs // width, return_inverse=True, return_counts=True)
    place = torch.arange(len(pairs), device=pairs.device) - (sizes.cumsum(0) - sizes)[panel]  # of a column in its panel
    parts = -(-sizes // CHUNK)
    chunk = (parts.cumsum(0) - parts)[panel] + place // CHUNK
    number = int(parts.sum())
    columns = torch.zeros(number * CHUNK, dtype=torch.int32, device=pairs.device)
    columns[chunk * CHUNK + place % CHUNK] = (pairs % width).to(torch.int32)
    end = torch.bincount(chunk[pair], minlength=number).cumsum(0)
    begin = torch.cat([end.new_zeros(1), end[:-1]])
    work = torch.stack([torch.repeat_interleave(panels, parts) * PANEL, begin, end], 1)
    position = place[pair] % CHUNK * PANEL + row % PANEL
    narrow = torch.int32 if len(local) < 1 << 31 else torch.int64  # 65 M entries: 0.26 GB or twice that
    return Chunks(work, columns, position.to(torch.int16), entry.to(narrow))


chunks = Remembered(_chunks)


def launch(out: Tensor, a: Tensor, b: Tensor, chunks: Chunks, accumulate: bool, precision: str, programs: int) -> None:
    """`a`: the rows' columns of grad_out, [T, rows]. `b`: those of input, transposed, [columns, T]."""
    count = chunks.work.shape[0]
    _panels[(min(count, programs),)](
        out, a, b, chunks.work, chunks.columns, chunks.local, chunks.entries, count, *a.shape, a.stride(0), b.stride(0),
        PANEL=PANEL, CHUNK=CHUNK, BLOCK_T=128 // a.element_size(), BLOCK_E=256, ACCUMULATE=accumulate,
        PRECISION=precision, num_warps=4, num_stages=4,
    )  # fmt: skip
