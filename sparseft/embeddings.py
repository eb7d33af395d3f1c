"""An embedding of which a few rows train, without a dense gradient of the vocabulary's size."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparseft.pattern import Pattern

# A token's one-hot vector over the trained rows is as long as there are such rows; beyond this share of the vocabulary
# gathering from a dense gradient is no more expensive.
MOST_ROWS = 1 / 8


class MaskedEmbedding(torch.autograd.Function):
    """weight[ids] with the gradient of the weight only at `values`' entries, as a product of one-hot rows with the
    output's gradient: deterministic on every device, of shapes that do not depend on the ids."""

    @staticmethod
    def forward(ctx, ids, values, weight, padding_idx, rows, cols, tiles, local, tile):
        ctx.tile, ctx.padding_idx = tile, padding_idx
        ctx.save_for_backward(ids, rows, cols, tiles, local)
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        ids, rows, cols, tiles, local = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return (None,) * 9
        tokens = ids.reshape(-1, 1)
        one_hot = tokens == rows
        if ctx.padding_idx is not None:
            one_hot = one_hot & (tokens != ctx.padding_idx)
        left, right = one_hot.to(grad_out.dtype), grad_out.reshape(-1, grad_out.shape[-1])
        grad = torch.ops.sparseft.masked_grad(left, right, None, cols, tiles, local, ctx.tile)
        return None, grad, *[None] * 7


def trains_by_rows(module: nn.Module, pattern: Pattern) -> bool:
    """Whether `MaskedEmbedding` can stand in for this module's forward, and is worth it."""
    return (
        type(module) is nn.Embedding  # subclasses may compute otherwise
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
        and len(pattern.rows) <= MOST_ROWS * pattern.shape[0]
    )
