"""RMSNorm that keeps nothing for the backward pass but its input and 1/rms.

Written out in torch operations, as in `transformers`, a norm whose weight trains keeps its normalised input, too: one
more activation for each norm. `lean_norms` lets the norms of a model that compute exactly that formula compute it here.
"""

import copy
import inspect
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparseft import backend
from sparseft.lean import Lean, make_lean, may_become_lean, same_in_both_modes


class RMSNorm(torch.autograd.Function):
    """weight * (x / rms(x)), rounded to x's dtype before the weight comes (Llama's formula: the fp32 inside is part of
    it).

    `fixed`: the weight and epsilon; `trained`: what gets the weight's gradient, in its own dtype: its leaf, where that
    holds all of it in its order, or the weight itself. (Two tensor arguments and no more: see `layers.Fixed`.)
    """

    @staticmethod
    def forward(ctx, x, trained, fixed):
        weight, eps = fixed
        wide = x.to(torch.float32)
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, rstd, weight)
        ctx.dtype = trained.dtype
        return weight * (wide * rstd).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, rstd, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        if backend.runs_on_cpu_library(grad_out) and x.dtype == grad_out.dtype and x.shape[-1] == weight.numel():
            rows = (t.reshape(-1, weight.numel()).contiguous() for t in (grad_out, x))
            found = torch.ops.sparseft_cpu.rms_norm_backward(*rows, rstd.reshape(-1), weight.float().contiguous())
            return found[0].view_as(x) if need_x else None, found[1].to(ctx.dtype) if need_weight else None, None
        grad_x = grad_weight = None
        grad = grad_out.to(torch.float32)
        normed = x.to(torch.float32) * rstd
        if need_weight:
            grad_weight = (grad * normed).reshape(-1, weight.numel()).sum(0).to(ctx.dtype)
        if need_x:
            # y = w x / r, r = sqrt(mean x^2 + eps): dx = (w dy - y0 mean(w dy y0)) / r with y0 = x / r
            grad = grad * weight
            along = (grad * normed).mean(-1, keepdim=True)
            grad_x = grad.sub_(normed.mul_(along)).mul_(rstd).to(x.dtype)
        return grad_x, grad_weight, None


class LeanRMSNorm(Lean):
    """Computes with `RMSNorm`. Where all of the weight trains, its leaf `values` gets the gradient."""

    weight: nn.Parameter
    values: nn.Parameter

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> the plain norm's output, bit for bit."""
        if kwargs or len(args) != 1:
            args = inspect.signature(self._sparseft_plain.forward).bind(self, *args, **kwargs).args[1:]
        about = self.__dict__.get("_sparseft")
        whole = about is not None and not about["weight"]["gathers"]  # else a hook moves the weight's own gradient
        if not whole and self._sparseft_plain.forward is not type(self)._sparseft_forward:  # somebody patched it since
            return super().forward(*args)
        return RMSNorm.apply(args[0], self.values if whole else self.weight, (self.weight, self._sparseft_fixed))

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self._sparseft_fixed}"


def lean_norms(model: nn.Module) -> None:
    """Let the RMSNorms of Llama's formula in `model` keep less; all others stay as they are."""
    for module in model.modules():
        eps = _epsilon(module)
        if eps is not None and _same_formula(module, eps):
            make_lean(module, LeanRMSNorm, eps)


def _epsilon(module: nn.Module) -> float | None:
    """The epsilon of what looks like an RMSNorm: by its name, one weight vector, and a forward of one argument."""
    if not type(module).__name__.endswith("RMSNorm") or not may_become_lean(module):
        return None
    weight = module._parameters.get("weight")
    alone = len(module._parameters) == 1 and not module._buffers and not module._modules
    if not alone or weight is None or weight.dim() != 1 or weight.is_meta:
        return None
    if weight.dtype == torch.float64:  # the formula's fp32 inside: its gradients depend on the order of the roundings
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(eps) if isinstance(eps, Real) else None  # numpy's, from a GGUF file


@torch.no_grad()
def _same_formula(module: nn.Module, eps: float) -> bool:
    """Whether the module's own forward gives the same bits: a random weight, random rows of three dtypes and three
    magnitudes, the smallest near the square root of eps."""
    weight = module.get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([eps**0.5, 1.0, 30.0], device="cpu").view(3, 1, 1)
    x = scale * torch.randn(3, 5, len(weight), generator=generator, device="cpu")
    probe = copy.copy(module)
    random = torch.randn(len(weight), generator=generator, device="cpu")
    probe._parameters = {"weight": nn.Parameter(random.to(weight))}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # autocast brings others than the weight's
        rows = x.to(weight.device, dtype)
        theirs = partial(type(module).forward, probe, rows)
        if not same_in_both_modes(probe, theirs, partial(RMSNorm.apply, rows, probe.weight, (probe.weight, eps))):
            return False
    return True
