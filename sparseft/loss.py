"""The causal language model's loss that keeps nothing for the backward pass but the logits.

Written out in torch operations, as in `transformers`, it holds the logits in fp32, the logarithms of all probabilities
and two gradients of their size at once: with a large vocabulary and short sequences more than all the rest of a step
(SmolLM2-135M, 512 tokens: 100 MB each). `lean_loss` lets a model compute it row by row from the logits as they are, as
Liger-Kernel does (Hsu et al., 2024); on the CPU (csrc/cpu/cross_entropy.cpp), and elsewhere as before.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseft import backend


class CrossEntropy(torch.autograd.Function):
    """Each row's cross-entropy: logits [N, C] fp32 or bf16, labels int64 [N] -> fp32 [N], 0 where the label is
    `ignored`."""

    @staticmethod
    def forward(ctx, logits, labels, ignored):
        losses, logsumexp = torch.ops.sparseft_cpu.cross_entropy(logits, labels, ignored)
        ctx.save_for_backward(logits, labels, logsumexp)
        ctx.ignored = ignored
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        logits, labels, logsumexp = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: somebody wants to differentiate the gradient
            losses = F.cross_entropy(logits.float(), labels, ignore_index=ctx.ignored, reduction="none")
            return *torch.autograd.grad(losses, logits, grad_losses, create_graph=True), None, None
        grads = grad_losses.contiguous(), logits, labels, logsumexp
        return torch.ops.sparseft_cpu.cross_entropy_backward(*grads, ctx.ignored), None, None


def lean_loss(model: nn.Module) -> None:
    """Let the models of `transformers` in `model` whose loss is ForCausalLMLoss compute it with `CrossEntropy`."""
    for module in model.modules():
        if _has_plain_loss(module):
            module.loss_function = causal_lm_loss


def plain_loss(model: nn.Module) -> None:
    """Undo `lean_loss`."""
    for module in model.modules():
        if module.__dict__.get("_loss_function") is causal_lm_loss:
            del module._loss_function


def _has_plain_loss(model: nn.Module) -> bool:
    if "transformers" not in sys.modules:
        return False
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    if not isinstance(model, PreTrainedModel) or hasattr(model, "_loss_function"):
        return False
    inherited = type(model).loss_function is PreTrainedModel.loss_function
    # a model without a known type of loss gets this one
    return inherited and LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss) is ForCausalLMLoss


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """As `transformers.loss.loss_utils.ForCausalLMLoss`, of logits [..., C] and the labels of the same tokens (or those
    of the next ones, `shift_labels`): the mean over all that count, or their sum over `num_items_in_batch`."""
    target = shift_labels if shift_labels is not None else F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if not _fits(logits, target, vocab_size):
        from transformers.loss.loss_utils import ForCausalLMLoss

        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch=num_items_in_batch,
                               ignore_index=ignore_index, shift_labels=shift_labels, **kwargs)  # fmt: skip
    target = target.reshape(-1).contiguous()
    losses = CrossEntropy.apply(logits.reshape(-1, vocab_size).contiguous(), target, ignore_index)
    if num_items_in_batch is None:
        return losses.sum() / (target != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    return losses.sum() / num_items_in_batch


def _fits(logits: Tensor, target: Tensor, vocab_size: int) -> bool:
    if not backend.runs_on_cpu_library(logits) or not target.is_cpu or target.dtype != torch.int64:
        return False
    return logits.shape[-1] == vocab_size and target.numel() * vocab_size == logits.numel()
