"""LIFT's principal weights: a weight's entries in its best low-rank approximation."""

import torch
from torch import Tensor

from sparseft.selection.criterion import Criterion
from sparseft.selection.draw import generator


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
        basis = _range(matrix, min(2 * rank, *weight.shape[-2:]), generator(name, seed))
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
