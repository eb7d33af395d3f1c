"""RMSNorm that keeps nothing for the backward pass but its input and 1/rms.

Written out in torch operations, as in `transformers`, a norm whose weight trains keeps its normalised input, too: one
more activation for each norm. `lean_norms` lets the norms of a model that compute exactly that formula compute it here.
"""

import copy
import inspect
from numbers import Real

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparseft import backend


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
        if backend.runs_on_cpu_library(grad_out) and x.dtype == grad_out.dtype:
            rows = (t.reshape(-1, weight.numel()).contiguous() for t in (grad_out, x))
            found = torch.ops.sparseft_cpu.rms_norm_backward(*rows, rstd.reshape(-1), weight.to(torch.float32))
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


class LeanRMSNorm(nn.Module):
    """Takes the class of a norm for as long as the model is sparsified: same object, same weight, same numbers.

    Where all of the weight trains, its leaf `values` gets the gradient.
    """

    weight: nn.Parameter
    values: nn.Parameter
    plain: type[nn.Module]
    _eps: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x [..., K] -> the plain norm's output, bit for bit."""
        about = self.__dict__.get("_sparseft")
        whole = about is not None and not about["weight"]["gathers"]  # else a hook moves the weight's own gradient
        return RMSNorm.apply(hidden_states, self.values if whole else self.weight, (self.weight, self._eps))

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self._eps}"


def lean_norms(model: nn.Module) -> None:
    """Let the RMSNorms of Llama's formula in `model` keep less; all others stay as they are."""
    for module in model.modules():
        eps = _epsilon(module)
        if eps is not None and _same_formula(module, eps):
            module.plain, module._eps, module.__class__ = type(module), eps, LeanRMSNorm


def restore_norm(module: LeanRMSNorm) -> None:
    """Back to the class that the norm had."""
    module.__class__ = module.plain
    del module.plain, module._eps


def _epsilon(module: nn.Module) -> float | None:
    """The epsilon of what looks like an RMSNorm: by its name, one weight vector, and a forward of one argument."""
    if not type(module).__name__.endswith("RMSNorm") or isinstance(module, LeanRMSNorm):
        return None
    weight = module._parameters.get("weight")
    alone = len(module._parameters) == 1 and not module._buffers and not module._modules
    if not alone or weight is None or weight.dim() != 1 or weight.is_meta:
        return None
    if weight.dtype == torch.float64:  # the formula's fp32 inside: its gradients depend on the order of the roundings
        return None
    if "forward" in module.__dict__ or len(inspect.signature(type(module).forward).parameters) != 2:
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
        try:
            theirs = type(module).forward(probe, rows)
        except Exception:  # somebody else's code, which may want other shapes: whatever it raises, it stays
            return False
        ours = RMSNorm.apply(rows, probe.weight, (probe.weight, eps))
        if not (isinstance(theirs, Tensor) and theirs.dtype == ours.dtype and torch.equal(theirs, ours)):
            return False
    return True
