"""masked_grad: the gradient of the selected entries only, on tensor cores; the dense gradient never exists in memory.

    compact   the active columns of both operands, once per call                                (compact.py)
    tiles     programs walk the worklist: one tile's product in registers, its entries picked out and added in place
    panels    where tiles hold few entries: products of only the columns that have one          (panels.py)

Every entry has one owner and a fixed order of summation: the same bits on every run, without atomics.
"""

import os

import torch
import triton
import triton.language as tl
from sparseft.kernels import panels
from sparseft.kernels.compact import compact, plan
from sparseft.kernels.launch import architecture, on, processors


@triton.jit
def _tiles(
    out, squares, a, b, tiles, local, shifts, count, tokens, width_a, width_b, stride_a, stride_b,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, SHIFT_A: tl.constexpr, SHIFT_B: tl.constexpr, ALIGN_A: tl.constexpr, ALIGN_B: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[e] (+)= sum_t a[t, row(e)] * b[t, col(e)] over the worklist's tiles; squares[i]: tile i's sum of out^2."""
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
        for m0 in range(0, TILE_M, BLOCK_M):  # one block, unless the tile is larger than a program can hold
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


def masked_grad_(out, grad_out, input, rows, cols, tiles, local, tile, accumulate, squares=None, variant=None):
    """See `reference.masked_grad_`.

    Args:
        grad_out: [T, N]; or a list with one [T, N_i] per layer of the layout, for layers that share `input` (q, k, v).
            A list needs `rows`.
        squares: optional, out's dtype [n]: receives each tile's sum of squares of its entries in `out`.
        variant: "tiles" or "panels" instead of the choice of `choose`; so does the environment variable
            SPARSEFT_MASKED_GRAD. `squares` needs tiles.
    """
    several = isinstance(grad_out, (list, tuple))
    if several and rows is None:
        raise ValueError("rows must be given for a list of grad_out, got None")
    variant = variant or os.environ.get("SPARSEFT_MASKED_GRAD") or None
    if variant not in (None, "tiles", "panels"):
        raise ValueError(f"variant (SPARSEFT_MASKED_GRAD) must be 'tiles' or 'panels', got {variant!r}")
    if squares is not None and variant == "panels":
        raise ValueError("variant must be 'tiles' for sums of squares, got 'panels'")
    if tiles.shape[0] == 0:
        return
    tile, tiles = tuple(tile), tiles.contiguous()
    with on(input):
        work = plan(tiles, tile)
        variant = variant or ("tiles" if squares is not None else choose(work.entries, tiles.shape[0], tile))
        if rows is None:
            a = with_rows(grad_out)
        else:
            a = compact([grad_out[s.layer] if several else grad_out for s in work.rows], rows, work.rows)
        if cols is not None:
            b = compact([input] * len(work.cols), cols, work.cols, variant == "panels")
        else:
            b = input.T.contiguous() if variant == "panels" else with_rows(input)
        programs = 4 * processors(out.device)
        if variant == "panels":
            chunks = panels.chunks(tiles, local, tile, work.shifts, rows is None, cols is None)
            panels.launch(out, a, b, chunks, accumulate, precision(), programs)
            return
        _tiles[(min(tiles.shape[0], programs),)](
            out, squares, a, b, tiles, local, work.shifts, tiles.shape[0], a.shape[0], a.shape[1], b.shape[1],
            a.stride(0), b.stride(0), TILE_M=tile[0], TILE_N=tile[1], SHIFT_A=rows is not None,
            SHIFT_B=cols is not None, ALIGN_A=work.align[rows is not None][0], ALIGN_B=work.align[cols is not None][1],
            ACCUMULATE=accumulate, PRECISION=precision(), **configuration(architecture(out.device), a.dtype, tile),
        )  # fmt: skip


def with_rows(operand: torch.Tensor) -> torch.Tensor:
    """The operand, or a copy of it if its rows are not contiguous: the products know one stride."""
    return operand if operand.stride(1) == 1 or operand.shape[1] <= 1 else operand.contiguous()


def choose(entries: int, tiles: int, tile: tuple[int, int]) -> str:
    """Both variants are bound by the operands' elements they load per token: a tile BM + BN of them, a panel's column
    1 + 16 / 64. Panels where these are under half as many, each entry taken to need a column of its own."""
    per_column = 1 + panels.PANEL / panels.CHUNK
    return "panels" if 2 * per_column * entries < tiles * (tile[0] + tile[1]) else "tiles"


def configuration(arch: int, dtype: torch.dtype, tile: tuple[int, int]) -> dict:
    """Block sizes, warps and pipeline depth for a tile shape on an architecture (80, 90, ...; 0: interpreter)."""
    # fp32 is split into two operands (tf32x3), fp64 takes two registers: smaller blocks, or registers are spilled
    largest, tokens = (128, 64) if dtype.itemsize == 2 else (64, 16)
    m, n = (min(max(triton.next_power_of_2(size), 16), largest) for size in tile)
    stage = (m + n) * tokens * dtype.itemsize
    depth = 4 if arch in (90, 100) else 3
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_T": tokens,
        "BLOCK_E": min(m * n, max(256, m * n // 8), 1024),
        "num_warps": min(8, max(1, m * n // 1024, max(m, n) // 32)),
        "num_stages": max(2, min(depth, 96 * 1024 // stage)),  # 96 KiB: what the smallest architecture has
    }


def precision() -> str:
    """How fp32 operands are multiplied: three TF32 products keep fp32's accuracy; one, where torch is told so."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
