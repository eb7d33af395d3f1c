"""The fixtures of the operation table: who computes, and memory that notices stray writes."""

import importlib.util
import os
from dataclasses import dataclass

import pytest
import torch

from sparseft import backend

from .table import Memory

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    from ..triton import strict  # noqa: F401 (from here on, Triton kernels run in the strict interpreter)

ALWAYS = ("reference", "cpu")  # these are never skipped: a missing C++ library is a failure


@dataclass(frozen=True)
class Implementation:
    """One implementation of one operation, called through the dispatcher as users do."""

    name: str
    operation: str
    device: str

    def __call__(self, *args):
        with backend.forced(self.name):
            return getattr(torch.ops.sparseft, self.operation)(*args)


@pytest.fixture(params=backend.NAMES)
def implementation(request) -> Implementation:
    """Each implementation of the operation that the test module names in OPERATION."""
    name, operation = request.param, request.module.OPERATION
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        pytest.skip("no GPU here")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # with a GPU only if tests/triton runs, too (`make test`)
    device = "cuda" if gpu and (name == "cuda" or (name == "triton" and not interpreted)) else "cpu"
    try:
        with backend.forced(name):
            backend.kernel(operation, device)
    except (ValueError, RuntimeError) as reason:
        if name in ALWAYS:
            pytest.fail(f"{name} must serve {operation} everywhere: {reason}", pytrace=False)
        pytest.skip(str(reason))
    return Implementation(name, operation, device)


@pytest.fixture
def memory(implementation) -> Memory:
    """Guarded tensors on the implementation's device."""
    return Memory(implementation.device)
