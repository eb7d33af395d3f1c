"""The drop-in door of SparseAdamW: the first backward selects, every backward gathers and frees."""

import sys
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from sparseft.layers import Selected, gather_grad_, leaf_of
from sparseft.pattern import Pattern, check_tile, matrix_shape
from sparseft.selection import StreamingTopK
from sparseft.selection.criteria import scales
from sparseft.selection.draw import race
from sparseft.selection.gradients import is_finite


def _balancing(grad: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))  # the factors of small fp16 gradients are no fp16
    rows, columns = scales(wide.reshape(matrix_shape(wide.shape)))
    return wide, (rows * columns).view(wide.shape)


# criterion -> (gradient, None or what it is multiplied with to be a score)
FACTORS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]] = {
    "balanced": _balancing,
    "grad": lambda grad, parameter: (grad, None),
    "taylor": lambda grad, parameter: (grad, parameter),
    "sampled": _balancing,  # and divided by random numbers
}

Adopt = Callable[[list[tuple[int, int, Selected]]], None]


class FirstBackward:
    """Hooks on dense parameters that keep the best entries of the first backward, never two dense gradients.

    A running top-k over the parameters seen so far (`StreamingTopK`) makes the choice exact in O(k) memory.

    Args:
        weights: (param group, parameter), in the optimizer's order.
        density: share of all their entries. `allocation`: "global" or "layer". `criterion`: a key of FACTORS.
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
        if criterion not in FACTORS:
            raise ValueError(f"criterion must be one of {sorted(FACTORS)} in the drop-in door, got {criterion!r}")
        if allocation not in ("global", "layer"):
            raise ValueError(f"allocation must be 'global' or 'layer', got {allocation!r}")
        self.weights, self.criterion, self.tile, self.adopt = weights, criterion, tile, adopt
        self.density, self.allocation = density, allocation
        self.tops: list[StreamingTopK[int]] = []
        self.nonfinite: int | None = None  # a parameter whose gradient was NaN or Inf
        self._start_over()
        if not any(top.k for top in self.tops):
            raise ValueError(f"density {density} selects no entry")
        check_tile(tile)
        if _processes() > 1:
            raise ValueError("density: the drop-in door selects from one process's gradient; to train in parallel, "
                             "sparsify the model with the same patterns everywhere, then wrap it")  # fmt: skip
        for _, p in weights:
            if not p.is_contiguous() or not p.is_floating_point() or p.numel() == 0:
                raise ValueError("params: a parameter to select from must be contiguous, floating point and not empty, "
                                 f"got {p.dtype}, shape {tuple(p.shape)}, strides {p.stride()}")  # fmt: skip
        if any(_hooked(p) for _, p in weights):
            raise ValueError("params: a parameter serves another sparseft optimizer or a sparsified model already")
        self.lock = threading.Lock()  # autograd runs one thread per device
        self.backward: int | None = None  # the one that is selecting
        self.handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._take, position))
            for position, (_, parameter) in enumerate(weights)
        ]

    @torch.no_grad()
    def _take(self, position: int, parameter: nn.Parameter) -> None:
        if _in_reentrant_checkpoint():
            raise RuntimeError("reentrant gradient checkpointing hides where backward ends, and with it where the "
                               "first selection does; use checkpointing with use_reentrant=False")  # fmt: skip
        backward = torch._C._current_graph_task_id()
        if backward != self.backward:  # its first gradient; one that failed half-way may have left its own behind
            self.backward = backward
            self._start_over()
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        grad, parameter.grad = parameter.grad, None
        if grad.is_sparse:
            raise TypeError("sparse gradients are not supported: give the embedding sparse=False")
        with self.lock:
            if not is_finite(grad):
                self.nonfinite = position
            else:
                wide, factor = FACTORS[self.criterion](grad, parameter)
                if self.criterion == "sampled":
                    factor = race(factor, str(position), seed=0)
                self.tops[position].add(position, wide, factor)

    def _start_over(self) -> None:
        """One top-k for each parameter: its own, or one that all share."""
        self.nonfinite = None
        sizes = [p.numel() for _, p in self.weights]
        if self.allocation == "layer":
            self.tops = [StreamingTopK[int](round(self.density * size)) for size in sizes]
        else:
            self.tops = [StreamingTopK[int](round(self.density * sum(sizes)), order=range(len(sizes)))] * len(sizes)

    def _finish(self) -> None:
        """End of the first backward. If a gradient was NaN or Inf, the next backward selects."""
        self.backward = None
        if self.nonfinite is not None:
            weight = self.weights[self.nonfinite][1]
            weight.grad = torch.full_like(weight, torch.nan)  # for GradScaler, and `step`, to see
            self._start_over()
            return
        indices: dict[int, Tensor] = {}
        scores: dict[int, Tensor] = {}
        gradients: dict[int, Tensor] = {}
        for top in {id(top): top for top in self.tops}.values():
            indices |= top.result()
            scores |= top.scores()
            gradients |= top.signed()
        patterns = {}
        for i, found in indices.items():
            shape = matrix_shape(self.weights[i][1].shape)
            patterns[i] = Pattern.from_indices(found, shape, tile=self.tile, mass=scores[i]), None
        for i, chosen in self._install(patterns).items():
            order = torch.searchsorted(indices[i], chosen.pattern.indices())
            chosen.values.grad = gradients[i][order].to(chosen.values.dtype)
        self.tops = []

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
                if not parameter.requires_grad:
                    continue
                parameter.register_post_accumulate_grad_hook(_free)
                continue
            pattern = pattern.to(parameter.device)
            values, now = leaf_of(parameter, pattern)
            leaves[i] = Selected("", parameter, values, now if base is None else base.to(now.device), pattern)
            parameter.register_post_accumulate_grad_hook(partial(_gather, leaves[i]))
        self.adopt([(self.weights[i][0], i, chosen) for i, chosen in leaves.items()])
        return leaves


def free_others(model: nn.Module, weights: list[nn.Parameter]) -> None:
    """Free the gradients of the model's other parameters as they arise: nothing would ever use or clear them."""
    taking_part = {id(weight) for weight in weights}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in taking_part:
            parameter.register_post_accumulate_grad_hook(_free)


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _gather(chosen: Selected, parameter: nn.Parameter) -> None:
    gather_grad_(chosen)


def _free(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _hooked(parameter: nn.Parameter) -> bool:
    """Whether a hook of this package takes the parameter's gradient already."""
    hooks = (parameter._post_accumulate_grad_hooks or {}).values()
    return any(getattr(hook, "func", hook).__module__.startswith("sparseft.") for hook in hooks)


def _in_reentrant_checkpoint() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            return True
        frame = frame.f_back
    return False
