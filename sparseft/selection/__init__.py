"""Which entries train: model + batches -> {weight name: Pattern}.

`weights.py` says which weights take part, `criteria.py` how their entries are scored, `gradients.py` runs backward
passes without keeping gradients, `inputs.py` forward passes for the layers' inputs, `scoring.py` leads scores from
there to the budgets, `topk.py` keeps the best of them, `budget.py` shares k entries among weights and packs them into
tiles.
"""

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.layers import computing_densely, plain
from sparseft.pattern import Pattern, check_tile
from sparseft.selection.budget import ALLOCATIONS, LINES, Allocation, Budget, LineBudget
from sparseft.selection.criteria import CRITERIA, Criterion, find, lift
from sparseft.selection.gradients import Backward
from sparseft.selection.inputs import Forward
from sparseft.selection.rows import RowBudget
from sparseft.selection.scoring import AnyBudget, Scoring
from sparseft.selection.topk import StreamingTopK
from sparseft.selection.weights import eligible, vectors

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "STRUCTURES",
    "Allocation",
    "Criterion",
    "StreamingTopK",
    "eligible",
    "lift",
    "select",
    "vectors",
]

logger = logging.getLogger(__name__)

STRUCTURES = ("entries", *LINES)


def select(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    density: float = 0.01,
    criterion: str | Criterion | Callable[[str, Tensor, Tensor], Tensor] = "grad",
    tile: tuple[int, int] = (64, 64),
    tile_budget: float = 0.1,
    allocation: str | Allocation = "global",
    structure: str = "entries",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    train_norms: bool = False,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Pattern]:
    """Choose the entries with the largest scores, packed into few tiles.

    First the `k = round(density * weights)` best entries of every budget are chosen freely. Each weight's rows and
    columns are then sorted by the score mass chosen in them, which gathers the choice in few tiles; the tiles with
    the most mass are kept, `tile_budget` of all tiles, and the same k is chosen again inside them. Equal scores go to
    the earlier weight and the lower flat position, equal masses to the lower row, column or tile.

    The model comes back as it was: gradients, requires_grad flags, buffers, and the state of the random generators.
    It runs in the mode it is in; in train mode dropout makes scores noisier, though not less repeatable, since the
    generators are seeded with `seed` meanwhile. The same model, batches and seed give the same patterns.

    Memory besides the model and its activations: one weight's gradient, O(k), and, where scores must wait, a score
    buffer of 4 bytes per eligible entry (8 if a weight is fp64), reported to the logger. Scores must wait when there
    are several batches, and when several weights share a budget with `tile_budget` < 1.

    Args:
        model: any module. Frozen weights may be selected too. A sparsified model is scored as it is now, all eligible
            entries alike: see `reselect` for what to do with the patterns.
        batches: mappings for `model(**batch)` with a loss, their tensors moved to the model's device; or anything that
            `loss_fn` takes. An iterable is read once. None for criteria that need no data.
        density: share of the eligible entries to select, in (0, 1].
        criterion: a name in CRITERIA, or a function (name, weight, gradient summed over batches) -> scores of the
            weight's shape, which are ranked by magnitude.
        tile: rows and columns of a tile, with at most 65536 entries.
        tile_budget: share of all tiles that may hold entries, in (0, 1]; 1.0 leaves the choice free. Never fewer
            tiles than k entries need.
        allocation: a name in ALLOCATIONS, or an Allocation: "global", one budget for all eligible weights; "layer",
            one for each; "row", the same number for each row of each weight (as [-1, last dimension]), within one;
            "kind", one for all q_proj, one for all down_proj and so on; "mixed", half of a global budget by size, half
            to the best entries. It applies to entries and to tiles.
        structure: "entries"; or whole "rows", "columns" or "rows-and-columns" (of the weight as [-1, last dimension])
            with the largest mean |score|, as many as come closest to k. Lines stay whole, so `tile_budget` has no say.
        include, exclude: see `eligible`.
        train_norms: also select every entry of the norm and bias vectors (those that `exclude` leaves), on top of
            what `density` gives: a fraction of a per mille of most models' weights.
        loss_fn: (model, batch) -> scalar loss.
        seed: for random scores, and for dropout during the backward passes.

    Returns:
        {parameter name: Pattern} in model order, without the weights in which nothing was selected.

    Raises:
        ValueError, TypeError: an argument does not fit, a batch gives no loss or no gradient, or a score is not
            finite (the weight and the batch are named). The model is as it was.
    """
    model = plain(model)
    rule = find(criterion)
    _check(density, tile, tile_budget, _allocation(allocation), structure)
    _check_batches(rule, batches)
    weights = eligible(model, include, exclude)
    if not weights:
        raise ValueError(f"include={include!r} and exclude={exclude!r} leave no weight to select from")
    budgets = _budgets(weights, density, tile, tile_budget, _allocation(allocation), structure)
    weights = {name: weight for name, weight in weights.items() if name in budgets}
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in weights.values()) else torch.float32
    scoring = Scoring(rule, weights, budgets, dtype, seed)
    if batches is None or rule.accumulate is None:
        scoring.without_gradients()
    else:
        with computing_densely(model):
            scoring.with_batches((Forward if rule.of_inputs else Backward)(model, weights, loss_fn), batches)
    patterns = {name: budgets[name].patterns[name] for name in weights if name in budgets[name].patterns}
    if not patterns:
        raise ValueError(f"density {density} selects nothing: it is less than half of one of the {structure}")
    _report(patterns, set(budgets.values()))
    if train_norms:
        patterns |= {
            name: _whole(vector, tile) for name, vector in vectors(model, exclude).items() if name not in patterns
        }
        patterns = {name: patterns[name] for name, _ in model.named_parameters() if name in patterns}
    return patterns


