"""Gated MLPs that keep nothing of the activation for the backward pass but its two inputs.

Written out in torch operations, as in `transformers`, down(act(gate(x)) * up(x)) keeps act(gate(x)) as well, for the
gradient of up(x): one more activation of the MLP's width for each layer. `lean_mlps` lets the MLPs of a model that
compute exactly that formula compute act again in the backward pass instead (as Liger-Kernel does: Hsu et al., 2024).
"""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparseft import backend

LAYERS = ("gate_proj", "up_proj", "down_proj")  # as the families after Llama name them; the activation is act_fn


class Activation(NamedTuple):
    """`forward(x)`, and `backward(grad, x)`, the gradient at x."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(
        partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")
    ),
}


class Gated(torch.autograd.Function):
    """act(gate) * up, both of the same shape and dtype; `act` names one of ACTIVATIONS."""

    @staticmethod
    def forward(ctx, gate, up, act):
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return ACTIVATIONS[act].forward(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        gate, up = ctx.saved_tensors
        act = ACTIVATIONS[ctx.act]
        need_gate, need_up, _ = ctx.needs_input_grad
        if ctx.act == "silu" and backend.runs_on_cpu_library(grad_out):  # of the factors' dtype
            flat = (t.reshape(-1).contiguous() for t in (grad_out, gate, up))
            grads = torch.ops.sparseft_cpu.silu_product_backward(*flat)
            return *(grad.view_as(gate) for grad in grads), None
        grad_gate = act.backward(grad_out * up, gate) if need_gate else None
        grad_up = act.forward(gate).mul_(grad_out) if need_up else None
        return grad_gate, grad_up, None


class LeanMLP(nn.Module):
    """Takes the class of a gated MLP for as long as the model is sparsified: same object, same layers, same numbers."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module
    plain: type[nn.Module]
    _act: str

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> the plain MLP's output, bit for bit."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if _has_hooks(self.act_fn) or gate.shape != up.shape or gate.dtype != up.dtype:
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(Gated.apply(gate, up, self._act))


def lean_mlps(model: nn.Module) -> None:
    """Let the gated MLPs of that formula in `model` keep less; all others stay as they are."""
    for module in model.modules():
        act = _activation(module)
        if act is not None:
            module.plain, module._act, module.__class__ = type(module), act, LeanMLP


def restore_mlp(module: LeanMLP) -> None:
    """Back to the class that the MLP had."""
    module.__class__ = module.plain
    del module.plain, module._act


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)  # fmt: skip


def _activation(module: nn.Module) -> str | None:
    """The activation of what looks like a gated MLP, by its children and a forward of one argument, and computes the
    formula; else None."""
    children = dict(module.named_children())
    if children.keys() != {*LAYERS, "act_fn"} or isinstance(module, LeanMLP):
        return None
    act = children["act_fn"]
    if module._parameters or module._buffers or _has_hooks(act) or any(True for _ in act.parameters()):
        return None
    if "forward" in module.__dict__ or len(inspect.signature(type(module).forward).parameters) != 2:
        return None
    return next((name for name in ACTIVATIONS if _same_formula(module, name)), None)


@torch.no_grad()
def _same_formula(module: nn.Module, act: str) -> bool:
    """Whether the module's own forward gives the same bits as the formula: small random layers in place of its own,
    random rows of three dtypes and three magnitudes."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.01, 1.0, 30.0], device="cpu").view(3, 1, 1)
    x = scale * torch.randn(3, 5, 7, generator=generator, device="cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layers = {name: _Random(7, 7, generator, dtype) for name in LAYERS}
        probe = copy.copy(module)
        probe._modules = {**module._modules, **layers}
        rows = x.to(dtype)
        try:
            theirs = type(module).forward(probe, rows)
        except Exception:  # somebody else's code, which may want other shapes: whatever it raises, it stays
            return False
        gate, up, down = (layers[name] for name in LAYERS)
        ours = down(Gated.apply(gate(rows), up(rows), act))
        if not (isinstance(theirs, Tensor) and theirs.dtype == ours.dtype and torch.equal(theirs, ours)):
            return False
    return True


class _Random(nn.Module):
    """A linear layer with random weights on the CPU, whatever the default device and dtype are."""

    def __init__(self, width: int, out: int, generator: torch.Generator, dtype: torch.dtype):
        super().__init__()
        self.matrix = torch.randn(width, out, generator=generator, device="cpu", dtype=torch.float32).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix
