"""Scores every weight and hands the scores to its budget, one weight at a time where that is possible.

A criterion's sums over batches are a score buffer as large as the weights in fp32. Under a limit on its bytes the
weights are taken in groups, with one sweep over all batches for each; and scores that would have to wait for those of
the other weights in their budget are made twice instead (`TwiceBudget`). The result is the same.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.selection.budget import Budget, LineBudget
from sparseft.selection.criterion import Criterion, Run
from sparseft.selection.draw import race
from sparseft.selection.gradients import is_finite
from sparseft.selection.heap import HeapTrim
from sparseft.selection.rows import RowBudget
from sparseft.selection.structured import BlockBudget, ChannelBudget, SubnetBudget
from sparseft.selection.together import Team

logger = logging.getLogger(__name__)

AnyBudget = Budget | LineBudget | RowBudget | BlockBudget | SubnetBudget | ChannelBudget


@dataclass
class Scoring:
    """One run of a criterion over some weights of a model.

    Args:
        weights: by name, in model order. `budgets`: the budget of each.
        dtype: of sums and scores.
        seed: for draws, and for criteria and models that use random numbers.
        team: processes whose sums over batches are added up.
    """

    criterion: Criterion
    weights: dict[str, nn.Parameter]
    budgets: dict[str, AnyBudget]
    dtype: torch.dtype
    seed: int
    team: Team

    @torch.no_grad()
    def without_batches(self, names: Sequence[str]) -> None:
        """Score the weights `names` from their values alone."""
        self._log_buffer({})
        for name in names:
            self._add(name, None)

    @torch.no_grad()
    def with_batches(self, run: Run, batches: Iterable[Any], names: Sequence[str]) -> None:
        """One pass per batch for the weights `names`, those of the run, whose scores are handed over.

        Scores are made from sums after the last batch, those of a single backward pass inside it. Sums over batches
        become scores in place, so one buffer serves for both.
        """
        totals: dict[str, Tensor] = {}
        added: set[str] = set()
        with run.prepared(self.seed):
            stream = iter(batches)  # in here, so that a shuffling loader draws from the seeded generator
            first = list(islice(stream, 2))
            if not first:
                raise ValueError("batches must hold at least one batch, got none")
            single = len(first) == 1 and run.one_part and self.team.alone
            self._log_buffer({} if single else self.sum_bytes(run, names))

            heap, before = HeapTrim(), 0

            def take(name: str, part: Any) -> None:
                nonlocal before
                heap.freed(before)  # what the part before this one took is free by now
                before = self.weights[name].numel() * self.dtype.itemsize if self.weights[name].is_cpu else 0
                if name not in totals:
                    totals[name] = self._zeros(name, run)
                assert self.criterion.accumulate is not None
                self.criterion.accumulate(totals[name], part, self.weights[name].detach())
                if single:
                    self._add(name, totals.pop(name))
                    added.add(name)

            for number, batch in enumerate(chain(first, stream)):
                run(number, batch, take)
        silent = [name for name in names if name not in added and name not in totals]
        if silent:
            logger.warning("%d weights, the first %s, were not reached and score 0", len(silent), silent[0])
        for name in names:
            if name not in added:
                total = totals.pop(name) if name in totals else self._zeros(name, run)
                self._add(name, self.team.add_up(total, name))

    def sum_bytes(self, run: Run, names: Iterable[str]) -> dict[str, int]:
        """Bytes of these weights' sums over batches."""
        return {name: prod(self._state(name, run)) * self.dtype.itemsize for name in names}

    def buffer_bytes(self, sums: Mapping[str, int]) -> dict[str, int]:
        """Bytes that each weight's sum (`sum_bytes`), and after it its waiting scores, take."""
        held = {n: w.numel() * self.dtype.itemsize for n, w in self.weights.items() if self.budgets[n].waits}
        return {name: max(sums.get(name, 0), held.get(name, 0)) for name in self.weights if name in {*sums, *held}}

    def _add(self, name: str, total: Tensor | None) -> None:
        weight = self.weights[name].detach()
        scores = self.criterion.score(name, weight, total, self.seed)
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"criterion must give scores of shape {tuple(weight.shape)} for {name}, got {got}")
        if scores.is_complex():
            raise TypeError(f"criterion must give real scores for {name}, got {scores.dtype}")
        scores = scores.to(self.dtype)
        if not is_finite(scores):
            raise ValueError(f"criterion gives scores for {name} that are not finite in {self.dtype}")
        self.budgets[name].add(name, race(scores, name, self.seed) if self.criterion.sampled else scores)

    def _state(self, name: str, run: Run) -> tuple[int, ...]:
        shape = run.shape(name)
        return shape if self.criterion.state is None else self.criterion.state(shape)

    def _zeros(self, name: str, run: Run) -> Tensor:
        return torch.zeros(self._state(name, run), dtype=self.dtype, device=self.weights[name].device)

    def _log_buffer(self, sums: Mapping[str, int]) -> None:
        held = self.buffer_bytes(sums)
        logger.info("score buffer: %.1f MB for %d of %d weights", sum(held.values()) / 1e6, len(held),
                    len(self.weights))  # fmt: skip


def within(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names in their order, in as few groups as can be, each of at most `limit` bytes.

    Raises:
        ValueError: one of them takes more alone.
    """
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > limit:
            raise ValueError(f"memory must be at least {size} bytes, what the sums of {name} take, got {limit}")
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups
