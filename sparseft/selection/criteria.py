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
            weight is fp64) starts at zero. None: no batch is needed, and the score gets None for `total`.
        of_inputs: in place of gradients `accumulate` gets the inputs [tokens, features] of the weight's layer, and
            `total` has one element per feature, along the weight's input dimension.
    """

    score: Callable[..., Tensor]
    accumulate: Callable[[Tensor, Tensor], object] | None = None
    of_inputs: bool = False


def _sum(total: Tensor, gradient: Tensor) -> None:
    total.add_(gradient)


def _sum_of_squares(total: Tensor, gradient: Tensor) -> None:
    total.addcmul_(gradient, gradient)  # squared in total's dtype


def _sum_of_squared_inputs(total: Tensor, inputs: Tensor) -> None:
    total.add_(inputs.to(total.dtype).square().sum(0).view_as(total))


def _wanda(name: str, weight: Tensor, total: Tensor, seed: int) -> Tensor:
    return weight.abs() * total.sqrt()


def _generator(name: str, seed: int) -> torch.Generator:
    """Depends on seed and name alone, not on the other weights."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def _random(name: str, weight: Tensor, total: None, seed: int) -> Tensor:
    """Uniform scores."""
    return torch.rand(weight.shape, generator=_generator(name, seed)).to(weight.device)


def lift(rank: int = 64, *, exact: bool = False) -> Criterion:
    """|W_r|, W_r the best approximation of rank r to the weight: LIFT's principal weights (Liu et al., 2025).

    Weights with more than two dimensions are stacks of matrices; a vector, or a matrix of no more than this rank, is
    its own approximation.

    Args:
        rank: r, in LIFT 32 to 128.
        exact: a full singular value decomposition, O(m n min(m, n)) for m x n, instead of the randomised range finder
            (2 r random directions, two power iterations: Halko et al., 2011, algorithms 4.4 and 5.1), O(m n r).

    Raises:
        ValueError: `rank` is not positive.
    """
    if rank < 1:
        raise ValueError(f"rank must be positive, got {rank}")

    def score(name: str, weight: Tensor, total: None, seed: int) -> Tensor:
        matrix = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if weight.dim() < 2 or min(weight.shape[-2:]) <= rank:
            return matrix
        if exact:
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
        basis = _range(matrix, min(2 * rank, *weight.shape[-2:]), _generator(name, seed))
        u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
        return basis @ ((u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :])

    return Criterion(score)


def _range(matrix: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """[..., m, size]: an orthonormal basis that nearly spans the leading left singular vectors."""
    start = torch.randn(matrix.shape[-1], size, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    return basis


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
    # |w| * |x|, x the input that w multiplies, its norm over all tokens: Wanda (Sun et al., 2024); ranked within
    # budgets instead of output rows
    "wanda": Criterion(_wanda, _sum_of_squared_inputs, of_inputs=True),
    # |W_r| of rank 64, by the randomised range finder and exactly
    "lift": lift(),
    "lift-exact": lift(exact=True),
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
