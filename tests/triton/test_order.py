"""What the threads of a program do is in no order but that of data and barriers; see `hardened.Launch.rewritten`."""

import pytest
import torch

from ..kernels.conftest import Implementation
from ..kernels.table import SEVERAL_LAYERS, Case, entries
from . import hardened, strict  # noqa: F401 (the kernels run in the strict interpreter)

LARGE = Case("large", ((190, 210), (64, 100)), (64, 64), 0.2)


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


@pytest.mark.parametrize("operation", ["scatter_delta_", "sparse_adamw_", "select_topk"])
def test_the_same_bits_in_any_order_of_programs(operation, monkeypatch):
    """(masked_grad: see test_masked_grad.) The order of programs is the same from run to run in all other tests."""
    e = entries(LARGE)
    k, step = len(e), torch.full((len(e.shapes),), 3)
    hyper = torch.tensor(0.01), 0.9, 0.999, 1e-8, 0.1, False, None, None, 7  # rounding stochastically
    runs = []
    for seed in (0, 1, 2):
        monkeypatch.setattr(hardened, "seed", seed)
        torch.manual_seed(0)
        weights = [torch.randn(shape).bfloat16() for shape in e.shapes]
        values, state, scores = torch.randn(k).bfloat16(), torch.rand(3, k), torch.randn(50_000).bfloat16()
        arguments = {
            "scatter_delta_": (weights, values, *e.layout, "swap", 1.0),
            "sparse_adamw_": (weights, values, *state, None, step, None, *e.layout, *hyper),
            "select_topk": ([scores], [], 5000, "abs"),
        }[operation]
        with hardened.recorded() as launches:
            returned = Implementation("triton", operation, "cpu")(*arguments)
        assert min(launch.programs for launch in launches) > 2
        runs.append([*weights, values, *state] if returned is None else [returned])
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))
