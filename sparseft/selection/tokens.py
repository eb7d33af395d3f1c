"""Backward passes that hand over, use by use of a layer, the two factors of its weight's gradient."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.selection.gradients import check_finite, gradients_on, is_finite, loss_of, seeded, unchanged_buffers
from sparseft.selection.inputs import hooked, is_conv1d, linear_layers


class Tokens:
    """Runs backward passes in which no weight's gradient is computed, only those of the layers' outputs.

    Args:
        weights: weights of linear layers (GPT-2's `Conv1D` too), by name.
        loss_fn: as in `Backward`.

    Raises:
        ValueError: a weight belongs to no linear layer.
    """

    one_part = False  # a tied layer gives several
    in_groups = True

    def __init__(
        self, model: nn.Module, weights: dict[str, nn.Parameter], loss_fn: Callable[[nn.Module, Any], Tensor] | None
    ):
        self.model, self.weights, self._loss_fn = model, weights, loss_fn
        self._layers = linear_layers(model, weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a sum of products of factors: the weight's."""
        return tuple(self.weights[name].shape)

    @contextmanager
    def prepared(self, seed: int) -> Iterator[None]:
        """Passes run inside; afterwards the model is as it was. The random generators start from `seed` meanwhile."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        hooks = hooked(self._layers, lambda layer, name: layer.register_forward_hook(self._hook(name)))
        try:
            self.model.requires_grad_(False)
            with hooks, unchanged_buffers(self.model), seeded(self.model, seed), gradients_on():
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def __call__(self, number: int, batch: Any, take: Callable[[str, tuple[Tensor, Tensor]], None]) -> None:
        """One pass; `take` gets the factors [tokens, rows of the weight] and [tokens, its columns].

        Raises:
            TypeError, ValueError: the batch gives no scalar loss, no gradient, or a gradient that is not finite.
        """
        self._number, self._take = number, take
        loss = loss_of(self.model, batch, number, self._loss_fn)
        if not loss.requires_grad:
            raise ValueError(f"batch {number}: the loss gives no gradient for any layer of an eligible weight")
        loss.backward()
        check_finite(loss, number)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
        def hook(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # reentrant checkpointing: the layer runs again in the backward pass
                return output
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            if not output.requires_grad:  # a first layer: from here on there is something to differentiate
                output = output.requires_grad_().clone()  # a copy, since a leaf could not be changed in place

            def arrived(gradient: Tensor) -> None:
                if not is_finite(gradient):
                    raise ValueError(f"batch {self._number}: the gradient of {name}'s output is not finite")
                d = gradient.reshape(-1, gradient.shape[-1])
                self._take(name, (x, d) if is_conv1d(layer) else (d, x))

            output.register_hook(arrived)
            return output

        return hook
