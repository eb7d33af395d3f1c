"""Which entries train: model + batches -> {weight name: Pattern}.

`weights.py` says which weights take part, `criteria.py` how their entries are scored (`criterion.py`: what a criterion
is). What criteria look at comes from runs over the batches: `gradients.py`, `tokens.py`, `inputs.py`, `training.py`.
`scoring.py` leads scores from there to the budgets, in as many passes as `sweeps.py` says. `shares.py` gives every
budget its weights and its k; `topk.py` keeps the best scores, `budget.py` packs the choice into tiles (`twice.py`:
without keeping scores), `rows.py` and `structured.py` choose by rows, blocks, heads and subnets.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparseft.layers import plain
from sparseft.pattern import Pattern
from sparseft.selection.arguments import STRUCTURES, allocation_of, check, check_batches
from sparseft.selection.budget import ALLOCATIONS, Allocation, Budget
from sparseft.selection.criteria import CRITERIA, find, gallop, losia, lottery
from sparseft.selection.criterion import Criterion
from sparseft.selection.draw import sampled
from sparseft.selection.lift import lift
from sparseft.selection.scoring import AnyBudget, Scoring
from sparseft.selection.shares import budget_of, groups_of, shares_of
from sparseft.selection.structured import couples
from sparseft.selection.sweeps import score_all
from sparseft.selection.targets import SHARE, Targets, output_embedding
from sparseft.selection.together import Team, agree, together
from sparseft.selection.topk import StreamingTopK
from sparseft.selection.twice import TwiceBudget
from sparseft.selection.weights import eligible, is_meant, vectors

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "STRUCTURES",
    "Allocation",
    "Criterion",
    "StreamingTopK",
    "eligible",
    "gallop",
    "lift",
    "losia",
    "lottery",
    "sampled",
    "select",
    "vectors",
]

logger = logging.getLogger(__name__)


def select(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    density: float = 0.01,
    criterion: str | Criterion | Callable[[str, Tensor, Tensor], Tensor] = "sampled",
    tile: tuple[int, int] = (64, 64),
    tile_budget: float = 0.1,
    allocation: str | Allocation = "layer",
    structure: str | None = None,
    k: int | None = None,
    memory: int | None = None,
    group: dist.ProcessGroup | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    train_norms: bool = True,
    train_targets: bool | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Pattern]:
    """Choose the entries with the largest scores, or draw some by their scores, packed into few tiles.

    First the `k = round(density * weights)` best entries of every budget are chosen freely. Each weight's rows and
    columns are then sorted by the score mass chosen in them, which gathers the choice in few tiles; the tiles with
    the most mass are kept, `tile_budget` of all tiles, and the same k is chosen again inside them. Equal scores go to
    the earlier weight and the lower flat position, equal masses to the lower row, column or tile.

    The model comes back as it was: gradients, requires_grad flags, buffers, and the state of the random generators.
    It runs in the mode it is in; in train mode dropout makes scores noisier, though not less repeatable, since the
    generators are seeded with `seed` meanwhile. The same model, batches and seed give the same patterns.

    Memory besides the model and its activations: one weight's gradient (and, to draw, as many random numbers), O(k),
    and, where scores must wait, a score buffer of 4 bytes per eligible entry (8 if a weight is fp64, more for some
    criteria), reported to the logger. Scores must wait when there are several batches, and when several weights share a
    budget with `tile_budget` < 1. `memory` bounds that buffer, at the price of more passes over the batches, and
    changes nothing in the result.

    Args:
        model: any module. Frozen weights may be selected too. A sparsified model is scored as it is now, all eligible
            entries alike: see `reselect` for what to do with the patterns.
        batches: mappings for `model(**batch)` with a loss, their tensors moved to the model's device; or anything that
            `loss_fn` takes. An iterable is read once. None for criteria that need no data.
        density: share of the eligible entries to select, in (0, 1].
        criterion: a name in CRITERIA, or a function (name, weight, gradient summed over batches) -> scores of the
            weight's shape, which are ranked by magnitude; with "sampled" entries are drawn with chances in proportion.
        tile: rows and columns of a tile, with at most 65536 entries.
        tile_budget: share of all tiles that may hold entries, in (0, 1]; 1.0 leaves the choice free. Never fewer
            tiles than k entries need.
        allocation: a name in ALLOCATIONS, or an Allocation: "global", one budget for all eligible weights; "layer",
            one for each; "row", the same number for each row of each weight (as [-1, last dimension]), within one;
            "kind", one for all q_proj, one for all down_proj and so on; "mixed", half of a global budget by size, half
            to the best entries. It applies to entries and to tiles.
        structure: "entries"; or whole "rows", "columns" or "rows-and-columns" (of the weight as [-1, last dimension]),
            "blocks" (the size of a tile) or "channels" (value heads with their output columns, MLP channels; only these
            weights are eligible then) with the largest mean |score|, as many as come closest to k; or a "subnet" of
            every weight, some rows times some columns. `tile_budget` has no say in these. None: the criterion's own.
        k: exactly so many entries in all, in place of `density`; budgets share them by their sizes.
        memory: bytes that the score buffer may take. Batches must then have a length: they are read once per group of
            weights whose sums fit, and all that twice where the scores of a budget do not fit.
        group: processes (of torch.distributed) that select together, each on its own batches: their sums are added up,
            and all get the same patterns. They must hold the same model, and all call.
        include, exclude: see `eligible`.
        train_norms: also select every entry of the norm and bias vectors (those that `exclude` leaves), on top of
            what `density` gives: a fraction of a per mille of most models' weights.
        train_targets: also select, on top, the rows of the output embedding of the most frequent tokens among the
            batches' "labels", at most a tenth as many entries as otherwise. None: where that is room for all of these
            tokens, as when the answers are labels of a list; the rows of some words of open text do not help
            (docs/quality.md, H10). Then also only where the model has such an embedding, which `exclude` leaves.
        loss_fn: (model, batch) -> scalar loss.
        seed: for draws and random scores, and for dropout during the backward passes; the same in all of a group.

    Returns:
        {parameter name: Pattern} in model order, without the weights in which nothing was selected.

    Raises:
        ValueError, TypeError: an argument does not fit, a batch gives no finite loss or no gradient, a score is not
            finite (the weight and the batch are named), or all are zero. The model is as it was.
        RuntimeError: another process of the group failed, or comes to other patterns.
    """
    model = plain(model)
    with together(group, model) as team:
        rule = find(criterion)
        shape = rule.structure if structure is None else structure
        rule = replace(rule, sampled=rule.sampled and shape == "entries")
        check(density, k, tile, tile_budget, allocation_of(allocation), shape)
        check_batches(rule, batches, memory)
        targets = _targets(model, batches, train_targets, exclude)
        batches = batches if targets is None else targets[1]
        weights = eligible(model, include, exclude)
        if not weights:
            raise ValueError(f"include={include!r} and exclude={exclude!r} leave no weight to select from")
        pairs = couples(model, weights) if shape == "channels" else []
        if pairs:
            coupled = {name for pair in pairs for name in (pair.producer, pair.consumer)}
            weights = {name: weight for name, weight in weights.items() if name in coupled}
        sharing = allocation_of(allocation)
        groups = groups_of(weights, sharing, pairs)
        shares = shares_of(weights, groups, density, k)
        edges = int(tile[0]), int(tile[1])

        def budgets_of(kind: type[Budget]) -> dict[str, AnyBudget]:
            made: dict[str, AnyBudget] = {}
            for names, share in zip(groups, shares, strict=True):
                if share:
                    members = {name: tuple(weights[name].shape) for name in names}
                    budget = budget_of(kind, shape, members, share, edges, tile_budget, sharing, pairs)
                    made |= dict.fromkeys(names, budget)
            return made

        budgets = budgets_of(Budget)
        weights = {name: weight for name, weight in weights.items() if name in budgets}
        dtype = torch.float64 if any(w.dtype == torch.float64 for w in weights.values()) else torch.float32
        scoring = Scoring(rule, weights, budgets, dtype, seed, team)
        score_all(scoring, model, batches, loss_fn, memory, lambda: budgets_of(TwiceBudget))
        budgets = scoring.budgets
        patterns = {name: budgets[name].patterns[name] for name in weights if name in budgets[name].patterns}
        if not patterns:
            asked = f"density {density}" if k is None else f"k={k}"
            raise ValueError(f"{asked} selects nothing: it is less than half of one of the {shape}")
        _check_masses(budgets)
        _report(patterns, set(budgets.values()))
        entries = sum(map(len, patterns.values()))
        if train_norms:
            patterns |= {
                name: _whole(vector, tile) for name, vector in vectors(model, exclude).items() if name not in patterns
            }
        if targets is not None:
            patterns |= _target_rows(
                *targets, patterns, int(SHARE * entries), tile, team, asked_for=bool(train_targets)
            )
        patterns = {name: patterns[name] for name, _ in model.named_parameters() if name in patterns}
        agree(team, patterns)
        return patterns


def _targets(
    model: nn.Module, batches: Any, wanted: bool | None, exclude: str | Sequence[str] | None
) -> tuple[str, Targets] | None:
    """The output embedding's name, and the batches as ones that count; None where no rows shall be or can be chosen."""
    found = None if wanted is False else output_embedding(model)
    if found is not None and exclude is not None and is_meant(model, found[1], exclude):
        if wanted:
            raise ValueError(f"train_targets: exclude={exclude!r} leaves out the output embedding {found[0]}")
        return None
    if wanted and found is None:
        raise ValueError(f"train_targets: {type(model).__name__} has no get_output_embeddings() with a weight")
    if wanted and batches is None:
        raise ValueError("train_targets: batches must be given, the rows are those of their labels")
    return None if found is None or batches is None else (found[0], Targets(batches, found[1]))


