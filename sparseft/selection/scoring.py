"""Scores every weight and hands the scores to its budget, one weight at a time where that is possible."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.selection.budget import Budget, LineBudget
from sparseft.selection.criteria import Criterion
from sparseft.selection.gradients import Backward, is_finite
from sparseft.selection.inputs import Forward
from sparseft.selection.rows import RowBudget

AnyBudget = Budget | LineBudget | RowBudget

logger = logging.getLogger(__name__)


@dataclass
class Scoring:
    """One run of a criterion over some weights of a model.

    Args:
        weights: by name, in model order. `budgets`: the budget of each.
        dtype: of sums and scores.
        seed: for criteria and models that draw random numbers.
    """

    criterion: Criterion
    weights: dict[str, nn.Parameter]
    budgets: dict[str, AnyBudget]
    dtype: torch.dtype
    seed: int

    @torch.no_grad()
    def without_gradients(self) -> None:
        """Score every weight from its values alone."""
        self._log_buffer(several_batches=False)
        for name in self.weights:
            self._add(name, None)

    @torch.no_grad()
    def with_batches(self, run: Backward | Forward, batches: Iterable[Any]) -> None:
        """One pass per batch; scores are made from sums after the last, those of a single backward pass inside it."""
        totals: dict[str, Tensor] = {}
        added: set[str] = set()
        with run.prepared(self.seed):
            stream = iter(batches)  # in here, so that a shuffling loader draws from the seeded generator
            first = list(islice(stream, 2))
            if not first:
                raise ValueError("batches must hold at least one batch, got none")
            single = len(first) == 1 and isinstance(run, Backward)  # inputs may come in several parts
            self._log_buffer(several_batches=not single and isinstance(run, Backward))

            def take(name: str, part: Tensor) -> None:
                if name not in totals:
                    totals[name] = self._zeros(name, run)
                self._accumulate(totals[name], part)
                if single:
                    self._add(name, totals.pop(name))
                    added.add(name)

            for number, batch in enumerate(chain(first, stream)):
                run(number, batch, take)
        silent = [name for name in self.weights if name not in added and name not in totals]
        if silent:
            logger.warning("%d weights, the first %s, were not reached and score 0", len(silent), silent[0])
        for name in self.weights:
            if name not in added:
                self._add(name, totals.pop(name) if name in totals else self._zeros(name, run))

    def _accumulate(self, total: Tensor, part: Tensor) -> None:
        assert self.criterion.accumulate is not None
        self.criterion.accumulate(total, part)

    def _add(self, name: str, total: Tensor | None) -> None:
        weight = self.weights[name].detach()
        scores = self.criterion.score(name, weight, total, self.seed)
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"criterion must give scores of shape {tuple(weight.shape)} for {name}, got {got}")
        if not is_finite(scores):
            raise ValueError(f"criterion gives scores for {name} that are not finite")
        self.budgets[name].add(name, scores.to(self.dtype))

    def _zeros(self, name: str, run: Backward | Forward) -> Tensor:
        return torch.zeros(run.shape(name), dtype=self.dtype, device=self.weights[name].device)

    def _log_buffer(self, several_batches: bool) -> None:
        """Sums over batches become scores in place, so one buffer serves for both."""
        waiting = [w for name, w in self.weights.items() if several_batches or self.budgets[name].waits]
        size = sum(w.numel() for w in waiting) * self.dtype.itemsize
        logger.info("score buffer: %.1f MB for %d of %d weights", size / 1e6, len(waiting), len(self.weights))
