"""Drop and grow: in every weight the entries that changed least make room for those with the largest gradients."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparseft.layers import Selected, computing_densely, plain, refresh_values, selected
from sparseft.ops import select_topk
from sparseft.pattern import Pattern, matrix_shape
from sparseft.selection.arguments import check_iterable
from sparseft.selection.budget import Grid, best_tiles
from sparseft.selection.gradients import Backward
from sparseft.selection.outer import OuterProduct
from sparseft.selection.together import Team, agree, together

TILES = ("same", "free")


def drop_and_grow(
    model: nn.Module,
    batches: Iterable[Any],
    fraction: float,
    *,
    tiles: str = "same",
    second_moments: Mapping[str, Tensor] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Pattern]:
    """Where a sparsified model should train next; the model stays as it is (see `reselect`).

    Every weight keeps its number k of entries: of these, int(fraction * k) with the smallest |value - pretrained value|
    are dropped, and as many are grown among all that do not train then, dropped ones included, by the largest |gradient
    summed over the batches|. One batch is RigL's rule (Evci et al., 2020) on the change, several are SpIEL-AG's
    (Ansell et al., 2024): the gradient is summed at k candidates, those with the largest gradient of the first batch.
    Ties go to the earlier entry. Weights that train whole, or whole rows, or not at all, are left alone, and so is a
    weight that no batch reaches.

    Memory besides the model and its activations: one weight's dense gradient at a time, and O(k).

    Args:
        model, batches, loss_fn, seed: as in `select`.
        fraction: in [0, 1].
        tiles: "same": no weight gets more tiles than it has now (unless k entries need them), which keeps training as
            fast as it is; entries that stay keep their tiles. "free": entries grow anywhere, and rows and columns
            are sorted anew, by the number of entries.
        second_moments: by weight name, the optimizer's moving mean of the squared gradient at each entry, fp32 [k].
            Grow by these, and look at no batch: by r_i c_j, the largest moment in row i times that in column j, as
            SpIEL-MA does with the accumulators of SM3. The product is never formed.
        group: as in `select`. All processes must reach the same weights in each one's first batch.

    Returns:
        {parameter name: Pattern} of all sparsified weights.

    Raises:
        ValueError, TypeError: an argument does not fit, the model is not sparsified, a batch gives no loss or no
            gradient, or one that is not finite. The model is as it was.
        RuntimeError: another process of the group failed, or comes to other patterns.
    """
    with together(group, model) as team:
        if second_moments is None:
            check_iterable(batches)
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
        if tiles not in TILES:
            raise ValueError(f"tiles must be one of {list(TILES)}, got {tiles!r}")
        now = selected(model)
        if not now:
            raise ValueError("model must be sparsified (sparseft.sparsify), got one without selected weights")
        growths = {}
        for name, chosen in now.items():
            moving = int(fraction * len(chosen.pattern))
            if moving and not _whole_rows(chosen.pattern):
                growths[name] = _Growth(chosen, moving, tiles, team)
        if second_moments is not None:
            _check_moments(second_moments, {name: now[name].pattern for name in growths})
            for name, growth in growths.items():
                growth.look_at(_largest_moments(now[name].pattern, second_moments[name]))
        elif growths:
            weights = {name: now[name].weight for name in growths}
            run = Backward(plain(model), weights, loss_fn)
            with computing_densely(model), run.prepared(seed):
                stream = iter(batches)  # in here, so that a shuffling loader draws from the seeded generator
                first = list(islice(stream, 1))
                if not first:
                    raise ValueError("batches must hold at least one batch, got none")
                for number, batch in enumerate(chain(first, stream)):
                    run(number, batch, lambda name, gradient: growths[name].add(gradient))
        found = {name: growths[name].pattern() if name in growths else chosen.pattern for name, chosen in now.items()}
        agree(team, found)
        return found


def _check_moments(moments: Mapping[str, Tensor], patterns: Mapping[str, Pattern]) -> None:
    for name, pattern in patterns.items():
        if name not in moments:
            raise ValueError(f"second_moments must hold those of {name}, got {list(moments)[:3]}")
        if moments[name].shape != (len(pattern),):
            raise ValueError(f"second_moments: those of {name} must have the shape {(len(pattern),)}, got "
                             f"{tuple(moments[name].shape)}")  # fmt: skip


def _largest_moments(pattern: Pattern, moments: Tensor) -> OuterProduct:
    """Of every row and of every column the largest moment at an entry, 0 where there is none."""
    n, m = matrix_shape(pattern.shape)
    position = pattern.indices()
    rows, columns = (moments.new_zeros(size).scatter_reduce_(0, at, moments, "amax")
                     for size, at in ((n, position // m), (m, position % m)))  # fmt: skip
    return OuterProduct(rows, columns)


def _whole_rows(pattern: Pattern) -> bool:
    """Whether rows train whole, as vectors and the rows of target tokens do."""
    return len(pattern) == len(pattern.rows) * pattern.shape[1]


class Scores(Protocol):
    """What makes positions of a weight good ones to grow."""

    def at(self, positions: Tensor) -> Tensor:
        """Scores at int64 flat positions."""

    def best(self, count: int) -> Tensor:
        """int64, ascending: the positions of the `count` largest |scores|, of all if these are fewer."""


class _Dense:
    """One weight's gradient, flat."""

    def __init__(self, flat: Tensor):
        self._flat = flat

    def at(self, positions: Tensor) -> Tensor:
        return self._flat[positions]

    def best(self, count: int) -> Tensor:
        return select_topk(self._flat, min(count, len(self._flat)))


