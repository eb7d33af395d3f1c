"""Entries drawn with chances in proportion to their scores, where the largest scores alone would choose too much alike.

The largest scores of a few batches lie where these batches agree, and what is selected there overlaps in what it can
learn; a draw keeps the preference and covers more (docs/quality.md, H20).
"""

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from sparseft.selection.criterion import Criterion

LEAST = 2.0**-25  # half the distance between two uniform fp32 numbers: no waiting time is zero


def sampled(criterion: Criterion) -> Criterion:
    """The criterion with entries drawn without replacement, each with a chance proportional to its |score|.

    Lines, blocks, channels and subnets are chosen by the scores as they are: their means leave little to chance.
    """
    return replace(criterion, sampled=True)


def race(scores: Tensor, name: str, seed: int) -> Tensor:
    """score / E of the same shape and dtype (fp32 or fp64), E exponential with mean 1: of these the k largest are a
    sample of k without replacement with chances proportional to |score| (Efraimidis & Spirakis, 2006; as "Gumbel
    top-k": Kool et al., 2019). Zeros stay zeros; they come last.
    """
    times = waiting_times(scores.shape, scores.dtype, generator(name, seed)).to(scores.device)
    most = torch.finfo(scores.dtype).max
    return torch.div(scores, times, out=times).clamp_(-most, most)


def waiting_times(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Exponential with mean 1 and positive, on the CPU: the same on every device."""
    uniform = torch.rand(shape, generator=generator, dtype=dtype)
    return uniform.neg_().log1p_().neg_().clamp_(min=LEAST)


def generator(name: str, seed: int) -> torch.Generator:
    """Random numbers for one weight: they depend on seed and name alone, not on the other weights."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))
