"""Attention whose backward pass on the CPU is one kernel (csrc/cpu/attention.cpp).

torch's own backward pass of `scaled_dot_product_attention` on the CPU multiplies blocks by a general routine that is
slow in bf16. `lean_attention` lets the attention layers of a model use `Attention` instead, where `transformers` would
call torch's function ("sdpa"): the forward pass is torch's, bit for bit, and no more than there is saved.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparseft import backend

MARK = "_sparseft_attention"  # attribute of a layer that computes with `Attention`
LARGEST = 1024  # numbers of a head that the kernel takes


class Attention(torch.autograd.Function):
    """softmax(query key^T scale) value: query [B, H, T, D], key and value [B, H / any, S, D], mask bool, broadcast to
    [B, H, T, S], or None; `causal`: query i sees keys 0 to i. Has no second derivative, as torch's."""

    @staticmethod
    def forward(ctx, query, key, value, mask, causal, scale):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=_bias(mask, query.dtype), scale=scale
        )
        ctx.save_for_backward(query, key, value, out, logsumexp, mask)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, out, logsumexp, mask = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: torch's gradients, which raise when they are differentiated
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out, query, key, value, out, logsumexp, 0.0, ctx.causal,
                attn_mask=_bias(mask, query.dtype), scale=ctx.scale,
            )  # fmt: skip
            return *grads, None, None, None
        if mask is not None:
            mask = mask.expand(*query.shape[:3], key.shape[2])
        if grad_out.stride(-1) != 1:
            grad_out = grad_out.clone(memory_format=torch.contiguous_format)
        grads = torch.ops.sparseft_cpu.attention_backward(
            grad_out, query, key, value, out, logsumexp, mask, ctx.causal, ctx.scale
        )
        return *(grad.transpose(1, 2) for grad in grads), None, None, None


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As torch turns a bool mask into what is added to the scores."""
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def lean_attention(model: nn.Module) -> None:
    """Let the attention layers in `model` that go through `transformers`' interface compute with `Attention`."""
    layers = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    if layers and install():
        for layer in layers:
            setattr(layer, MARK, True)


def plain_attention(model: nn.Module) -> None:
    """Undo `lean_attention`."""
    for module in model.modules():
        module.__dict__.pop(MARK, None)


_plain: Callable[..., tuple[Tensor, None]] | None = None  # transformers' own function


def install() -> bool:
    """Stand in front of `transformers`' "sdpa" function, for layers with the mark; False without transformers, or where
    somebody has registered another function."""
    global _plain
    if "transformers" not in sys.modules:
        return False
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward:
        _plain = sdpa_attention_forward
        AttentionInterface.register("sdpa", attention)
    return ALL_ATTENTION_FUNCTIONS["sdpa"] is attention


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `transformers` calls for "sdpa": arguments and result as its `sdpa_attention_forward`."""
    assert _plain is not None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    others = any(kwargs.get(name) is not None for name in ("position_bias", "softcap"))
    if dropout or others or not _fits(module, query, key, value, attention_mask, causal):
        return _plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                      is_causal=is_causal, **kwargs)  # fmt: skip
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    out = Attention.apply(query, key, value, attention_mask, causal, scaling)
    return out.transpose(1, 2).contiguous(), None


def _fits(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether a marked layer has something to gain and the kernel can compute it."""
    tensors = query, key, value
    if not getattr(module, MARK, False) or not all(backend.runs_on_cpu_library(t) for t in tensors):
        return False
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return False
    if not torch.backends.cuda.flash_sdp_enabled():  # of the CPU, too: the user wants torch's other formula
        return False
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != size or heads % max(1, key.shape[1]):
        return False
    if not (query.numel() and key.numel() and size <= LARGEST) or (causal and queries != keys):
        return False
    if torch.is_autocast_enabled("cpu"):  # it gives all three its dtype
        if torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return False
    elif not query.dtype == key.dtype == value.dtype:
        return False
    if any(t.stride(-1) != 1 for t in tensors):
        return False
    if mask is None:
        return True
    sizes = zip(mask.shape, (batch, heads, queries, keys), strict=False)
    return mask.dtype == torch.bool and mask.dim() == 4 and all(one in (1, whole) for one, whole in sizes)