def _target_rows(name: str, targets: Targets, patterns: dict[str, Pattern], entries: int, tile: tuple[int, int],
                 team: Team, asked_for: bool) -> dict[str, Pattern]:  # fmt: skip
    targets.read()
    targets.add_up(team)
    if asked_for and not targets.counts.any():
        raise ValueError('train_targets: the batches hold no "labels" that are tokens of the vocabulary')
    if name in patterns or not (asked_for or targets.fit(entries)):
        return {}
    rows = targets.pattern(entries, tile)
    return {} if rows is None else {name: rows}


def _whole(weight: Tensor, tile: tuple[int, int]) -> Pattern:
    return Pattern.from_indices(torch.arange(weight.numel(), device=weight.device), weight.shape, tile=tile)


def _check_masses(budgets: dict[str, AnyBudget]) -> None:
    silent = [name for name, budget in budgets.items() if budget.free_mass == 0]
    if len(silent) == len(budgets):
        raise ValueError("criterion gives the score 0 to every entry: there is nothing to choose by")
    if silent:
        logger.warning("%d weights, the first %s, are in budgets without a score but 0: their first entries are taken",
                       len(silent), silent[0])  # fmt: skip


def _report(patterns: dict[str, Pattern], budgets: set[AnyBudget]) -> None:
    chosen, tiles = sum(map(len, patterns.values())), sum(len(p.tiles) for p in patterns.values())
    free, kept = sum(b.free_mass for b in budgets), sum(b.mass for b in budgets)
    logger.info(
        "selected %d entries in %d of %d tiles of %d weights; %.2f %% of the score mass of a free choice",
        chosen, tiles, sum(b.tiles for b in budgets), len(patterns), 100 * kept / free if free else 100.0,
    )  # fmt: skip
