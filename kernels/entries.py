"""Where each entry of an arena lives: what scatter_delta and sparse_adamw share.

Both walk the arena in chunks of CHUNK entries, whatever the sizes of the tiles: programs are balanced, and values
and moments move in 128-bit accesses. Each entry finds its tile among the few that cross its chunk by bisection.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from sparseft.kernels.launch import Remembered
from torch import Tensor

from sparseft.reference import ENTRY0, ENTRY1

CHUNK = 1024


class Plan(NamedTuple):
    """A worklist, prepared for walking its entries in order."""

    tiles: Tensor  # int64 [n, 5], by ascending entry
    spans: Tensor  # int32 [chunks, 2], the first tile that crosses a chunk and the one after the last
    reach: int  # the bisection's first step: a power of two; twice it covers the tiles of any chunk
    complete: bool  # every entry has its tile: nothing to mask but the end


def _plan(tiles: Tensor, count: int) -> Plan:
    tiles = tiles[tiles[:, ENTRY0].argsort()]
    starts = torch.arange(0, count, CHUNK, device=tiles.device)
    first = torch.searchsorted(tiles[:, ENTRY1].contiguous(), starts, right=True)
    last = torch.searchsorted(tiles[:, ENTRY0].contiguous(), starts + CHUNK)
    held = (tiles[:, ENTRY1] - tiles[:, ENTRY0]).sum()
    most, held = torch.stack([(last - first).max(), held]).tolist()
    return Plan(tiles, torch.stack([first, last], 1).to(torch.int32), triton.next_power_of_2(most) // 2, held == count)


plan = Remembered(_plan)  # one host sync per worklist


def address_table(weights: list[Tensor]) -> Tensor:
    """int64 [layers, 2] on the device: each weight's distance from the first one, in elements, and its row stride.

    It depends on nothing but the addresses, by which it is remembered: a captured CUDA graph may keep using it.
    """
    size = weights[0].element_size()
    origin = weights[0].data_ptr()
    table = tuple(((w.data_ptr() - origin) // size, w.stride(0)) for w in weights)
    return _on_device(table, weights[0].device)


@cache
def _on_device(table: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    return torch.tensor(table, dtype=torch.int64, device=device)


@triton.jit
def locate(entry, position, chunk, tiles, spans, reach, table, rows, cols, TILE_COLS: tl.constexpr):
    """Layer, offset (elements from the first weight) and presence in the worklist of each entry of a chunk."""
    first = tl.load(spans + 2 * chunk)
    end = tl.load(spans + 2 * chunk + 1)
    tile = tl.zeros_like(position) + first  # [CHUNK]; the last one that begins at or before the entry
    step = reach
    while step > 0:
        begin = tl.load(tiles + 5 * (tile + step) + 3, mask=tile + step < end, other=0x7FFFFFFFFFFFFFFF)
        tile = tl.where(begin <= entry, tile + step, tile)
        step = step // 2
    record = tiles + 5 * tile
    some = tile < end
    held = entry < tl.load(record + 4, mask=some, other=0)
    held &= entry >= tl.load(record + 3, mask=some, other=0)
    layer = tl.load(record, mask=held, other=0)
    row = tl.load(record + 1, mask=held, other=0) + position // TILE_COLS
    col = tl.load(record + 2, mask=held, other=0) + position % TILE_COLS
    row = tl.load(rows + row, mask=held, other=0)
    col = tl.load(cols + col, mask=held, other=0)
    start = tl.load(table + 2 * layer, mask=held, other=0)
    stride = tl.load(table + 2 * layer + 1, mask=held, other=0)
    return layer, start + row * stride + col, held
