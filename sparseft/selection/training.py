"""A short dense training of the eligible weights, to see which entries it moves; all of it is taken back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.selection.gradients import Backward


class ShortTraining(Backward):
    """One AdamW step (no weight decay) on fp32 masters per batch; the weights are rounded from them.

    Args:
        lr: constant learning rate. The others: as in `Backward`.
    """

    one_part = False  # the first step's change is not all
    in_groups = False  # weights trained alone move otherwise

    def __init__(
        self, model: nn.Module, weights: dict[str, nn.Parameter],
        loss_fn: Callable[[nn.Module, Any], Tensor] | None, lr: float,
    ):  # fmt: skip
        super().__init__(model, weights, loss_fn)
        self._lr = lr
        self._steps: dict[str, torch.optim.AdamW] = {}  # each of one master, so that one old copy exists at a time

    @contextmanager
    def prepared(self, seed: int) -> Iterator[None]:
        """Steps run inside; afterwards the model is as it was, its weights to the bit."""
        start = {name: weight.detach().clone() for name, weight in self.weights.items()}
        for name, weight in start.items():
            master = nn.Parameter(weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True))
            self._steps[name] = torch.optim.AdamW([master], lr=self._lr, weight_decay=0.0)
        try:
            with super().prepared(seed):
                yield
        finally:
            self._steps.clear()
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(start[name])

    def __call__(self, number: int, batch: Any, take: Callable[[str, Tensor], None]) -> None:
        """One training step, after which `take(name, change)` gets every weight's change, in its master's dtype."""
        gradients: dict[str, Tensor] = {}
        super().__call__(number, batch, gradients.__setitem__)
        with torch.no_grad():
            for name, step in self._steps.items():
                if name not in gradients:
                    continue
                [master] = step.param_groups[0]["params"]
                before = master.detach().clone()
                master.grad = gradients.pop(name).to(master.dtype)
                step.step()
                master.grad = None
                self.weights[name].copy_(master)
                take(name, before.neg_().add_(master.detach()))
