"""What a launch has to know about its device and its worklist; asked when a kernel is launched, never at import."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


@cache
def architecture(device: torch.device) -> int:
    """Compute capability as one number (80, 90, ...); 0 under the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; under the interpreter a few, so that programs still share the work."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensors' device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Remembered:
    """`function(tensor, *others)`, computed once per tensor: again only for other arguments or once one was written."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __call__(self, tensor: Tensor, *others: Any) -> Any:
        found = self.known.get(tensor)
        if found is None or not all(map(_fits, found[0], (tensor, *others))):
            found = self.known[tensor] = ([_mark(x) for x in (tensor, *others)], self.function(tensor, *others))
        return found[1]


def _mark(x: Any) -> Any:
    """What an argument is recognised by: a tensor by itself and its version, without keeping it alive."""
    return (weakref.ref(x), _version(x)) if isinstance(x, Tensor) else x


def _fits(mark: Any, x: Any) -> bool:
    return mark[0]() is x and mark[1] == _version(x) if isinstance(x, Tensor) else mark == x


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
