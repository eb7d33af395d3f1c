"""Gated MLPs that keep nothing of the activation for the backward pass but its two inputs.

Written out in torch operations, as in `transformers`, down(act(gate(x)) * up(x)) keeps act(gate(x)) as well, for the
gradient of up(x): one more activation of the MLP's width for each layer. `lean_mlps` lets the MLPs of a model that
compute exactly that formula compute act again in the backward pass instead (as Liger-Kernel does: Hsu et al., 2024).
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparseft import backend
from sparseft.lean import Lean, make_lean, may_become_lean, same_in_both_modes

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
    """act(gate) * up, both of the same shape and dtype; `act` names one of ACTIVATIONS. Has no second derivative."""

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


class LeanMLP(Lean):
    """Where nothing but the activation that was probed would be called, and x is all that is given, computes with
    `Gated`; else as ever."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> the plain MLP's output, bit for bit."""
        act, activation = self._sparseft_fixed
        same = type(self.act_fn) is activation and self._sparseft_plain.forward is type(self)._sparseft_forward
        if kwargs or len(args) != 1 or not same or not _calls_nobody(self.act_fn):
            return super().forward(*args, **kwargs)
        gate, up = self.gate_proj(args[0]), self.up_proj(args[0])
        if gate.shape != up.shape or gate.dtype != up.dtype:
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(Gated.apply(gate, up, act))


def lean_mlps(model: nn.Module) -> None:
    """Let the gated MLPs of that formula in `model` keep less; all others stay as they are."""
    for module in model.modules():
        act = _activation(module)
        if act is not None:
            make_lean(module, LeanMLP, (act, type(module.act_fn)))


def _calls_nobody(act: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else."""
    hooks = act._forward_hooks or act._forward_pre_hooks or act._backward_hooks or act._backward_pre_hooks
    return not (hooks or nn.modules.module._has_any_global_hook() or "forward" in act.__dict__)


def _activation(module: nn.Module) -> str | None:
    """The activation of what looks like a gated MLP, by its children and a forward of one argument, and computes the
    formula; else None."""
    children = dict(module.named_children())
    if children.keys() != {*LAYERS, "act_fn"} or not may_become_lean(module):
        return None
    act = children["act_fn"]
    known = (*module._parameters, *module._buffers, *act.parameters(), *act.buffers())
    if known or not _calls_nobody(act):
        return None
    return next((name for name in ACTIVATIONS if _same_formula(module, name)), None)


@torch.no_grad()
def _same_formula(module: nn.Module, act: str) -> bool:
    """Whether the module's own forward gives the same bits as the formula: small random layers in place of its own,
    random rows of four dtypes and four magnitudes, of which the last overflows fp16."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.01, 1.0, 30.0, 1e4], device="cpu").view(4, 1, 1)
    x = scale * torch.randn(4, 5, 7, generator=generator, device="cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        layers = {name: _Times(torch.randn(7, generator=generator, device="cpu").to(dtype)) for name in LAYERS}
        probe = copy.copy(module)
        probe._modules = {**module._modules, **layers}
        rows = x.to(dtype)
        theirs, ours = partial(type(module).forward, probe, rows), partial(_formula, layers, rows, act)
        if not same_in_both_modes(probe, theirs, ours):
            return False
    return True


def _formula(layers: dict[str, nn.Module], x: Tensor, act: str) -> Tensor:
    gate, up, down = (layers[name] for name in LAYERS)
    return down(Gated.apply(gate(x), up(x), act))


class _Times(nn.Module):
    """x times a vector: a layer that mixes nothing, so that what overflows stays where it is."""

    def __init__(self, vector: Tensor):
        super().__init__()
        self.vector = vector

    def forward(self, x: Tensor) -> Tensor:
        return x * self.vector
