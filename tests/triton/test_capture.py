"""What a CUDA graph asks of a kernel, without a GPU: a call does nothing but launch once its worklist is known, and the
same launch, run again, follows what is in device memory by then."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparseft import reference

from ..kernels.table import SEVERAL_LAYERS, Entries, Memory, entries
from ..kernels.test_sparse_adamw import STATE, call, copied, place, start
from . import strict  # noqa: F401 (the kernels run in the strict interpreter)

# isort: split
from sparseft.kernels import scatter_delta, sparse_adamw

LAYERS = SEVERAL_LAYERS[0]


class Recorder:
    """Stands for a kernel: keeps every launch, and runs it unless `capturing`."""

    def __init__(self, kernel):
        self.kernel, self.capturing = kernel, False
        self.launches: list[Callable[[], None]] = []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append(partial(self.kernel[grid], *args, **kwargs))
            if not self.capturing:
                self.launches[-1]()

        return launch


class Operations(TorchDispatchMode):
    """The names of the operations inside the with block."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def recorder(request, monkeypatch):
    """The kernel (module, name) that a test is about, recorded."""
    kept = Recorder(getattr(*request.param))
    monkeypatch.setattr(*request.param, kept)
    return kept


def arguments(e: Entries) -> dict:
    """Those of a step that reads everything it can read."""
    a = start(e, torch.bfloat16) | {"weight_decay": 0.1, "lr": torch.tensor(0.01, dtype=torch.float64)}
    a |= {"grad_scale": torch.tensor(1.0), "found_inf": torch.tensor(0.0), "base": a["values"].bfloat16()}
    return place(a | {"born": torch.zeros(len(e), dtype=torch.int32)}, Memory("cpu").put)


@pytest.mark.parametrize("recorder", [(sparse_adamw, "_adamw")], indirect=True)
def test_a_replayed_step_reads_rate_step_scale_and_overflow_anew(recorder):
    e = entries(LAYERS)
    a = arguments(e)
    call(sparse_adamw.sparse_adamw_, a)
    (replay,) = recorder.launches
    for step, lr, scale, found in ((61, 0.02, 0.5, 0.0), (62, 0.005, 2.0, 0.0), (62, 0.1, 1.0, 1.0)):
        a["step"].fill_(step)
        a["grad"].copy_(torch.randn(len(e)))
        for name, number in (("lr", lr), ("grad_scale", scale), ("found_inf", found)):
            a[name].fill_(number)
        want = copied(a)
        call(reference.sparse_adamw_, want)
        replay()
        for name in STATE:  # values near 1, moments of any size: some roundings
            torch.testing.assert_close(a[name], want[name], rtol=2e-6, atol=2e-6)
            assert torch.equal(a[name], want[name]) or found == 0


@pytest.mark.parametrize("recorder", [(sparse_adamw, "_adamw")], indirect=True)
def test_a_later_step_is_one_launch_and_nothing_else(recorder):
    a = arguments(entries(LAYERS))
    call(sparse_adamw.sparse_adamw_, a)
    recorder.capturing = True
    with Operations() as operations:
        call(sparse_adamw.sparse_adamw_, a)
    assert len(recorder.launches) == 2 and operations.seen == []


@pytest.mark.parametrize("recorder", [(scatter_delta, "_scatter")], indirect=True)
def test_a_later_delta_is_one_launch_and_nothing_else(recorder):
    e = entries(LAYERS)
    weights, values = (torch.randn(shape) for shape in e.shapes), torch.randn(len(e))
    arguments = [*weights], values, *e.layout, "swap", 1.0
    scatter_delta.scatter_delta_(*arguments)
    recorder.capturing = True
    with Operations() as operations:
        scatter_delta.scatter_delta_(*arguments)
    assert len(recorder.launches) == 2 and operations.seen == []
