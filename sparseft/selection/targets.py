"""Rows of the output embedding: one per token that the model shall learn to say."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.pattern import Pattern
from sparseft.selection.gradients import IGNORED
from sparseft.selection.together import Team

SHARE = 0.1  # of the entries chosen otherwise: what the rows may have at most


class Targets:
    """Batches that count their target tokens the first time that they are read.

    Args:
        batches: mappings; those without "labels" count nothing.
        head: the weight of the output embedding, [vocabulary, hidden].
    """

    def __init__(self, batches: Iterable[Any], head: Tensor):
        self._batches, self._head = batches, head
        self._counted = False
        self.counts = torch.zeros(head.shape[0], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        counting, self._counted = not self._counted, True
        for batch in self._batches:
            if counting and isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
                self._count(batch["labels"].reshape(-1).cpu())
            yield batch

    def read(self) -> None:
        """Count now, if nobody has read the batches: a criterion that needs no data."""
        if not self._counted:
            for _ in self:
                pass

    def _count(self, labels: Tensor) -> None:
        labels = labels[labels != IGNORED]
        if labels.is_floating_point() or (
            len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.counts)
        ):
            return  # not tokens: the classes of another head
        self.counts += torch.bincount(labels, minlength=len(self.counts))

    def add_up(self, team: Team) -> None:
        """Counts over all processes, on all of them."""
        self.counts = team.add_up(self.counts.to(self._head.device), "counts of targets").cpu()

    def rows(self, entries: int) -> Tensor:
        """int64, ascending: the most frequent targets, as many as `entries` has room for at a row each.

        Of equally frequent tokens the one with the lower number comes first.
        """
        room = min(int((self.counts > 0).sum()), self._room(entries))
        return self.counts.argsort(descending=True, stable=True)[:room].sort().values

    def fit(self, entries: int) -> bool:
        """Whether `entries` has room for the rows of all targets."""
        return int((self.counts > 0).sum()) <= self._room(entries)

    def _room(self, entries: int) -> int:
        return entries // self._head.shape[1]

    def pattern(self, entries: int, tile: tuple[int, int]) -> Pattern | None:
        """These rows, whole; None if there are none."""
        rows, width = self.rows(entries), self._head.shape[1]
        if not len(rows):
            return None
        indices = (rows[:, None] * width + torch.arange(width)).reshape(-1)
        return Pattern.from_indices(indices.to(self._head.device), self._head.shape, tile=tile)


def output_embedding(model: nn.Module) -> tuple[str, nn.Parameter] | None:
    """The weight that makes logits, and its first name (an embedding's, where the two are tied); None where the model
    has none that can train (it must be a contiguous matrix)."""
    get_head = getattr(model, "get_output_embeddings", None)  # transformers' models have it
    head = getattr(get_head() if callable(get_head) else None, "weight", None)
    if not isinstance(head, nn.Parameter) or head.dim() != 2:
        return None
    names = [name for name, parameter in model.named_parameters() if parameter is head]
    return (names[0], head) if names and head.is_floating_point() and head.is_contiguous() else None
