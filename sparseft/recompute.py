"""Columns of a layer's input computed again in the backward pass, from tensors that autograd keeps for the operation
that made the input: then the layer has nothing of its own to keep. Bit for bit what the forward pass had; but for an
activation, whose last bit can depend on where in a vector of the processor a number stands.

    a norm's output     from the norm's input and 1/rms (`norms.RMSNorm`)
    an MLP's product    from the activation's input and the other factor (`gated.Gated`)
    any other product   from its factors
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseft import backend
from sparseft.gated import ACTIVATIONS, Gated
from sparseft.norms import RMSNorm


class Recompute:
    """How the columns of one input come back; once in a backward pass for all the layers that read it."""

    def __init__(self, formula: Callable[..., Tensor], chosen: Tensor, dtype: torch.dtype):
        self._formula, self._chosen, self._dtype = formula, chosen, dtype
        self.readers = 0
        self._waiting = 0  # readers that have not had the columns yet
        self._columns: Tensor | None = None

    def __call__(self, *kept: Tensor) -> Tensor:
        """[U, T] in the dtype that the layers compute in; `kept` as from `source`."""
        found = self._columns
        if found is None:
            self._columns = found = self._formula(self._chosen, *kept).to(self._dtype)
            self._waiting = self.readers
        self._waiting -= 1
        if self._waiting == 0:
            self._columns = None
        return found


def source(input: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]] | None:
    """Who can compute the columns of `input` [..., K] again, and from which saved tensors; None if nobody can.

    Asks the operation that made the input, unless the input was changed since (a write to its `.data` goes unnoticed)
    or hooks on saved tensors are active: then what it saved is somewhere else.
    """
    node = input.grad_fn
    if node is None or input._version or hooks_are_active():
        return None
    try:
        return _saved_by(node, input)
    except RuntimeError:  # its graph is freed, or what it saved was changed
        return None


def hooks_are_active() -> bool:
    """Whether saved tensors go through hooks: checkpointing, offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _saved_by(node: Any, input: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]] | None:
    if isinstance(node, RMSNorm._backward_cls):
        x, _, weight = kept = node.saved_tensors
        return (_of_norm, kept) if weight.numel() == x.shape[-1] else None  # else one number for all columns
    if isinstance(node, Gated._backward_cls):
        return partial(_of_gated, node.act), node.saved_tensors
    if node.name() == "MulBackward0":
        factors = node._saved_self, node._saved_other
        if all(f is not None and f.shape == input.shape and f.dtype == input.dtype for f in factors):
            return _of_product, factors
    return None


def _of_norm(chosen: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    if backend.runs_on_cpu_library(x) and weight.dtype == x.dtype:
        flat = x.detach().reshape(-1, x.shape[-1])
        return torch.ops.sparseft_cpu.norm_columns(flat, rstd.reshape(-1), weight.detach().contiguous(), chosen)
    normed = _of_matrix(x, chosen).to(rstd.dtype) * rstd.reshape(1, -1)
    return weight[chosen, None] * normed.to(x.dtype)


def _of_gated(act: str, chosen: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return ACTIVATIONS[act].forward(_of_matrix(gate, chosen)).mul_(_of_matrix(up, chosen))


def _of_product(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _of_matrix(a, chosen).mul_(_of_matrix(b, chosen))


def _of_matrix(x: Tensor, chosen: Tensor) -> Tensor:
    return columns(x.detach().reshape(-1, x.shape[-1]), chosen)


def columns(x: Tensor, chosen: Tensor) -> Tensor:
    """[U, T]: chosen columns (int32 [U]) of x [T, K] as rows."""
    if x.device.type == "cpu" and backend.has_cpu_library():
        return torch.ops.sparseft_cpu.columns(x, chosen)
    return x.index_select(1, chosen).T
