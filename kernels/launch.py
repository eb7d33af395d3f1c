"""What a launch has to know about its device and its worklist; asked when a kernel is launched, never at import."""

import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy
import torch
import triton.language as tl
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


def on(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensor's.

    Raises:
        RuntimeError: a bf16 tensor and Triton's own interpreter, which computes with the bits as if they were integers.
    """
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if tensor.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1" and not _interprets_bf16():
        raise RuntimeError("Triton's interpreter computes bf16 wrongly: use fp32 or fp16, or a GPU")
    return nullcontext()


def _interprets_bf16() -> bool:
    """Whether the interpreter was taught bf16 (as tests/triton does): by itself it takes it for uint16."""
    from triton.runtime import interpreter

    return interpreter._get_np_dtype(tl.bfloat16) != numpy.uint16


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
