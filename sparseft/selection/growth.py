"""Drop and grow: in every weight the entries that changed least make room for those with the largest gradients."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.layers import Selected, computing_densely, plain, refresh_values, selected
from sparseft.ops import select_topk
from sparseft.pattern import Pattern
from sparseft.selection.budget import Grid, best_tiles
from sparseft.selection.gradients import Backward

TILES = ("same", "free")


def drop_and_grow(
    model: nn.Module,
    batches: Iterable[Any],
    fraction: float,
    *,
    tiles: str = "same",
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
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

    Returns:
        {parameter name: Pattern} of all sparsified weights.

    Raises:
        ValueError, TypeError: an argument does not fit, the model is not sparsified, a batch gives no loss or no
            gradient, or one that is not finite. The model is as it was.
    """
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
            growths[name] = _Growth(chosen, moving, tiles)
    if growths:
        run = Backward(plain(model), {name: now[name].weight for name in growths}, loss_fn)
        with computing_densely(model), run.prepared(seed):
            for number, batch in enumerate(batches):
                run(number, batch, lambda name, gradient: growths[name].add(gradient))
    return {name: growths[name].pattern() if name in growths else chosen.pattern for name, chosen in now.items()}


def _whole_rows(pattern: Pattern) -> bool:
    """Whether rows train whole, as vectors and the rows of target tokens do."""
    return len(pattern) == len(pattern.rows) * pattern.shape[1]


class _Growth:
    """One weight's entries that stay, and the candidates for the others' places.

    Args:
        moving: how many entries are dropped, and grown.
    """

    @torch.no_grad()
    def __init__(self, chosen: Selected, moving: int, tiles: str):
        refresh_values(chosen)
        self._pattern, self._moving, self._tiles = chosen.pattern, moving, tiles
        change = chosen.values.detach() - chosen.base.to(chosen.values.dtype)
        stays = select_topk(change, len(change) - moving)
        self._kept = chosen.pattern.indices()[stays]
        self._grid: Grid | None = None
        self._candidates: Tensor | None = None  # int64 flat positions, ascending
        self._sums = change[:0]  # their gradients, fp32 (fp64 for fp64)

    @torch.no_grad()
    def add(self, gradient: Tensor) -> None:
        """Take one batch's gradient (of the weight's shape), which is not kept."""
        flat = gradient.reshape(-1)
        if self._candidates is None:
            self._candidates = self._best_in_tiles(flat) if self._tiles == "same" else self._best(flat, self._most)
            self._sums = torch.zeros_like(self._candidates, dtype=torch.promote_types(flat.dtype, torch.float32))
        self._sums += flat[self._candidates]

    def pattern(self) -> Pattern:
        """The next pattern; the present one if there was no gradient."""
        if self._candidates is None:
            return self._pattern
        grown = self._candidates[select_topk(self._sums, self._moving)]
        entries = torch.cat([self._kept, grown])
        if self._grid is not None:
            return self._grid.pattern_in_place(entries)
        return Pattern.from_indices(entries, self._pattern.shape, tile=self._pattern.tile)

    @property
    def _most(self) -> int:
        """How many candidates there are, where there is room."""
        return len(self._pattern)

    def _best(self, scores: Tensor, count: int) -> Tensor:
        """The `count` positions with the largest |score| that do not stay anyway, ascending; fewer if there are no
        more. They are among the count + stays best of all."""
        best = select_topk(scores, min(count + len(self._kept), len(scores)))
        best = best[~torch.isin(best, self._kept, assume_unique=True)]
        return best[select_topk(scores[best], min(count, len(best)))]

    def _best_in_tiles(self, scores: Tensor) -> Tensor:
        """As `_best`, inside the tiles of the entries that stay, and as many others, the best, as were left empty."""
        free = self._best(scores, self._moving)
        entries = torch.cat([self._kept, free])
        mass = torch.cat([torch.zeros_like(self._kept, dtype=torch.float64), scores[free].abs().double()])
        self._grid = grid = Grid(self._pattern.shape, self._pattern.tile, entries, mass, before=self._pattern)
        held = torch.bincount(grid.tiles_of(self._kept), minlength=len(grid.count)) > 0
        budget = max(len(self._pattern.tiles), int(held.sum()))
        keep = best_tiles(grid.mass.masked_fill(held, torch.inf), grid.count, grid.capacity, len(entries), budget)
        inside = grid.positions(keep, scores.device)
        inside = inside[~torch.isin(inside, self._kept, assume_unique=True)]
        return inside[select_topk(scores[inside], min(self._most, len(inside)))]
