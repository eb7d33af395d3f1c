"""A tile-packed choice in which no score waits: every weight's scores come twice."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from sparseft.selection.budget import Budget, FlooredTopK, Grid, keep_tiles, mass_of
from sparseft.selection.heap import HeapTrim


class TwiceBudget(Budget):
    """As Budget, to the bit, but the scores of all weights are added once for the free choice, and once more for the
    choice inside the tiles that it decides; no score is kept in between.

    The second scores must equal the first.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], k: int, tile: tuple[int, int], tile_budget: float,
                 floor: float = 0.0):  # fmt: skip
        super().__init__(shapes, k, tile, tile_budget, floor)
        self.waits = False
        self._names = list(shapes)
        self._grids: dict[str, Grid] = {}  # after the first round
        self._kept: dict[str, Tensor] = {}  # the tiles that may hold entries

    def add(self, name: str, scores: Tensor) -> None:
        """Take one weight's scores; the last ones of the second round trigger the choice."""
        self._missing.remove(name)
        if not self._grids:
            self._free.add(name, scores)
        elif name in self._grids:
            inside = self._grids[name].positions(self._kept[name], scores.device)
            self._inside.add(name, scores.reshape(-1)[inside])
        if not self._missing:
            self._finish() if self._grids else self._begin()

    def _begin(self) -> None:
        """Between the rounds: which tiles are kept."""
        chosen = self._free.selected()
        del self._free  # its candidates are no longer needed
        self.free_mass = mass_of(chosen)
        grids: dict[str, Grid] = {}
        heap = HeapTrim()
        for name in list(chosen):
            indices, scores = chosen.pop(name)
            grids[name] = self._grid(name, indices, scores)
            heap.freed(indices.nbytes + scores.nbytes if indices.is_cpu else 0)
        sure = [(self._sure[name], self._sure_tiles[name]) for name in grids]
        tiles = keep_tiles(list(grids.values()), self._k, round(self._tile_budget * self.tiles), sure)
        self._kept = dict(zip(grids, tiles, strict=True))
        self._inside = FlooredTopK(self._k, {name: self._sure[name] for name in grids})
        self._missing, self._grids = set(self._names), grids

    def _finish(self) -> None:
        chosen = self._inside.selected()
        del self._inside  # its candidates are no longer needed
        self.mass = mass_of(chosen)
        heap = HeapTrim()
        for name in list(chosen):  # one after the other, so that little is held twice
            found, _ = chosen.pop(name)
            grid, keep = self._grids.pop(name), self._kept.pop(name)
            inside = grid.positions(keep, found.device)
            self.patterns[name] = grid.pattern(inside[found])
            heap.freed(inside.nbytes if inside.is_cpu else 0)
