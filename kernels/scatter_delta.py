"""scatter_delta: values into the selected entries of all layers, in one launch. Positions are unique: no atomics."""

import triton
import triton.language as tl
from sparseft.kernels.entries import CHUNK, address_table, locate, plan
from sparseft.kernels.launch import on


@triton.jit(do_not_specialize=["reach"])
def _scatter(
    weight, values, table, rows, cols, tiles, spans, reach, local, count, alpha: tl.float64,
    MODE: tl.constexpr, TILE_COLS: tl.constexpr, COMPLETE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    entry = chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    within = entry < count
    position = tl.load(local + entry, mask=within, other=0).to(tl.int32) & 0xFFFF
    _, offset, held = locate(entry, position, chunk, tiles, spans, reach, table, rows, cols, TILE_COLS)
    mask = within if COMPLETE else held

    value = tl.load(values + entry, mask=mask, other=0.0)
    if MODE == "swap":
        old = tl.load(weight + offset, mask=mask, other=0.0)
        tl.debug_barrier()  # the compiler may give an entry's loads and stores to different threads
        tl.store(values + entry, old, mask=mask)
    if MODE == "add":
        wide: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
        old = tl.load(weight + offset, mask=mask, other=0.0)
        value = old.to(wide) + tl.cast(alpha, wide) * value.to(wide)
    tl.store(weight + offset, value.to(weight.dtype.element_ty), mask=mask)


def scatter_delta_(weights, values, rows, cols, tiles, local, tile, mode, alpha):
    """See `reference.scatter_delta_`."""
    count = local.shape[0]
    if count == 0 or tiles.shape[0] == 0:
        return
    with on(weights[0]):
        ordered, spans, reach, complete = plan(tiles, count)
        _scatter[(spans.shape[0],)](
            weights[0], values, address_table(weights), rows, cols, ordered, spans, reach, local, count, alpha,
            MODE=mode, TILE_COLS=tile[1], COMPLETE=complete, CHUNK=CHUNK,
        )  # fmt: skip