def _whole(weight: Tensor, tile: tuple[int, int]) -> Pattern:
    return Pattern.from_indices(torch.arange(weight.numel(), device=weight.device), weight.shape, tile=tile)


def _budgets(weights, density, tile, tile_budget, allocation: Allocation, structure) -> dict[str, AnyBudget]:
    """The budget of each weight; weights whose budget rounds to no entry are left out."""
    groups: dict[Hashable, list[str]] = {}
    for name in weights:
        groups.setdefault(allocation.budget(name), []).append(name)
    budgets: dict[str, AnyBudget] = {}
    for names in groups.values():
        members = {name: tuple(weights[name].shape) for name in names}
        k = round(density * sum(weights[name].numel() for name in names))
        if k:
            edges = int(tile[0]), int(tile[1])
            budget: AnyBudget
            if structure != "entries":
                budget = LineBudget(members, k, edges, LINES[structure])
            elif allocation.rows:
                budget = RowBudget(_only(names), members[names[0]], k, edges, tile_budget)
            else:
                budget = Budget(members, k, edges, tile_budget, allocation.floor)
            budgets.update(dict.fromkeys(names, budget))
    if not budgets:
        largest = max(sum(weights[name].numel() for name in names) for names in groups.values())
        raise ValueError(f"density {density} selects no entry: the largest budget has {largest} entries")
    return budgets


def _only(names: list[str]) -> str:
    if len(names) > 1:
        raise ValueError(f"allocation: with rows every weight has its own budget, {names[0]} and {names[1]} share one")
    return names[0]


def _allocation(allocation: str | Allocation) -> Allocation:
    if isinstance(allocation, Allocation):
        return allocation
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be an Allocation or one of {sorted(ALLOCATIONS)}, got {allocation!r}")
    return ALLOCATIONS[allocation]


def _check(density, tile, tile_budget, allocation: Allocation, structure) -> None:
    for name, share in (("density", density), ("tile_budget", tile_budget)):
        if not 0 < share <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {share}")
    if not 0 <= allocation.floor <= 1:
        raise ValueError(f"allocation.floor must lie in [0, 1], got {allocation.floor}")
    if structure not in STRUCTURES:
        raise ValueError(f"structure must be one of {list(STRUCTURES)}, got {structure!r}")
    if structure != "entries" and (allocation.floor or allocation.rows):
        what = "a floor goes" if allocation.floor else "rows go"
        raise ValueError(f"allocation: {what} by entries, and structure is {structure!r}")
    if allocation.floor and allocation.rows:
        raise ValueError("allocation: rows get their entries for certain; floor must be 0")
    check_tile(tile)


def _check_batches(rule: Criterion, batches) -> None:
    if rule.accumulate is None:
        return
    if batches is None:
        free = sorted(name for name, other in CRITERIA.items() if other.accumulate is None)
        raise ValueError(f"batches must be given: the criterion looks at data (those that do not: {free})")
    if isinstance(batches, Mapping | Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches, got {type(batches).__name__}; one batch: [batch]")


def _report(patterns: dict[str, Pattern], budgets: set[AnyBudget]) -> None:
    chosen, tiles = sum(map(len, patterns.values())), sum(len(p.tiles) for p in patterns.values())
    free, kept = sum(b.free_mass for b in budgets), sum(b.mass for b in budgets)
    logger.info(
        "selected %d entries in %d of %d tiles of %d weights; %.2f %% of the score mass of a free choice",
        chosen, tiles, sum(b.tiles for b in budgets), len(patterns), 100 * kept / free if free else 100.0,
    )  # fmt: skip
