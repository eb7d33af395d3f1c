"""What sparse layers save of their input for the backward pass: what it is computed from again, where autograd keeps
that anyway; else the columns that some entry needs. Either only once for all layers that read the same input."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseft.recompute import Recompute, columns, hooks_are_active, source

# Children of one module that are applied to the same tensor, by the names that model families give them. Where a model
# applies them to different tensors, each saves its own: the names decide what is saved, never what is computed.
READ_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)

# Children whose input is saved anyway, by who made it: fused attention needs its own output for its gradient.
READ_WHAT_ATTENTION_SAVED = ("o_proj", "out_proj", "out_lin")


@dataclass(frozen=True)
class Saved:
    """What layers keep of one input. `tensors`: the needed columns [U, T], or what `recompute` makes them from."""

    tensors: tuple[Tensor, ...]
    recompute: Recompute | None


class SharedInput:
    """The input of one or several sparse layers: which of its columns they need, and the last one's columns.

    `whole`: it is saved as it is, whatever the layers need.
    """

    def __init__(self, layers: list[nn.Module], whole: bool = False):
        self._layers, self._whole = layers, whole
        self._forget()

    def _forget(self) -> None:
        self._orders: list[Tensor] = []  # what the next two were made from
        self._union: Tensor | None = None
        self._places: list[Tensor] = []
        self._last: tuple | None = None
        self._served: set[int] = set()  # the layers that have got the last one's columns

    def __getstate__(self) -> dict:
        return {"layers": self._layers, "whole": self._whole}

    def __setstate__(self, state: dict) -> None:  # a copy plans for itself
        self._layers, self._whole = state["layers"], state["whole"]
        self._forget()

    def save(self, layer: nn.Module, input: Tensor, x: Tensor) -> tuple[Saved | None, Tensor]:
        """What `layer` has to save of its input.

        Args:
            input: [..., K], what the layer was called with, and `x`, the same in the dtype it computes in.

        Returns:
            What leads back to the needed columns, None where the whole input is to be saved as it is; and the layer's
            order (int32), into these columns (or the whole input's).
        """
        orders = [input_order(one) for one in self._layers]
        if len(orders) != len(self._orders) or any(a is not b for a, b in zip(orders, self._orders, strict=True)):
            self._plan(orders, x.shape[-1])
        number = next((i for i, one in enumerate(self._layers) if one is layer), None)
        if number is None or self._union is None:  # not one of them: a replica, which shares its original's attributes
            return None, input_order(layer)
        last = self._last
        if last is not None and last[3].recompute is not None and hooks_are_active():
            last = None  # a checkpoint around this layer alone: what it saves must be the same when it runs again
        if last is None or last[0]() is not input or last[1:3] != (_version(input), x.dtype) or number in self._served:
            saved = self._saved(input, x)
            if saved is None:
                return None, input_order(layer)
            # with the input goes what was saved of it; the layers keep it
            last = weakref.ref(input, self._drop), _version(input), x.dtype, saved
            self._last, self._served = last, set()
        self._served.add(number)  # once: a second call is another forward pass, and may come after a silent write
        saved = last[3]
        if saved.recompute is not None:
            saved.recompute.readers += 1
        return saved, self._places[number]

    def _saved(self, input: Tensor, x: Tensor) -> Saved | None:
        assert self._union is not None
        again = source(input)
        if again is not None:
            formula, tensors = again
            return Saved(tensors, Recompute(formula, self._union, x.dtype))
        if len(self._union) == x.shape[-1]:
            return None
        return Saved((columns(x.detach().reshape(-1, x.shape[-1]), self._union),), None)

    def _plan(self, orders: list[Tensor], width: int) -> None:
        self._forget()
        self._orders = orders
        needed = torch.zeros(width, dtype=torch.bool, device=orders[0].device)
        for order in orders:
            needed[order.long()] = True
        union = needed.nonzero().squeeze(1).to(torch.int32)
        if self._whole:
            return
        self._union = union
        place = needed.cumsum(0).to(torch.int32) - 1
        self._places = [place[order.long()] for order in orders]

    def _drop(self, input: weakref.ref) -> None:
        if self._last is not None and self._last[0] is input:
            self._last = None


def share_inputs(model: nn.Module) -> None:
    """Let the sparse layers of `model` that read the same input save it together."""
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if hasattr(child, "_input")}
        for name in READ_WHAT_ATTENTION_SAVED:
            if name in children:
                children[name]._input = SharedInput([children[name]], whole=True)
        for names in READ_TOGETHER:
            together = [children[name] for name in names if name in children]
            if len({layer.weight.shape[layer.transposed - 1] for layer in together}) == 1:  # as wide as each other
                shared = SharedInput(together)
                for layer in together:
                    layer._input = shared


def input_order(layer: nn.Module) -> Tensor:
    """The active columns of a sparse layer's input."""
    # not by attribute: nn.Module's search for it costs more than all else that happens in a layer's call
    return layer._buffers["rows" if layer.transposed else "cols"]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
