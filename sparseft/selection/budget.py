"""Budgets: how many entries and tiles a group of weights shares, and which tiles they get."""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseft.ops import select_topk
from sparseft.pattern import Pattern, matrix_shape
from sparseft.selection.topk import StreamingTopK


@dataclass(frozen=True)
class Allocation:
    """How the entries are shared among the weights. Every budget gets the same density and tile budget.

    Args:
        budget: weight name -> name of the budget that it shares.
        floor: share of a budget, in [0, 1], that its weights get for certain, each by its size; the rest goes to
            the best entries wherever they are. It applies to entries and to tiles.
        rows: every row of a weight gets the same number of entries (see `RowBudget`); `budget` must then give each
            weight its own.
    """

    budget: Callable[[str], Hashable]
    floor: float = 0.0
    rows: bool = False


def kind(name: str) -> str:
    """What a weight is, whatever its layer: "self_attn.q_proj.weight" of "model.layers.3.self_attn.q_proj.weight"."""
    return re.split(r"(?:^|\.)\d+\.", name)[-1]


ALLOCATIONS: dict[str, Allocation] = {
    "global": Allocation(lambda name: ""),
    "layer": Allocation(lambda name: name),
    "kind": Allocation(kind),  # one budget for all q_proj, one for all down_proj, ...
    "row": Allocation(lambda name: name, rows=True),
    "mixed": Allocation(lambda name: "", floor=0.5),  # halfway between global and layer
}


