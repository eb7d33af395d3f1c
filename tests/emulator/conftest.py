"""The operation table's fixtures, with the emulated CUDA kernels as the implementation: three orders of the threads."""

from dataclasses import dataclass

import pytest
import torch

from ..kernels.table import Memory
from .build import Emulator, build


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    """The checked build of csrc/cuda."""
    return Emulator(build())


@dataclass(frozen=True)
class Emulated:
    """One operation, computed by the CUDA kernels' own source on the CPU."""

    operation: str
    name: str = "emulated CUDA"
    device: str = "cpu"

    def __call__(self, *args):
        return getattr(torch.ops.sparseft_cuda, self.operation)(*args)


@pytest.fixture(params=[1, 2, 3], ids="seed{}".format)
def implementation(request, emulator) -> Emulated:
    """The operation that the test module names in OPERATION."""
    emulator.configure(seed=request.param, resident=request.param)
    return Emulated(request.module.OPERATION)


class Aligned(Memory):
    """The same guarded tensors on 16-byte boundaries: there the kernels use vector access."""

    MARGIN = 64


@pytest.fixture
def memory(request, implementation) -> Memory:
    """By turns off and on 16-byte boundaries."""
    return (Memory if "seed2" in request.node.name else Aligned)(implementation.device)
