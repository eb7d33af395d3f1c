"""A budget in which every row of a weight gets its own best entries."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseft.pattern import Pattern, matrix_shape
from sparseft.selection.budget import Grid

CHUNK = 1 << 22  # entries that are sorted at once


class RowBudget:
    """As Budget for one weight, but each of its n rows gets floor(k / n) entries, its own best, and one more where
    the best of those left over are: GPS, which selects per neuron (Zhang et al., 2024); Wanda compares per row too.

    With `tile_budget` < 1 every band of rows as high as a tile keeps that share of its tiles, those with the most
    chosen mass, or as many as its rows need; the rows choose again inside.

    Args:
        name, shape: of the weight, seen as [-1, last dimension].
        k, tile, tile_budget: as in Budget.
    """

    waits = False

    def __init__(self, name: str, shape: Sequence[int], k: int, tile: tuple[int, int], tile_budget: float):
        self._name, self._shape, self._k, self._tile, self._tile_budget = (
            name,
            matrix_shape(shape),
            k,
            tile,
            tile_budget,
        )
        self.tiles = -(-self._shape[0] // tile[0]) * -(-self._shape[1] // tile[1])
        self.patterns: dict[str, Pattern] = {}  # the result, once the weight was added
        self.free_mass = self.mass = 0.0  # sum of |scores| of the free choice, and of the choice inside the tiles

    def add(self, name: str, scores: Tensor) -> None:
        """Take the weight's scores (fp32 or fp64, of the weight's shape)."""
        matrix = scores.reshape(self._shape).abs()
        indices = best_of_rows(matrix, self._k)
        chosen = matrix.reshape(-1)[indices]
        self.free_mass = self.mass = float(chosen.double().sum())
        grid = Grid(self._shape, self._tile, indices, chosen)
        if self._tile_budget < 1:
            allowed = torch.zeros(matrix.numel(), dtype=torch.bool, device=matrix.device)
            allowed[grid.positions(self._keep(grid), matrix.device)] = True
            indices = best_of_rows(matrix.masked_fill(~allowed.view(self._shape), -1.0), self._k)
            self.mass = float(matrix.reshape(-1)[indices].double().sum())
        self.patterns = {self._name: grid.pattern(indices)}

    def _keep(self, grid: Grid) -> Tensor:
        """bool, one per tile: the best of each band, enough for the longest row."""
        bands = -(-self._shape[0] // self._tile[0])
        mass = grid.mass.view(bands, -1)
        across = mass.shape[1]
        width = torch.full((across,), self._tile[1])
        width[-1] = self._shape[1] - (across - 1) * self._tile[1]
        order = mass.argsort(dim=1, descending=True, stable=True)
        longest = -(-self._k // self._shape[0])
        needed = (width[order].cumsum(1) < longest).sum(1) + 1
        count = needed.clamp(min=round(self._tile_budget * across))
        keep = torch.zeros(bands, across, dtype=torch.bool)
        return keep.scatter_(1, order, torch.arange(across) < count[:, None]).view(-1)


def best_of_rows(scores: Tensor, k: int) -> Tensor:
    """int64 [k], ascending flat positions: the largest floor(k / n) of each of the n rows [n, m], and of what is left
    the largest, at most one per row. Of equal scores the lower positions, of equal rows the earlier ones."""
    n, m = scores.shape
    each, more = divmod(k, n)
    width = min(each + 1, m)
    found = [part.argsort(dim=1, descending=True, stable=True)[:, :width] for part in scores.split(max(CHUNK // m, 1))]
    column = torch.cat(found)
    position = torch.arange(n, device=scores.device)[:, None] * m + column
    if not more:
        return position[:, :each].reshape(-1).sort().values
    last = scores.gather(1, column[:, each:])[:, 0]
    extra = position[last.argsort(descending=True, stable=True)[:more], each]
    return torch.cat([position[:, :each].reshape(-1), extra]).sort().values
