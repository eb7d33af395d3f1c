"""The k largest scores of many tensors that come one after another."""

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sparseft.ops import select_topk

Key = TypeVar("Key", bound=Hashable)


class StreamingTopK(Generic[Key]):
    """The exact k entries with the largest |score| among tensors added one at a time, in O(k) memory.

    An entry below the k-th best so far can never return, so at most 2k candidates stay and at most k join them in one
    call. They lie in buffers of 8 bytes per candidate (fp32 scores; 12 once one is negative) on the first tensor's
    device. (Small tensors of their own, left between the large ones that come and go, would keep the C library from
    using that memory again.)

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
        self._counts: dict[Key, int] = {}  # candidates per key, in the order in which they lie in the buffers
        self._devices: dict[Key, torch.device] = {}
        self._scores = torch.empty(0)  # |scores|; what lies behind the candidates is free
        self._positions = torch.empty(0, dtype=torch.int32)  # ascending for each key; int64 once a tensor needs it
        self._signed: Tensor | None = None  # scores, once one of them is negative
        self._least: Tensor | None = None  # the k-th best score so far, once there are k

    def add(self, key: Key, score: Tensor, other: Tensor | None = None) -> None:
        """Take the scores of one tensor, or with `other` the products score * other; neither tensor is kept.

        Args:
            score: any shape; fp32, bf16, fp16 or fp64, finite; of the selected entries `signed` tells it again.
            other: the same shape.

        Raises:
            ValueError: the key was added before, or is not in `order`, or the shapes differ.
        """
        if key in self._counts or (self._rank is not None and key not in self._rank):
            raise ValueError(f"key must be {'one of order' if key not in self._counts else 'a new one'}, got {key!r}")
        if other is not None and other.shape != score.shape:
            raise ValueError(f"other must have score's shape {tuple(score.shape)}, got {tuple(other.shape)}")
        flat = score.detach().reshape(-1)
        second = [] if other is None else [other.detach().reshape(-1).to(flat.dtype)]
        position = None if self._least is None else self._reaching(flat, second)
        if (len(flat) if position is None else len(position)) > self.k:
            position = select_topk(flat, self.k, "product" if second else "abs", second)
        elif position is None:
            position = torch.arange(len(flat), device=flat.device)
        signed = flat[position].to(torch.promote_types(flat.dtype, torch.float32))
        scores = _magnitude(signed, [factor[position] for factor in second])
        self._append(key, scores, position, signed, len(flat))
        if sum(self._counts.values()) > 2 * self.k:
            self._prune()

    def _reaching(self, flat: Tensor, second: list[Tensor]) -> Tensor:
        """Flat positions of the scores that are at least the k-th best so far."""
        assert self._least is not None
        return (_magnitude(flat, second) >= self._least.to(flat.device)).nonzero().squeeze(1)

    def result(self) -> dict[Key, Tensor]:
        """int64 flat positions, ascending, of the selected entries; keys without any are left out.

        Together k entries, or all that were added if these are fewer.
        """
        return self._selected(self._positions, torch.int64)

    def scores(self) -> dict[Key, Tensor]:
        """The |scores| of the entries in `result`, fp32 (fp64 for fp64 scores)."""
        return self._selected(self._scores, self._scores.dtype)

    def signed(self) -> dict[Key, Tensor]:
        """What `add` was given as `score` at the entries in `result`, in the dtype of `scores`."""
        return self._selected(self._scores if self._signed is None else self._signed, self._scores.dtype)

    def _selected(self, buffer: Tensor, dtype: torch.dtype) -> dict[Key, Tensor]:
        self._prune()
        places = self._places()
        return {key: buffer[places[key]].to(self._devices[key], dtype, copy=True)
                for key in self._in_order() if self._counts[key]}  # fmt: skip

    def _in_order(self) -> list[Key]:
        return list(self._counts) if self._rank is None else sorted(self._counts, key=self._rank.__getitem__)

    def _places(self) -> dict[Key, slice]:
        places, start = {}, 0
        for key, count in self._counts.items():
            places[key] = slice(start, start + count)
            start += count
        return places

    def _append(self, key: Key, scores: Tensor, position: Tensor, signed: Tensor, size: int) -> None:
        """Copy the candidates of a tensor of `size` entries behind the others."""
        if not self._counts:
            self._scores, self._positions = self._scores.to(scores.device), self._positions.to(scores.device)
        start = sum(self._counts.values())
        end = start + len(scores)
        self._counts[key], self._devices[key] = len(scores), scores.device
        wide = torch.promote_types(self._scores.dtype, scores.dtype)
        room = len(self._scores) if end <= len(self._scores) else max(end, min(2 * len(self._scores), 3 * self.k))
        self._scores = _grown(self._scores, room, wide)
        self._positions = _grown(self._positions, room, self._positions.dtype if size <= 2**31 else torch.int64)
        if self._signed is None and not torch.equal(scores, signed):
            self._signed = self._scores.clone()
        if self._signed is not None:
            self._signed = _grown(self._signed, room, wide)
            self._signed[start:end] = signed
        self._scores[start:end] = scores
        self._positions[start:end] = position

    def _prune(self) -> None:
        """Drop all but the k best candidates; the rest lies in order then."""
        if sum(self._counts.values()) <= self.k:
            return
        keys, places = self._in_order(), self._places()
        lengths = [self._counts[key] for key in keys]
        best = select_topk([self._scores[places[key]] for key in keys], self.k)
        end = torch.tensor(lengths, device=best.device).cumsum(0)
        shares = torch.diff(torch.searchsorted(best, end), prepend=end.new_zeros(1)).tolist()
        firsts = (end - end.new_tensor(lengths)).tolist()
        for key, mine, first in zip(keys, best.split(shares), firsts, strict=True):
            mine += places[key].start - first  # from the place in order to that in the buffers
        for buffer in (self._scores, self._positions, self._signed):
            if buffer is not None:
                buffer[: self.k] = buffer[best]
        self._counts = dict(zip(keys, shares, strict=True))
        self._least = self._scores[: self.k].min() if self.k else None


def _grown(buffer: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """The buffer with at least so much room, and its content; the same one where that fits."""
    if len(buffer) >= size and buffer.dtype == dtype:
        return buffer
    grown = torch.empty(size, dtype=dtype, device=buffer.device)
    grown[: len(buffer)] = buffer
    return grown


def _magnitude(flat: Tensor, factor: list[Tensor]) -> Tensor:
    """|flat|, or with a factor |flat * factor|, in fp32 or wider."""
    wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return (wide * factor[0].to(wide.dtype) if factor else wide).abs()
