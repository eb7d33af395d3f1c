"""What the threads of a program do is in no order but that of data and barriers; see `hardened.Launch.rewritten`."""

import pytest
import torch

from ..kernels.conftest import Implementation
from ..kernels.table import SEVERAL_LAYERS, entries
from . import hardened, strict  # noqa: F401 (the kernels run in the strict interpreter)


@pytest.mark.parametrize("mode", ["add", "copy", "swap"])
def test_only_add_writes_what_it_read_without_a_barrier(mode):
    """A sum depends on the old weight. What a swap stores does not depend on what was there: it takes a barrier."""
    e = entries(SEVERAL_LAYERS[0])
    weights = [torch.randn(shape) for shape in e.shapes]
    with hardened.recorded() as launches:
        scatter_delta = Implementation("triton", "scatter_delta_", "cpu")
        scatter_delta(weights, torch.randn(len(e)), *e.layout, mode, 1.0)
    weight = {"weight", "reachable"}  # the first layer's and the others'
    assert [launch.rewritten for launch in launches] == [weight if mode == "add" else set()]
