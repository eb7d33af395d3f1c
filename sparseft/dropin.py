"""The drop-in door of SparseAdamW: the first backward selects, every backward gathers and frees."""

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from sparseft.layers import Selected, gather_grad_, leaf_of
from sparseft.ops import select_topk
from sparseft.pattern import Pattern, matrix_shape

Adopt = Callable[[list[tuple[int, int, Selected]]], None]


class FirstBackward:
    """Hooks on dense parameters that keep the best entries of the first backward, never two dense gradients.

    Global budgets keep a running top-k over the parameters seen so far: an entry below the k-th best can never
    come back, so the result is exact and the memory O(k).

    Args:
        weights: (param group, parameter), in the optimizer's order.
        density: share of all their entries. `allocation`: "global" or "layer". `criterion`: "grad" or "taylor".
        adopt: called at the end of the first backward with (param group, position in `weights`, Selected).
    """

    def __init__(
        self,
        weights: list[tuple[int, nn.Parameter]],
        density: float,
        criterion: str,
        allocation: str,
        tile: tuple[int, int],
        adopt: Adopt,
    ):
        if criterion not in ("grad", "taylor"):
            raise ValueError(f"criterion must be 'grad' or 'taylor' in the drop-in door, got {criterion!r}")
        if allocation not in ("global", "layer"):
            raise ValueError(f"allocation must be 'global' or 'layer', got {allocation!r}")
        self.weights, self.criterion, self.tile, self.adopt = weights, criterion, tile, adopt
        self.budgets = [round(density * p.numel()) for _, p in weights] if allocation == "layer" else None
        self.k = round(density * sum(p.numel() for _, p in weights))
        if (sum(self.budgets) if self.budgets else self.k) == 0:
            raise ValueError(f"density {density} selects no entry")
        if any(_hooked(p) for _, p in weights):
            raise ValueError("params: a parameter serves another sparseft optimizer or a sparsified model already")
        self.pool: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # position -> flat indices, gradients, scores
        self.backward: int | None = None  # the one that is selecting
        self.handles = [
            p.register_post_accumulate_grad_hook(partial(self._take, position)) for position, (_, p) in enumerate(weights)
        ]

    @torch.no_grad()
    def _take(self, position: int, parameter: nn.Parameter) -> None:
        if _in_reentrant_checkpoint():
            raise RuntimeError("reentrant gradient checkpointing hides where backward ends, and with it where the "
                               "first selection does; use checkpointing with use_reentrant=False")  # fmt: skip
        backward = torch._C._current_graph_task_id()
        if backward != self.backward:  # its first gradient; one that failed half-way may have left its own in the pool
            self.backward = backward
            self.pool.clear()
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        grad, parameter.grad = parameter.grad.contiguous(), None
        others = [parameter.detach().contiguous().to(grad.dtype)] if self.criterion == "taylor" else []
        k = self.budgets[position] if self.budgets else min(self.k, grad.numel())
        indices = select_topk(grad, k, "product" if others else "abs", others)
        gradients = grad.view(-1)[indices].to(torch.promote_types(grad.dtype, torch.float32))
        scores = gradients.abs() if not others else (gradients * others[0].view(-1)[indices].to(gradients.dtype)).abs()
        self.pool[position] = indices, gradients, scores
        if self.budgets is None:
            self._prune()

    def _prune(self) -> None:
        """Keep the k best of the pool; of equals the first parameter's, then the lowest index."""
        order = sorted(self.pool)
        if sum(len(self.pool[i][0]) for i in order) <= self.k:
            return
        best = select_topk([self.pool[i][2].to(self.pool[order[0]][2].device) for i in order], self.k)
        start = 0
        for i in order:
            stop = start + len(self.pool[i][0])
            mine = (best[(best >= start) & (best < stop)] - start).to(self.pool[i][0].device)
            self.pool[i] = tuple(part[mine] for part in self.pool[i])
            start = stop

    def _finish(self) -> None:
        """End of the first backward. If a gradient is NaN or Inf, the next backward selects."""
        self.backward = None
        for i, (_, gradients, _) in self.pool.items():
            if not bool(torch.isfinite(gradients).all()):
                self.pool.clear()
                weight = self.weights[i][1]
                weight.grad = torch.full_like(weight, torch.nan)  # for GradScaler, and `step`, to see
                return
        patterns = {}
        for i, (indices, _, scores) in sorted(self.pool.items()):
            shape = matrix_shape(self.weights[i][1].shape)
            patterns[i] = Pattern.from_indices(indices, shape, tile=self.tile, mass=scores), None
        leaves = self._install(patterns)
        for i, chosen in leaves.items():
            indices, gradients, _ = self.pool[i]
            dense_order = torch.searchsorted(indices, chosen.pattern.indices())
            chosen.values.grad = gradients[dense_order].to(chosen.values.dtype)
        self.pool.clear()

    def found_nonfinite(self) -> bool:
        """Whether the backward that was to select met NaN or Inf; its remains are cleared."""
        marked = [p for _, p in self.weights if p.grad is not None]
        for p in marked:
            p.grad = None
        return bool(marked)

    def restore(self, patterns: dict[int, tuple[Pattern, Tensor]]) -> None:
        """Install a saved selection (position -> pattern, base values) instead of selecting."""
        self._install(patterns)

    def _install(self, patterns: dict[int, tuple[Pattern, Tensor | None]]) -> dict[int, Selected]:
        for handle in self.handles:
            handle.remove()
        leaves: dict[int, Selected] = {}
        for i, (_, parameter) in enumerate(self.weights):
            pattern, base = patterns.get(i, (None, None))
            if pattern is None or len(pattern) == 0:
                parameter.register_post_accumulate_grad_hook(_free)
                continue
            pattern = pattern.to(parameter.device)
            values, now = leaf_of(parameter, pattern)
            leaves[i] = Selected("", None, parameter, values, now if base is None else base.to(now.device), pattern)
            parameter.register_post_accumulate_grad_hook(partial(_gather, leaves[i]))
        self.adopt([(self.weights[i][0], i, chosen) for i, chosen in leaves.items()])
        return leaves


def _gather(chosen: Selected, parameter: nn.Parameter) -> None:
    gather_grad_(chosen)


def _free(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _hooked(parameter: nn.Parameter) -> bool:
    """Whether a hook of this package takes the parameter's gradient already."""
    hooks = (parameter._post_accumulate_grad_hooks or {}).values()
    return any(getattr(hook, "func", hook).__module__.startswith("sparseft.") for hook in hooks)


def _in_reentrant_checkpoint() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            return True
        frame = frame.f_back
    return False