class _Growth:
    """One weight's entries that stay, and the candidates for the others' places.

    Args:
        moving: how many entries are dropped, and grown.
    """

    @torch.no_grad()
    def __init__(self, chosen: Selected, moving: int, tiles: str, team: Team):
        refresh_values(chosen)
        self._name, self._pattern, self._moving = chosen.name, chosen.pattern, moving
        self._tiles, self._team = tiles, team
        change = chosen.values.detach() - chosen.base.to(chosen.values.dtype)
        stays = select_topk(change, len(change) - moving)
        self._kept = chosen.pattern.indices()[stays]
        self._grid: Grid | None = None
        self._candidates: Tensor | None = None  # int64 flat positions, ascending
        self._alike = False  # whether the sums are those of all processes by themselves
        self._sums = change[:0]  # their gradients over this process's batches, fp32 (fp64 for fp64)

    @torch.no_grad()
    def add(self, gradient: Tensor) -> None:
        """Take one batch's gradient (of the weight's shape), which is not kept."""
        flat = gradient.reshape(-1)
        if self._candidates is None:
            wide = torch.promote_types(flat.dtype, torch.float32)
            over_all = flat if self._team.alone else self._team.add_up(flat.to(wide, copy=True), self._name)
            self._candidates = self._best_candidates(_Dense(over_all))
            self._sums = torch.zeros_like(self._candidates, dtype=wide)
        self._sums += flat[self._candidates]

    def look_at(self, scores: Scores) -> None:
        """Grow by these scores in place of gradients."""
        self._candidates = self._best_candidates(scores)
        self._sums = scores.at(self._candidates)
        self._alike = True

    def pattern(self) -> Pattern:
        """The next pattern; the present one if there was no gradient."""
        if self._candidates is None:
            return self._pattern
        sums = self._sums if self._alike else self._team.add_up(self._sums, self._name)
        grown = self._candidates[select_topk(sums, self._moving)]
        entries = torch.cat([self._kept, grown])
        if self._grid is not None:
            return self._grid.pattern_in_place(entries)
        return Pattern.from_indices(entries, self._pattern.shape, tile=self._pattern.tile)

    def _best_candidates(self, scores: Scores) -> Tensor:
        most = len(self._pattern)
        return self._best_in_tiles(scores, most) if self._tiles == "same" else self._best(scores, most)

    def _best(self, scores: Scores, count: int) -> Tensor:
        """The `count` positions with the largest |score| that do not stay anyway, ascending; fewer if there are no
        more. They are among the count + stays best of all."""
        return self._best_of(scores, scores.best(count + len(self._kept)), count)

    def _best_of(self, scores: Scores, positions: Tensor, count: int) -> Tensor:
        """As `_best`, among some positions, which ascend."""
        positions = positions[~torch.isin(positions, self._kept, assume_unique=True)]
        return positions[select_topk(scores.at(positions), min(count, len(positions)))]

    def _best_in_tiles(self, scores: Scores, count: int) -> Tensor:
        """As `_best`, inside the tiles of the entries that stay, and as many others, the best, as were left empty."""
        free = self._best(scores, self._moving)
        entries = torch.cat([self._kept, free])
        mass = torch.cat([torch.zeros_like(self._kept, dtype=torch.float64), scores.at(free).abs().double()])
        self._grid = grid = Grid(self._pattern.shape, self._pattern.tile, entries, mass, before=self._pattern)
        held = torch.bincount(grid.tiles_of(self._kept), minlength=len(grid.count)) > 0
        budget = max(len(self._pattern.tiles), int(held.sum()))
        keep = best_tiles(grid.mass.masked_fill(held, torch.inf), grid.count, grid.capacity, len(entries), budget)
        return self._best_of(scores, grid.positions(keep, entries.device), count)
