"""What a launch has to know about its device and its worklist; asked when a kernel is launched, never at import."""

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
    """`function(tensor, *key)`, computed once per tensor: again only for another key or once the tensor was written."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __call__(self, tensor: Tensor, *key: Any) -> Any:
        state = (key, None if tensor.is_inference() else tensor._version)
        found = self.known.get(tensor)
        if found is None or found[0] != state:
            found = self.known[tensor] = (state, self.function(tensor, *key))
        return found[1]
