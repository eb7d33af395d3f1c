"""Forward passes that hand over what goes into the layers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparseft.selection.budget import kind
from sparseft.selection.gradients import is_finite, moved_to, seeded, unchanged_buffers


class Forward:
    """Runs forward passes of a model and hands over the inputs of the layers that some weights belong to.

    Args:
        weights: weights of linear layers (GPT-2's `Conv1D` too), by name.
        loss_fn: as in `Backward`; its result is not used. None: `model(**batch)`.

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
        """Of a sum per input feature, so that it goes along the weight's input dimension."""
        rows, cols = self.weights[name].shape
        return (rows, 1) if is_conv1d(self._layers[name][0]) else (1, cols)

    @contextmanager
    def prepared(self, seed: int) -> Iterator[None]:
        """Passes run inside; afterwards the model is as it was. The random generators start from `seed` meanwhile."""
        hooks = hooked(self._layers, lambda layer, name: layer.register_forward_pre_hook(self._hook(name)))
        with hooks, unchanged_buffers(self.model), seeded(self.model, seed), torch.no_grad():
            yield

    def __call__(self, number: int, batch: Any, take: Callable[[str, Tensor], None]) -> None:
        """One forward pass, in which `take(name, inputs)` gets the inputs [tokens, features] at every use of a layer.

        Padding, where a batch's `attention_mask` [B, T] marks it, is left out.

        Raises:
            TypeError, ValueError: the batch is no mapping and there is no loss_fn; an input is not finite.
        """
        self._number, self._take = number, take
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if self._loss_fn is not None:
            self._loss_fn(self.model, batch)
        else:
            self.model(**moved_to(self.model, batch, number))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple], None]:
        def hook(layer: nn.Module, args: tuple) -> None:
            x = args[0]
            if self._mask is not None and x.shape[:-1] == self._mask.shape:
                x = x[self._mask.to(x.device)]
            if x.numel() and not is_finite(x):
                raise ValueError(f"batch {self._number}: the input of {name}'s layer is not finite")
            self._take(name, x.reshape(-1, x.shape[-1]))

        return hook


def linear_layers(model: nn.Module, weights: dict[str, nn.Parameter]) -> dict[str, list[nn.Module]]:
    """The linear layers of every weight, by its name; several for a tied one.

    Raises:
        ValueError: a weight belongs to no linear layer.
    """
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) or is_conv1d(m)]
    layers = {name: [m for m in linear if m.weight is weight] for name, weight in weights.items()}
    others = [name for name, found in layers.items() if not found]
    if others:
        kinds = sorted({kind(name) for name in others})
        raise ValueError(f"criterion needs the inputs of a linear layer, and {others[0]} belongs to none; exclude "
                         f"{kinds}")  # fmt: skip
    return layers


@contextmanager
def hooked(
    layers: Mapping[str, list[nn.Module]], register: Callable[[nn.Module, str], RemovableHandle]
) -> Iterator[None]:
    """Every weight's layers have a hook, which `register(layer, name)` puts there; afterwards they have none."""
    handles = []
    try:
        for name, several in layers.items():
            handles += [register(layer, name) for layer in several]
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is [in, out]."""
    return type(module).__name__.endswith("Conv1D") and not isinstance(module, nn.Conv1d)
