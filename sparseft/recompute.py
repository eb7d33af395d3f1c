"""Columns of a layer's input computed again in the backward pass, from tensors that autograd keeps for the operation
that made the input: then the layer has nothing of its own to keep. Bit for bit what the forward pass had.

    a norm's output     from the norm's input and 1/rms (`norms.RMSNorm`)
    a product           from its factors: the gated activation of an MLP
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseft import backend
from sparseft.norms import RMSNorm


class Recompute:
    """How the columns of one input come back from what its operation saved; once in a backward pass for all the layers
    that read it.

    The operation's node keeps that until its own turn, which comes after the layers': they save nothing. (Saving it
    again would cost no activation, but some hundred bytes in each layer's node: see `layers.Fixed`.)
    """

    def __init__(self, node: Any, chosen: Tensor, dtype: torch.dtype):
        self._node, self._chosen, self._dtype = node, chosen, dtype
        self.readers = 0
        self._waiting = 0  # readers that have not had the columns yet
        self._columns: Tensor | None = None

    def __call__(self) -> Tensor:
        """[U, T] in the dtype that the layers compute in. Raises RuntimeError, as autograd does: what was saved is
        freed, or was changed."""
        found = self._columns
        if found is None:
            formula, tensors = _formula(self._node)
            assert formula is not None  # `source` has seen to it
            self._columns = found = formula(self._chosen, *tensors).to(self._dtype)
            self._waiting = self.readers
        self._waiting -= 1
        if self._waiting == 0:
            self._columns = None
        return found


def source(input: Tensor) -> Any:
    """The node of the operation that made `input` [..., K], if the columns can be computed again from what that saved;
    None if not.

    Not if the input was changed since (a write to its `.data` goes unnoticed), or hooks on saved tensors are active:
    then what it saved is somewhere else.
    """
    node = input.grad_fn
    if node is None or input._version or hooks_are_active():
        return None
    try:
        formula, tensors = _formula(node)
    except RuntimeError:  # its graph is freed, or what it saved was changed
        return None
    if formula is _of_product and any(f is None or f.shape != input.shape or f.dtype != input.dtype for f in tensors):
        return None
    return node if formula is not None else None


def hooks_are_active() -> bool:
    """Whether saved tensors go through hooks: checkpointing, offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _formula(node: Any) -> tuple[Callable[..., Tensor] | None, tuple[Tensor, ...]]:
    """What computes columns of a node's output, and from which of its saved tensors; (None, ()) for other nodes."""
    if isinstance(node, RMSNorm._backward_cls):
        return _of_norm, node.saved_tensors
    if node.name() == "MulBackward0":
        return _of_product, (node._saved_self, node._saved_other)
    return None, ()


def _of_norm(chosen: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    normed = _of_matrix(x, chosen).to(rstd.dtype) * rstd.reshape(1, -1)
    return weight[chosen, None] * normed.to(x.dtype)


def _of_product(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _of_matrix(a, chosen).mul_(_of_matrix(b, chosen))


def _of_matrix(x: Tensor, chosen: Tensor) -> Tensor:
    return columns(x.detach().reshape(-1, x.shape[-1]), chosen)


def columns(x: Tensor, chosen: Tensor) -> Tensor:
    """[U, T]: chosen columns (int32 [U]) of x [T, K] as rows."""
    if x.device.type == "cpu" and backend.has_cpu_library():
        return torch.ops.sparseft_cpu.columns(x, chosen)
    return x.index_select(1, chosen).T
