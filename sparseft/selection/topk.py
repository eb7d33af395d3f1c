"""The k largest scores of many tensors that come one after another."""

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sparseft.ops import select_topk

Key = TypeVar("Key", bound=Hashable)


class StreamingTopK(Generic[Key]):
    """The exact k entries with the largest |score| among tensors added one at a time, in O(k) memory.

    An entry below the k-th best so far can never return, so at most 2k candidates stay (8 bytes each for fp32 scores
    that are not negative, 12 otherwise) and at most k join them in one call.

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
        # key -> |scores|, ascending positions (int32 where they fit), scores (the same tensor where none is negative)
        self._kept: dict[Key, tuple[Tensor, Tensor, Tensor]] = {}
        self._least: Tensor | None = None  # the k-th best score so far, once there are k

    def add(self, key: Key, score: Tensor, other: Tensor | None = None) -> None:
        """Take the scores of one tensor, or with `other` the products score * other; neither tensor is kept.

        Args:
            score: any shape; fp32, bf16, fp16 or fp64, finite; of the selected entries `signed` tells it again.
            other: the same shape.

        Raises:
            ValueError: the key was added before, or is not in `order`, or the shapes differ.
        """
        if key in self._kept or (self._rank is not None and key not in self._rank):
            raise ValueError(f"key must be {'one of order' if key not in self._kept else 'a new one'}, got {key!r}")
        if other is not None and other.shape != score.shape:
            raise ValueError(f"other must have score's shape {tuple(score.shape)}, got {tuple(other.shape)}")
        flat = score.detach().reshape(-1)
        second = [] if other is None else [other.detach().reshape(-1).to(flat.dtype)]
        if self._least is not None:
            position = (_magnitude(flat, second) >= self._least.to(flat.device)).nonzero().squeeze(1)
        else:
            position = torch.arange(len(flat), device=flat.device)
        if len(position) > self.k:
            position = select_topk(flat, self.k, "product" if second else "abs", second)
        signed = flat[position].to(torch.promote_types(flat.dtype, torch.float32))
        scores = _magnitude(signed, [factor[position] for factor in second])
        small = torch.int32 if len(flat) <= 2**31 else torch.int64
        self._kept[key] = (scores, position.to(small), scores if torch.equal(scores, signed) else signed)
        if sum(len(s) for s, *_ in self._kept.values()) > 2 * self.k:
            self._prune()

    def result(self) -> dict[Key, Tensor]:
        """int64 flat positions, ascending, of the selected entries; keys without any are left out.

        Together k entries, or all that were added if these are fewer.
        """
        return {key: position.long() for key, (_, position, _) in self._selected().items()}

    def scores(self) -> dict[Key, Tensor]:
        """The |scores| of the entries in `result`, fp32 (fp64 for fp64 scores)."""
        return {key: scores for key, (scores, *_) in self._selected().items()}

    def signed(self) -> dict[Key, Tensor]:
        """What `add` was given as `score` at the entries in `result`, in the dtype of `scores`."""
        return {key: signed for key, (_, _, signed) in self._selected().items()}

    def _selected(self) -> dict[Key, tuple[Tensor, Tensor, Tensor]]:
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
            stay = (mine - first).to(self._kept[key][0].device)
            scores, position, signed = self._kept[key]
            kept = scores[stay]
            self._kept[key] = (kept, position[stay], kept if signed is scores else signed[stay])
            scores = kept
            least += [scores.min().to(home)] if len(stay) else []
        self._least = torch.stack(least).min() if least else None


def _magnitude(flat: Tensor, factor: list[Tensor]) -> Tensor:
    """|flat|, or with a factor |flat * factor|, in fp32 or wider."""
    wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return (wide * factor[0].to(wide.dtype) if factor else wide).abs()