class Grid:
    """One weight, its rows and columns sorted by chosen score mass (largest first, ties by index), cut into tiles.

    Sums are taken on the CPU in fp64, where their order is fixed.

    Args:
        shape: (N, K). `tile`: rows and columns of a tile; tiles are numbered row by row.
        indices: int64 [k], the flat positions chosen in this weight. `scores`: [k], theirs.
        before: a pattern of this weight whose rows and columns come first, in its order: its entries keep their tiles.
    """

    def __init__(self, shape: tuple[int, int], tile: tuple[int, int], indices: Tensor, scores: Tensor,
                 before: Pattern | None = None):  # fmt: skip
        self._shape, self._tile = shape, tile
        index, mass = indices.cpu(), scores.double().cpu()
        row, col = index // shape[1], index % shape[1]
        self._row_order, self._col_order = _by_mass(row, mass, shape[0]), _by_mass(col, mass, shape[1])
        if before is not None:
            self._row_order = _first(before.rows.cpu().long(), self._row_order)
            self._col_order = _first(before.cols.cpu().long(), self._col_order)
        self._row_place, self._col_place = self._row_order.argsort(), self._col_order.argsort()
        rows = torch.bincount(torch.arange(shape[0]) // tile[0])
        cols = torch.bincount(torch.arange(shape[1]) // tile[1])
        self._across = len(cols)
        number = self.tiles_of(index)
        self.capacity = (rows[:, None] * cols).reshape(-1)  # entries per tile: those at the edges are smaller
        self.count = torch.bincount(number, minlength=len(self.capacity))  # chosen entries per tile
        self.mass = torch.zeros(len(self.capacity), dtype=torch.float64).index_add_(0, number, mass)

    def tiles_of(self, indices: Tensor) -> Tensor:
        """int64, on the CPU: the number of each position's tile."""
        row, col = indices.cpu() // self._shape[1], indices.cpu() % self._shape[1]
        return self._row_place[row] // self._tile[0] * self._across + self._col_place[col] // self._tile[1]

    def positions(self, keep: Tensor, device: torch.device) -> Tensor:
        """int64 flat positions inside the tiles that `keep` (bool, one per tile) marks, ascending."""
        bands = keep.view(-1, self._across)[:, self._col_place // self._tile[1]].to(device)
        mask = bands[(self._row_place // self._tile[0]).to(device)]  # whole rows: copied in one go each
        return mask.reshape(-1).nonzero().squeeze(1)

    def pattern(self, indices: Tensor) -> Pattern:
        """The pattern of some entries in this grid's order, which ends after the last row and column in use."""
        row, col = indices.cpu() // self._shape[1], indices.cpu() % self._shape[1]
        row_order = self._row_order[: int(self._row_place[row].max()) + 1].to(indices.device)
        col_order = self._col_order[: int(self._col_place[col].max()) + 1].to(indices.device)
        return Pattern.from_indices(indices, self._shape, tile=self._tile, row_order=row_order, col_order=col_order)

    def pattern_in_place(self, indices: Tensor) -> Pattern:
        """As `pattern`, but every tile-high band of rows without an entry is left out, and every such band of columns;
        the other entries keep their tiles."""
        row, col = indices.cpu() // self._shape[1], indices.cpu() % self._shape[1]
        row_order = _bands(self._row_order, self._row_place[row], self._tile[0]).to(indices.device)
        col_order = _bands(self._col_order, self._col_place[col], self._tile[1]).to(indices.device)
        return Pattern.from_indices(indices, self._shape, tile=self._tile, row_order=row_order, col_order=col_order)


class Budget:
    """k entries, shared by a group of weights; chosen as soon as the scores of the last weight have come.

    Args:
        shapes: the weights of the group, in the order in which ties are preferred.
        k: entries to select, over all of them.
        tile: rows and columns of a tile. `tile_budget`: share of the group's tiles that may hold entries.
        floor: share of k, and of the tiles, that the weights get by their sizes.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], k: int, tile: tuple[int, int], tile_budget: float,
                 floor: float = 0.0):  # fmt: skip
        self._shapes = {name: matrix_shape(shape) for name, shape in shapes.items()}
        self._k, self._tile, self._tile_budget = k, tile, tile_budget
        entries = sum(n * m for n, m in self._shapes.values())
        self._sure = {name: int(floor * k * n * m / entries) for name, (n, m) in self._shapes.items()}
        self._sure_tiles = {n: int(floor * tile_budget * _tiles(shape, tile)) for n, shape in self._shapes.items()}
        self._free = FlooredTopK(k, self._sure)
        self._scores: dict[str, Tensor] = {}  # kept for the second choice, inside tiles
        self._missing = set(shapes)
        self.waits = tile_budget < 1 and len(shapes) > 1  # whether scores are kept until the last weight's come
        self.tiles = sum(_tiles(shape, tile) for shape in self._shapes.values())
        self.patterns: dict[str, Pattern] = {}  # the result, once every weight was added
        self.free_mass = self.mass = 0.0  # sum of |scores| of the free choice, and of the choice inside the tiles

    def add(self, name: str, scores: Tensor) -> None:
        """Take one weight's scores (fp32 or fp64, of the weight's shape); the last one triggers the choice."""
        self._missing.remove(name)
        self._free.add(name, scores)
        if self._tile_budget < 1:
            self._scores[name] = scores.reshape(-1)
        if not self._missing:
            self._choose()

    def _choose(self) -> None:
        chosen = self._free.selected()
        del self._free  # its candidates are no longer needed
        self.free_mass = self.mass = mass_of(chosen)
        if self._tile_budget < 1:
            self._choose_inside({name: self._grid(name, *chosen.pop(name)) for name in list(chosen)})
        for name in list(chosen):  # one after the other, so that little is held twice
            indices, scores = chosen.pop(name)
            self.patterns[name] = self._grid(name, indices, scores).pattern(indices)

    def _grid(self, name: str, indices: Tensor, scores: Tensor) -> Grid:
        return Grid(self._shapes[name], self._tile, indices, scores)

    def _choose_inside(self, grids: dict[str, Grid]) -> None:
        """The best k entries inside the kept tiles; frees the scores."""
        sure = [(self._sure[name], self._sure_tiles[name]) for name in grids]
        tiles = keep_tiles(list(grids.values()), self._k, round(self._tile_budget * self.tiles), sure)
        keep = dict(zip(grids, tiles, strict=True))
        inside = FlooredTopK(self._k, {name: self._sure[name] for name in grids})
        positions = None
        for name, grid in grids.items():
            scores = self._scores.pop(name)
            positions = grid.positions(keep[name], scores.device)
            inside.add(name, scores[positions])
        self._scores.clear()
        chosen = inside.selected()
        self.mass = mass_of(chosen)
        for name, (found, _) in chosen.items():
            grid = grids[name]
            if positions is None or len(grids) > 1:  # made once more: cheaper than keeping those of all weights
                positions = grid.positions(keep[name], found.device)
            self.patterns[name] = grid.pattern(positions[found])


class FlooredTopK:
    """As StreamingTopK, but of the k entries every tensor gets a number for certain, its own best ones.

    Args:
        k: entries to keep, over all tensors together.
        sure: entries of each tensor that are kept in any case, together at most k; its order is the order in which
            equal scores are preferred.
    """

    def __init__(self, k: int, sure: Mapping[str, int]):
        self._sure = sure
        self._own: dict[str, tuple[Tensor, Tensor]] = {}  # name -> (ascending flat positions, |scores|)
        self._rest: StreamingTopK[str] = StreamingTopK(k - sum(sure.values()), order=list(sure))

    def add(self, name: str, scores: Tensor) -> None:
        """Take the scores of one tensor (fp32 or fp64, finite)."""
        scores = scores.reshape(-1).abs()
        own = select_topk(scores, min(self._sure[name], len(scores)))
        self._own[name] = own, scores[own]
        self._rest.add(name, scores if len(own) == 0 else scores[_others(own, len(scores))])

    def selected(self) -> dict[str, tuple[Tensor, Tensor]]:
        """int64 flat positions, ascending, and |scores| of the selected entries; names without any are left out."""
        rest, rest_scores = self._rest.result(), self._rest.scores()
        return {name: both for name in self._sure
                if len((both := _merged(*self._own[name], rest.get(name), rest_scores.get(name)))[0])}  # fmt: skip


def _merged(own: Tensor, own_scores: Tensor, rest: Tensor | None, rest_scores: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ascending positions with their scores; `rest` counts among the positions that are not in `own`."""
    if rest is None or rest_scores is None or len(own) == 0:
        return (own, own_scores) if rest is None or rest_scores is None else (rest, rest_scores)
    # the j-th of `own` has own[j] - j others before it
    skipped = torch.searchsorted(own - torch.arange(len(own), device=own.device), rest, right=True)
    position, order = torch.cat([own, rest + skipped]).sort()
    return position, torch.cat([own_scores, rest_scores])[order]


def mass_of(chosen: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """The sum of all scores."""
    return sum(float(scores.double().sum()) for _, scores in chosen.values())


# structure -> the dimensions along which its lines run: 1 for rows, 0 for columns
LINES: dict[str, tuple[int, ...]] = {"rows": (1,), "columns": (0,), "rows-and-columns": (1, 0)}


class LineBudget:
    """As Budget, but rows or columns are chosen whole, by their mean |score|; no score is kept.

    The best lines are taken as long as that brings the number of entries closer to k. An entry where a chosen row
    crosses a chosen column counts once (in `mass`, twice).

    Args:
        shapes, k, tile: as in Budget.
        along: the dimensions along which lines run; equal means go to the earlier weight, and of its lines to
            those of the first dimension named.
    """

    waits = False

    def __init__(self, shapes: Mapping[str, Sequence[int]], k: int, tile: tuple[int, int], along: tuple[int, ...]):
        self._shapes = {name: matrix_shape(shape) for name, shape in shapes.items()}
        self._k, self._tile, self._along = k, tile, along
        self._mass: dict[str, list[Tensor]] = {}  # fp64, per dimension the sum of |score| of every line
        self.tiles = sum(_tiles(shape, tile) for shape in self._shapes.values())
        self.patterns: dict[str, Pattern] = {}  # the result, once every weight was added
        self.free_mass = self.mass = 0.0  # sum of |scores| of the choice

    def add(self, name: str, scores: Tensor) -> None:
        """Take one weight's scores (fp32 or fp64, of the weight's shape); the last one triggers the choice."""
        matrix = scores.reshape(self._shapes[name]).abs()
        self._mass[name] = [matrix.sum(dimension, dtype=torch.float64) for dimension in self._along]
        if len(self._mass) == len(self._shapes):
            self._choose()

    def _choose(self) -> None:
        blocks = [(name, dimension) for name in self._shapes for dimension in self._along]
        parts = [part.cpu() for name in self._shapes for part in self._mass[name]]
        mass = torch.cat(parts)
        sizes = [len(part) for part in parts]
        length = torch.tensor([self._shapes[name][dimension] for name, dimension in blocks])
        block = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(sizes))
        order = torch.argsort(mass / length[block], descending=True, stable=True)
        adds = length[block[order]] - self._crossed(block[order])
        after = adds.cumsum(0)
        keep = torch.zeros(len(mass), dtype=torch.bool)
        keep[order[(after - self._k).abs() < (after - adds - self._k).abs()]] = True
        self.free_mass = self.mass = float(mass[keep].sum())
        lines = dict(zip(blocks, keep.split(sizes), strict=True))
        for name in self._shapes:
            if any(lines[name, dimension].any() for dimension in self._along):
                self.patterns[name] = self._pattern(name, [lines[name, dimension] for dimension in self._along])

    def _crossed(self, block: Tensor) -> Tensor:
        """int64: how many lines of the same weight in the other direction come before each line (both in order)."""
        crossed = torch.zeros_like(block)
        if len(self._along) == 2:  # a weight's two blocks are neighbours: 2 i and 2 i + 1
            for first in range(0, 2 * len(self._shapes), 2):
                mine = ((block == first) | (block == first + 1)).nonzero().squeeze(1)
                second = block[mine] == first + 1
                crossed[mine] = torch.where(second, (~second).cumsum(0), second.cumsum(0))
        return crossed

    def _pattern(self, name: str, keep: list[Tensor]) -> Pattern:
        shape = self._shapes[name]
        indices, carried = [], []
        for dimension, mass, part in zip(self._along, self._mass[name], keep, strict=True):
            lines = part.nonzero().squeeze(1).to(mass.device)
            across = torch.arange(shape[dimension], device=lines.device)
            flat = lines[:, None] * shape[1] + across if dimension == 1 else across * shape[1] + lines[:, None]
            indices.append(flat.reshape(-1))
            carried.append(mass[lines][:, None].expand(flat.shape).reshape(-1))
        entries, which = torch.cat(indices).unique(return_inverse=True)
        # an entry carries its lines' mass, so that chosen rows and columns come first; on the CPU, in a fixed order
        total = torch.zeros(len(entries), dtype=torch.float64).index_add_(0, which.cpu(), torch.cat(carried).cpu())
        return Pattern.from_indices(entries, shape, tile=self._tile, mass=total.to(entries.device))


def keep_tiles(grids: Sequence[Grid], k: int, budget: int, sure: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Mark, grid by grid, the `budget` tiles with the most chosen mass; more if these cannot hold what they must.

    Args:
        k: entries that all kept tiles together must hold.
        sure: per grid, entries that its own kept tiles must hold, and how many of its best tiles are kept anyway.
    """
    mass, count, capacity = (torch.cat([getattr(g, name) for g in grids]) for name in ("mass", "count", "capacity"))
    best = torch.cat([best_tiles(g.mass, g.count, g.capacity, *least) for g, least in zip(grids, sure, strict=True)])
    keep = best_tiles(mass.masked_fill(best, torch.inf), count, capacity, k, max(budget, int(best.sum())))
    return list(keep.split([len(g.mass) for g in grids]))


def best_tiles(mass: Tensor, count: Tensor, capacity: Tensor, k: int, budget: int) -> Tensor:
    """bool: the `budget` tiles with the most mass, more if these cannot hold k entries, none that is empty."""
    order = torch.argsort(mass, descending=True, stable=True)
    order = order[count[order] > 0]  # together these hold the chosen entries, so capacity suffices
    needed = int(torch.searchsorted(capacity[order].cumsum(0), k)) + 1 if k else 0
    keep = torch.zeros(len(mass), dtype=torch.bool)
    keep[order[: max(budget, needed)]] = True
    return keep


def _others(positions: Tensor, size: int) -> Tensor:
    """int64: all of 0..size-1 that are not in `positions`, ascending."""
    mask = torch.ones(size, dtype=torch.bool, device=positions.device)
    mask[positions] = False
    return mask.nonzero().squeeze(1)


def _tiles(shape: tuple[int, int], tile: tuple[int, int]) -> int:
    return -(-shape[0] // tile[0]) * -(-shape[1] // tile[1])


def _by_mass(index: Tensor, mass: Tensor, size: int) -> Tensor:
    """All of 0..size-1, by the mass summed at `index`, largest first; ties to the lower number."""
    return torch.zeros(size, dtype=torch.float64).index_add_(0, index, mass).argsort(descending=True, stable=True)


def _first(lines: Tensor, order: Tensor) -> Tensor:
    """The order with `lines` moved to its beginning."""
    others = torch.ones(len(order), dtype=torch.bool)
    others[lines] = False
    return torch.cat([lines, order[others[order]]])


def _bands(order: Tensor, place: Tensor, edge: int) -> Tensor:
    """The order without the runs of `edge` lines in which no `place` lies."""
    used = torch.zeros(-(-len(order) // edge), dtype=torch.bool)
    used[place // edge] = True
    return order[used.repeat_interleave(edge)[: len(order)]]
