"""Rows of the output embedding: one per token that the model shall learn to say."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.pattern import Pattern

IGNORED = -100  # PyTorch's label of a token without a loss


class Targets:
    """Counts the target tokens of batches on their way to somebody else.

    Args:
        head: the weight of the output embedding, [vocabulary, hidden].
    """

    def __init__(self, head: Tensor):
        self._head = head
        self.counts = torch.zeros(head.shape[0], dtype=torch.int64)

    def counted(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches, one by one; those without "labels" count nothing."""
        for batch in batches:
            if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
                labels = batch["labels"].reshape(-1).cpu()
                self.counts += torch.bincount(labels[labels != IGNORED], minlength=len(self.counts))
            yield batch

    def rows(self, entries: int) -> Tensor:
        """int64, ascending: the most frequent targets, as many as `entries` has room for at a row each.

        Of equally frequent tokens the one with the lower number comes first.
        """
        room = min(int((self.counts > 0).sum()), entries // self._head.shape[1])
        return self.counts.argsort(descending=True, stable=True)[:room].sort().values

    def pattern(self, entries: int, tile: tuple[int, int]) -> Pattern | None:
        """These rows, whole; None if there are none."""
        rows, width = self.rows(entries), self._head.shape[1]
        if not len(rows):
            return None
        indices = (rows[:, None] * width + torch.arange(width)).reshape(-1)
        return Pattern.from_indices(indices.to(self._head.device), self._head.shape, tile=tile)


def output_embedding(model: nn.Module) -> tuple[str, nn.Parameter] | None:
    """The weight that makes logits, and its first name (an embedding's, where the two are tied); None without one."""
    get_head = getattr(model, "get_output_embeddings", None)  # transformers' models have it
    head = get_head() if callable(get_head) else None
    weight = getattr(head, "weight", None)
    names = [name for name, parameter in model.named_parameters() if parameter is weight]
    return (names[0], weight) if names else None
