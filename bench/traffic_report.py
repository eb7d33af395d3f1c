"""Counts the bytes that the Triton kernels load and store, and sets them against what their work must move.

    python -m bench.traffic_report

The kernels run in the strict interpreter, which counts every access of every lane. "must" is computed from the
definition of the operation alone:

    masked_grad    active tiles x (BM + BN) x T operand elements, and per entry its position and its gradient
    compact        the active columns, read and written once (masked_grad's own preparation)
    the call       the same as masked_grad: what both kernels together move for it, without a bound
    scatter_delta  per entry its position, its value and its weight, read and written
    sparse_adamw   per entry its position, gradient, base, both moments, value and weight, read and written
    select_topk    two reads of all scores

"moved" counts every access to data of entries, operands and scores; of the index arrays that all programs share (rows,
cols, tiles and tables: kilobytes, at home in the cache) it counts each byte once per launch. "sectors" are the 32-byte
sectors that leave the programs' own caches: single weights among 16 others make them more than the bytes asked for.
"""

import os
import sys
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch
from sparseft.kernels.masked_grad import masked_grad_
from sparseft.kernels.scatter_delta import scatter_delta_
from sparseft.kernels.select_topk import select_topk
from sparseft.kernels.sparse_adamw import sparse_adamw_

from sparseft.pattern import Pattern
from tests.triton.hardened import Launch, recorded

SHARED = {"rows", "cols", "tiles", "spans", "table", "shifts", "order", "first", "starts", "step", "lr"}
BOUND = 1.05


class Row(NamedTuple):
    """One kernel's bytes."""

    kernel: str
    must: int
    moved: int
    sectors: int
    bound: float | None = BOUND  # None: for information

    @property
    def ratio(self) -> float:
        return self.moved / self.must


def moved(launches: list[Launch]) -> tuple[int, int]:
    """Bytes moved, and the bytes of the sectors."""
    total = sectors = 0
    for launch in launches:
        for part in (launch.loads, launch.stores):
            for name, traffic in part.items():
                total += traffic.distinct if name in SHARED else traffic.requested
                sectors += traffic.sectors
    return total, sectors


def of(kernel: str, launches: list[Launch]) -> list[Launch]:
    return [launch for launch in launches if launch.kernel == kernel]


def clustered(size: int, tiles: int, fill: float, tile: int = 64) -> Pattern:
    """A pattern as selection makes it: entries in `tiles` tiles only, a share `fill` of each."""
    generator = torch.Generator().manual_seed(0)
    across = size // tile
    chosen = torch.randperm(across * across, generator=generator)[:tiles]
    active = torch.zeros(across * across, dtype=torch.bool).index_fill_(0, chosen, True).view(across, across)
    blocks = active.repeat_interleave(tile, 0).repeat_interleave(tile, 1)
    mask = blocks & (torch.rand(size, size, generator=generator) < fill)
    order = torch.arange(size)
    rows, cols = order[mask.any(1)], order[mask.any(0)]  # as they are: they are clustered already
    return Pattern.from_indices(mask.view(-1).nonzero().squeeze(1), (size, size), row_order=rows, col_order=cols)


def masked_grad_rows(size: int = 2048, tokens: int = 128) -> list[Row]:
    """1 % of the entries in 10 % of the tiles. Twice as large a weight halves the copies' share in the call."""
    p, dtype = clustered(size, (size // 64) ** 2 // 10, 0.1), torch.bfloat16
    grad_out, input = torch.zeros(tokens, size, dtype=dtype), torch.zeros(tokens, size, dtype=dtype)
    with recorded() as launches:
        masked_grad_(torch.zeros(len(p)), grad_out, input, *p.layout, True)
    must = len(p.tiles) * (64 + 64) * tokens * 2 + len(p) * (2 + 4 + 4)
    copied = (len(p.rows) + len(p.cols)) * tokens * 2 * 2
    return [Row("masked_grad", must, *moved(of("_tiles", launches))),
            Row("  its compact copies", copied, *moved(of("_compact", launches))),
            Row("  the call, with copies", must, *moved(launches), None)]  # fmt: skip


def entry_rows(size: int = 4096) -> list[Row]:
    p, dtype = clustered(size, 410, 0.1), torch.bfloat16  # 1 % of the entries in 10 % of the tiles
    k, weight = len(p), torch.zeros(size, size, dtype=dtype)
    rows = []
    for mode, value, per_entry in (("add", 4, 2 + 4 + 2 + 2), ("copy", 4, 2 + 4 + 2), ("swap", 2, 2 + 2 * 2 + 2 * 2)):
        values = torch.zeros(k, dtype=torch.float32 if value == 4 else dtype)
        with recorded() as launches:
            scatter_delta_([weight], values, *p.layout, mode, 1.0)
        rows.append(Row(f"scatter_delta {mode}", k * per_entry, *moved(launches)))
    state, hyper = [torch.zeros(k) for _ in range(3)], (torch.tensor(1e-3), 0.9, 0.999, 1e-8, 0.1, False, None, None)
    for label, seed, value in (("", None, 4), (", no masters", 7, 2)):
        values = torch.zeros(k, dtype=torch.float32 if seed is None else dtype)
        with recorded() as launches:
            sparse_adamw_([weight], values, *state, torch.zeros(k, dtype=dtype), torch.ones(1, dtype=torch.int64), None,
                          *p.layout, *hyper, seed)  # fmt: skip
        per_entry = 2 + 4 + 2 + 2 * (2 * 4 + value) + 2  # position, gradient, base; moments and value; weight
        rows.append(Row(f"sparse_adamw{label}", k * per_entry, *moved(launches)))
    return rows


def topk_rows(n: int = 300_000) -> list[Row]:
    """Only the scores: the histograms and the k positions do not grow with them."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        scores = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
        with recorded() as launches:
            select_topk([scores], [], n // 100, "abs")
        read = [launch.loads["score"] for launch in launches]
        rows.append(Row(f"select_topk {str(dtype)[6:]}", 2 * n * scores.element_size(),
                        sum(t.requested for t in read), sum(t.sectors for t in read), 1.0))  # fmt: skip
    return rows


def report() -> list[Row]:
    return [*masked_grad_rows(), *entry_rows(), *topk_rows()]


def main() -> int:
    rows = report()
    print(f"{'bytes':24}{'must':>12}{'moved':>12}{'ratio':>8}{'bound':>8}{'sectors':>12}")
    for row in rows:
        bound = f"{row.bound:8.2f}" if row.bound else f"{'none':>8}"
        print(f"{row.kernel:24}{row.must:12,}{row.moved:12,}{row.ratio:8.3f}{bound}{row.sectors:12,}")
    return int(any(row.bound and row.ratio > row.bound for row in rows))


if __name__ == "__main__":
    sys.exit(main())
