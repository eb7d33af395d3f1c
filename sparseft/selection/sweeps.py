"""How many passes over the batches a selection takes under a limit on its score buffer, and the passes."""

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from sparseft.layers import computing_densely
from sparseft.selection.scoring import AnyBudget, Scoring, within
from sparseft.selection.twice import TwiceBudget

logger = logging.getLogger(__name__)


def score_all(
    scoring: Scoring, model: nn.Module, batches: Any, loss_fn: Callable | None, memory: int | None,
    twice: Callable[[], dict[str, AnyBudget]],
) -> None:  # fmt: skip
    """Score all weights and hand the scores to their budgets.

    Args:
        batches, loss_fn, memory: as in `select`.
        twice: makes the same budgets, those that wait as TwiceBudgets, where scores must not wait in memory.
    """
    rounds, sweeps = _plan(scoring, model, batches, loss_fn, memory)
    if rounds == 2:
        scoring.budgets = twice()
    for turn in range(rounds):
        for names in sweeps:
            names = [name for name in names if turn == 0 or isinstance(scoring.budgets[name], TwiceBudget)]
            if batches is None or scoring.criterion.accumulate is None:
                scoring.without_batches(names)
            elif names:
                with computing_densely(model):
                    run = scoring.criterion.run(model, {name: scoring.weights[name] for name in names}, loss_fn)
                    scoring.with_batches(run, batches, names)


def _plan(
    scoring: Scoring, model: nn.Module, batches: Any, loss_fn: Callable | None, memory: int | None
) -> tuple[int, list[list[str]]]:
    """How often all scores are made, and the groups of weights that each time take a pass over the batches."""
    everything = [list(scoring.weights)]
    if memory is None:
        return 1, everything
    looks = batches is not None and scoring.criterion.accumulate is not None
    run = scoring.criterion.run(model, scoring.weights, loss_fn) if looks else None
    streams = run is None or (run.one_part and len(batches) == 1 and scoring.team.alone)
    sums = {} if run is None or streams else scoring.sum_bytes(run, scoring.weights)
    if sum(scoring.buffer_bytes(sums).values()) <= memory:
        return 1, everything
    if run is not None and not run.in_groups and sum(sums.values()) > memory:
        raise ValueError(f"memory must be at least {sum(sums.values())} bytes: this criterion looks at all weights "
                         f"together; got {memory}")  # fmt: skip
    rounds = 2 if any(budget.waits for budget in scoring.budgets.values()) else 1
    sweeps = within(sums, memory) if sums else everything
    logger.info("memory: %d sweeps over the batches, %d for each of %d groups of weights", rounds * len(sweeps), rounds,
                len(sweeps))  # fmt: skip
    return rounds, sweeps
