"""The k largest scores of many tensors that come one after another."""

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sparseft.ops import select_topk

Key = TypeVar("Key", bound=Hashable)


class StreamingTopK(Generic[Key]):
    """The exact k entries with the largest |score| among tensors added one at a time, in O(k) memory.

    An entry below the k-th best so far can never return, so at most 2k candidates stay (12 bytes each for fp32
    scores) and at most k join them in one call.

    Args:
        k: how many entries to keep, over all tensors together.
        order: the keys in the order in which equal scores are preferred, whatever the order of adding; None: the
            order of adding. Inside a tensor the lower position is preferred.
    """

    def __init__(self, k: int, order: Sequence[Key] | None = None):
        if k < 0:
            raise ValueError(f"k must not be negative, got {k}")
        self.k = k
        self._rank = None if order is None else {key: rank for rank, key in enumerate(order)}
        self._kept: dict[Key, tuple[Tensor, Tensor]] = {}  # key -> (|scores|, ascending flat positions)
        self._least: Tensor | None = None  # the k-th best score so far, once there are k

    def add(self, key: Key, score: Tensor, other: Tensor | None = None) -> None:
        """Take the scores of one tensor, or with `other` the products score * other; neither is kept.

        Args:
            score: any shape; fp32, bf16, fp16 or fp64, finite. `other`: the same shape.

        Raises:
            ValueError: the key was added before, or is not in `order`, or the shapes differ.
        """
        if key in self._kept or (self._rank is not None and key not in self._rank):
            raise ValueError(f"key must be {'one of order' if key not in self._kept else 'a new one'}, got {key!r}")
        if other is not None and other.shape != score.shape:
            raise ValueError(f"other must have score's shape {tuple(score.shape)}, got {tuple(other.shape)}")
        scores = score.detach().reshape(-1).to(torch.promote_types(score.dtype, torch.float32))
        scores = scores.abs() if other is None else (scores * other.detach().reshape(-1)).abs()
        if len(scores) > self.k:
            position = select_topk(scores, self.k)
        elif self._least is None:
            position = torch.arange(len(scores), device=scores.device)
        else:
            position = (scores >= self._least.to(scores.device)).nonzero().squeeze(1)
        self._kept[key] = (scores[position], position)
        if sum(len(s) for s, _ in self._kept.values()) > 2 * self.k:
            self._prune()

    def result(self) -> dict[Key, Tensor]:
        """int64 flat positions, ascending, of the selected entries; keys without any are left out.

        Together k entries, or all that were added if these are fewer.
        """
        return {key: position for key, (_, position) in self._selected().items()}

    def scores(self) -> dict[Key, Tensor]:
        """The |scores| of the entries in `result`, fp32 (fp64 for fp64 scores)."""
        return {key: scores for key, (scores, _) in self._selected().items()}

    def _selected(self) -> dict[Key, tuple[Tensor, Tensor]]:
        self._prune()
        return {key: self._kept[key] for key in self._in_order() if len(self._kept[key][0])}

    def _in_order(self) -> list[Key]:
        return list(self._kept) if self._rank is None else sorted(self._kept, key=self._rank.__getitem__)

    def _prune(self) -> None:
        """Drop all but the k best candidates."""
        keys = self._in_order()
        lengths = [len(self._kept[key][0]) for key in keys]
        if sum(lengths) <= self.k:
            return
        home = self._kept[keys[0]][0].device  # the tensors may live on several devices
        best = select_topk([self._kept[key][0].to(home) for key in keys], self.k)
        end = torch.tensor(lengths, device=home).cumsum(0)
        shares = torch.diff(torch.searchsorted(best, end), prepend=end.new_zeros(1)).tolist()
        least = []
        for key, mine, first in zip(keys, best.split(shares), (end - end.new_tensor(lengths)).tolist(), strict=True):
            scores, position = self._kept[key]
            stay = (mine - first).to(scores.device)
            self._kept[key] = (scores[stay], position[stay])
            least += [scores[stay].min().to(home)] if len(stay) else []
        self._least = torch.stack(least).min() if least else None
