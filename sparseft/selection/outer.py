"""The largest entries of an outer product that is never formed."""

import torch
from torch import Tensor


class OuterProduct:
    """rows[i] * columns[j] as a matrix [n, m] of scores, in O(n + m) memory.

    Products are taken in fp64, in which those of two fp32 numbers are exact.

    Args:
        rows: [n]. `columns`: [m]. Finite, not negative.
    """

    def __init__(self, rows: Tensor, columns: Tensor):
        self._rows, self._columns = rows.double(), columns.double()
        self._falling, self._order = self._columns.sort(descending=True, stable=True)

    def at(self, positions: Tensor) -> Tensor:
        """fp64: the scores at int64 flat positions."""
        width = len(self._columns)
        return self._rows[positions // width] * self._columns[positions % width]

    def best(self, count: int) -> Tensor:
        """int64, ascending: the flat positions of the `count` largest; ties to the lower position.

        The threshold is found by bisection over the bits of a double; O((n log m) 64 + count log count) time.
        """
        count = min(count, len(self._rows) * len(self._columns))
        if count == 0:
            return torch.zeros(0, dtype=torch.int64, device=self._rows.device)
        low, high = 0, int(torch.tensor(torch.inf, dtype=torch.float64).view(torch.int64))
        while high - low > 1:  # invariant: at least `count` reach low, fewer reach high
            middle = (low + high) // 2
            low, high = (middle, high) if int(self._reaching(middle).sum()) >= count else (low, middle)
        above, reach = self._reaching(low + 1), self._reaching(low)
        surely = self._positions(above)
        return torch.cat([surely, self._first_ties(above, reach, count - len(surely))]).sort().values

    def _reaching(self, bits: int) -> Tensor:
        """int64 [n]: how many entries of each row are at least the double with these bits."""
        threshold = torch.tensor(bits, device=self._rows.device).view(torch.float64)
        low = torch.zeros(len(self._rows), dtype=torch.int64, device=self._rows.device)
        high = torch.full_like(low, len(self._falling))
        for _ in range(len(self._falling).bit_length()):  # halves [low, high], which holds the answer
            middle = (low + high) // 2
            reaches = (middle < high) & (
                self._rows * self._falling[middle.clamp(max=len(self._falling) - 1)] >= threshold
            )
            low, high = torch.where(reaches, middle + 1, low), torch.where(reaches, high, middle)
        return low

    def _positions(self, counts: Tensor) -> Tensor:
        """Flat positions of the first `counts` entries of every row, in the order of falling columns."""
        row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        start = (counts.cumsum(0) - counts).repeat_interleave(counts)
        return row * len(self._columns) + self._order[torch.arange(len(row), device=row.device) - start]

    def _first_ties(self, above: Tensor, reach: Tensor, count: int) -> Tensor:
        """The `count` lowest positions among the entries that reach the threshold and are not above it."""
        found: list[Tensor] = []
        for row in (reach > above).nonzero().squeeze(1).tolist():
            if count == 0:
                break
            columns = self._order[above[row] : reach[row]].sort().values[:count]
            found.append(row * len(self._columns) + columns)
            count -= len(columns)
        return torch.cat(found) if found else self._order[:0]
