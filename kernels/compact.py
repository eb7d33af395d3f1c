"""The active columns of masked_grad's operands, side by side.

A tile's 64 rows and 64 columns lie anywhere in grad_out and input. Read one by one, 2-byte elements waste 15/16 of
every memory sector and cannot be copied asynchronously; so they are gathered once per call, for all tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from sparseft.kernels.launch import Remembered
from torch import Tensor

from sparseft.reference import COL0, ENTRY0, ENTRY1, LAYER, ROW0

ALIGNMENT = 16  # elements; where a layer's columns start in a copy


@triton.jit
def _compact(source, order, copy, tokens, width, columns, source_token, source_column, copy_token, copy_column,
             BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """copy[t, c] = source[t, order[c]]; what the source does not have is another layer's and left alone."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    column = tl.load(order + c, mask=c < width, other=columns)
    mask = (t < tokens)[:, None] & (column < columns)[None, :]
    at = source + t[:, None] * source_token + column.to(tl.int64)[None, :] * source_column
    tl.store(copy + t[:, None] * copy_token + c.to(tl.int64)[None, :] * copy_column, tl.load(at, mask=mask), mask=mask)


class Span(NamedTuple):
    """Where the active rows (columns) of one layer lie in the layout, and where their copies start."""

    layer: int
    first: int
    last: int
    start: int


class Plan(NamedTuple):
    """What a worklist says about its operands; known to the host."""

    rows: list[Span]
    cols: list[Span]
    shifts: Tensor  # int64 [layers, 2] on the device: from ROW0 and COL0 to their places in the copies
    align: dict[bool, tuple[int, int]]  # what ROW0 and COL0 are multiples of: in copies (True), as they are (False)
    entries: int  # in the worklist


def _plan(tiles: Tensor, tile: tuple[int, int]) -> Plan:
    table = tiles.cpu()
    layers = table[:, LAYER].unique().tolist()
    shifts = torch.zeros(layers[-1] + 1, 2, dtype=torch.int64)
    spans: tuple[list[Span], list[Span]] = ([], [])
    for side, at in enumerate((ROW0, COL0)):
        start = 0
        for layer in layers:
            begins = table[table[:, LAYER] == layer, at]
            first, last = int(begins.min()), int(begins.max()) + tile[side]
            spans[side].append(Span(layer, first, last, start))
            shifts[layer, side] = start - first
            start += triton.cdiv(last - first, ALIGNMENT) * ALIGNMENT
    raw = table[:, [ROW0, COL0]]
    align = {moved: tuple(_alignment(b) for b in begins.T)
             for moved, begins in ((False, raw), (True, raw + shifts[table[:, LAYER]]))}  # fmt: skip
    return Plan(*spans, shifts.to(tiles.device), align, int((table[:, ENTRY1] - table[:, ENTRY0]).sum()))


def _alignment(begins: Tensor) -> int:
    return ALIGNMENT if bool((begins % ALIGNMENT == 0).all()) else 1


plan = Remembered(_plan)  # one host sync per worklist


def compact(sources: list[Tensor], order: Tensor, spans: list[Span], transposed: bool = False) -> Tensor:
    """[T, width], or [width, T] if transposed: of each layer's source the columns order[first:last], at `start`.

    Sources may have any strides: a sparse layer keeps its input as [columns, T].
    """
    tokens = sources[0].shape[0]
    width = spans[-1].start + triton.cdiv(spans[-1].last - spans[-1].first, ALIGNMENT) * ALIGNMENT
    copy = sources[0].new_empty(width, tokens).T if transposed else sources[0].new_empty(tokens, width)
    for source, span in zip(sources, spans, strict=True):
        part, place = order[span.first : span.last], copy[:, span.start :]
        if tokens and len(part):
            _compact[triton.cdiv(tokens, 32), triton.cdiv(len(part), 128)](
                source, part, place, tokens, len(part), source.shape[1], *source.stride(), *place.stride(),
                BLOCK_T=32, BLOCK_C=128,
            )  # fmt: skip
    return copy.T if transposed else copy
