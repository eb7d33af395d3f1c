"""How entries are scored. A criterion is one entry of the table at the end."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Criterion:
    """Entries with the largest |score| are selected.

    Args:
        score: (name, weight, total, seed) -> scores of the weight's shape; may be computed in place in `total`.
        accumulate: (total, gradient) adds one batch's gradient to `total`, in place; `total` (fp32, fp64 if a
            weight is fp64) starts at zero. None: no gradient is needed, and the score gets None for `total`.
    """

    score: Callable[..., Tensor]
    accumulate: Callable[[Tensor, Tensor], object] | None = None


def _sum(total: Tensor, gradient: Tensor) -> None:
    total.add_(gradient)


def _sum_of_squares(total: Tensor, gradient: Tensor) -> None:
    total.addcmul_(gradient, gradient)  # squared in total's dtype


def _random(name: str, weight: Tensor, total: None, seed: int) -> Tensor:
    """Uniform scores that depend on seed, name and shape alone, not on the other weights."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return torch.rand(weight.shape, generator=generator).to(weight.device)


CRITERIA: dict[str, Criterion] = {
    # |sum over batches of g|: SIFT (Song et al., 2024), SHiRA-Grad (Bhardwaj et al., 2024)
    "grad": Criterion(lambda name, weight, total, seed: total, _sum),
    # |w * sum over batches of g|: SNIP (Lee et al., 2019), first-order Taylor (Molchanov et al., 2017)
    "taylor": Criterion(lambda name, weight, total, seed: total.mul_(weight), _sum),
    # sum over batches of g^2, g the batch's mean gradient: RoSA's mean_squared (Nikdan et al., 2024); with batches
    # of one sample the empirical Fisher diagonal of FISH (Sung et al., 2021)
    "fisher": Criterion(lambda name, weight, total, seed: total, _sum_of_squares),
    # |w|: SHiRA-WM (Bhardwaj et al., 2024)
    "magnitude": Criterion(lambda name, weight, total, seed: weight),
    # uniform: SHiRA-Rand (Bhardwaj et al., 2024)
    "random": Criterion(_random),
}


def find(criterion: str | Criterion | Callable[[str, Tensor, Tensor], Tensor]) -> Criterion:
    """A criterion by its name; a function (name, weight, summed gradient) -> scores becomes one.

    Raises:
        ValueError: no criterion has that name.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if callable(criterion):
        return Criterion(lambda name, weight, total, seed: criterion(name, weight, total), _sum)
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be a function or one of {sorted(CRITERIA)}, got {criterion!r}")
    return CRITERIA[criterion]
