"""The choice of implementation: forcing, reasons, the report, and an import that needs nothing but torch."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparseft
from sparseft import backend

OPERATION = "select_topk"


def serving() -> dict[str, str]:
    return {operation: report["cpu"]["serves"] for operation, report in backend.backends().items()}


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Python code in a fresh process."""
    clean = {k: v for k, v in os.environ.items() if k != "SPARSEFT_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_compiled_kernels_serve_cpu_tensors():
    """Also says that the C++ library was built: no machine may test without it."""
    assert serving() == dict.fromkeys(backend.OPERATIONS, "cpu")


def test_the_report_names_every_implementation_once():
    for operation, devices in sparseft.backends().items():
        assert operation in backend.OPERATIONS and set(devices) == {"cpu", "cuda"}
        for report in devices.values():
            others = set(report) - {"serves"}
            assert others | {report["serves"]} == set(backend.NAMES) and report["serves"] not in others
            assert all(isinstance(reason, str) and reason for reason in report.values())
    assert set(sparseft.backends()) == set(backend.OPERATIONS)


def test_the_report_gives_reasons():
    cpu = backend.backends()["masked_grad_"]["cpu"]
    assert cpu["reference"] == "not needed: cpu is faster"
    assert re.search("got cpu|is not there|failed to load", cpu["cuda"])
    cuda = backend.backends()["masked_grad_"]["cuda"]
    assert cuda["cpu"] == "it runs on cpu tensors only, got cuda"
    with backend.forced("cpu"):
        forced = backend.backends()["masked_grad_"]
        assert forced["cpu"]["reference"] == "not chosen: another is forced"
        assert forced["cuda"]["serves"] == "nothing: cpu is forced and it runs on cpu tensors only, got cuda"


def test_forcing():
    assert serving()[OPERATION] == "cpu"
    try:
        backend.force("reference")
        assert set(serving().values()) == {"reference"}
        assert backend.kernel(OPERATION, "cpu") is sparseft.reference.select_topk
    finally:
        backend.force(None)
    assert serving()[OPERATION] == "cpu"


def test_forced_nests_and_ends_with_an_error():
    with backend.forced("reference"):
        with backend.forced("cpu"):
            assert serving()[OPERATION] == "cpu"
        assert serving()[OPERATION] == "reference"
        with backend.forced(None):
            assert serving()[OPERATION] == "cpu"
        with pytest.raises(KeyError), backend.forced("cpu"):
            raise KeyError
        assert serving()[OPERATION] == "reference"
    assert serving()[OPERATION] == "cpu"


@pytest.fixture
def cuda_kernels(monkeypatch):
    """As if _C_cuda.so had been built and loaded: a kernel of every operation, registered under the CUDA key."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    monkeypatch.delitem(backend._missing, "cuda", raising=False)
    with torch.library._scoped_library("sparseft_cuda", "IMPL") as library:
        for operation in backend.OPERATIONS:
            if not has(f"sparseft_cuda::{operation}", "CUDA"):
                library.impl(operation, lambda *args: None, "CUDA")
        backend._choose.cache_clear()
        yield
    backend._choose.cache_clear()


@pytest.mark.parametrize("operation", backend.OPERATIONS)
def test_cuda_tensors_get_cuda_then_triton_then_the_reference(cuda_kernels, monkeypatch, operation):
    pytest.importorskip("triton")
    triton = getattr(importlib.import_module(f"sparseft.kernels.{operation.rstrip('_')}"), operation)
    by_name = {
        "cuda": getattr(torch.ops.sparseft_cuda, operation).default,
        "triton": triton,
        "reference": getattr(sparseft.reference, operation),
    }
    for name in by_name:
        with backend.forced(name):
            assert backend.kernel(operation, "cuda") is by_name[name]
            assert backend.backends()[operation]["cuda"]["serves"] == name
    for name, function in by_name.items():  # what is not there leaves the call to the next one
        assert backend.kernel(operation, "cuda") is function
        assert backend.backends()[operation]["cuda"]["serves"] == name
        if name != "reference":
            monkeypatch.setitem(backend._missing, name, "taken away")
            backend._choose.cache_clear()
    assert backend.backends()[operation]["cuda"]["triton"] == "taken away"


def test_a_failed_force_changes_nothing():
    with backend.forced("reference"):
        with pytest.raises(ValueError, match=r"backend must be one of .* or None, got 'fpga'"):
            backend.force("fpga")
        assert serving()[OPERATION] == "reference"


def test_a_missing_implementation_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setitem(backend._missing, "cuda", "_C_cuda.so failed to load: no such symbol")
    with pytest.raises(
        ValueError, match=r"backend 'cuda' is not available: _C_cuda\.so failed to load: no such symbol"
    ):
        backend.force("cuda")
    assert backend.backends()[OPERATION]["cuda"]["cuda"] == "_C_cuda.so failed to load: no such symbol"


def test_a_forced_implementation_never_falls_back():
    with (
        backend.forced("cpu"),
        pytest.raises(RuntimeError, match=r"sparseft\.select_topk: forced backend 'cpu' cannot"),
    ):
        backend.kernel(OPERATION, "cuda")


def test_every_device_has_an_implementation():
    assert backend.kernel(OPERATION, "meta") is sparseft.reference.select_topk


def test_the_operations_obey_forcing(monkeypatch):
    """The dispatcher asks at each call, not once."""
    calls = []

    def spy(*args):
        calls.append(args)
        return torch.zeros(0, dtype=torch.int64)

    monkeypatch.setattr(sparseft.reference, OPERATION, spy)
    torch.ops.sparseft.select_topk([torch.ones(3)], [], 0, "abs")
    assert not calls
    with backend.forced("reference"):
        torch.ops.sparseft.select_topk([torch.ones(3)], [], 0, "abs")
    assert len(calls) == 1


# None there makes `import triton` and find_spec("triton") behave as where it is not installed
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"


def test_import_needs_no_triton():
    done = run(
        WITHOUT_TRITON + "import sparseft\n"
        "report = sparseft.backends()['masked_grad_']\n"
        "print(report['cpu']['serves'], '|', report['cuda']['triton'])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "cpu | the package triton is not installed"


def test_without_triton_its_tests_are_skipped_with_the_reason():
    folder = Path(__file__).with_name("triton")
    done = run(f"{WITHOUT_TRITON}import pytest\npytest.main(['-p', 'no:cacheprovider', {str(folder)!r}])")
    modules = len(list(folder.glob("test_*.py")))
    assert f"SKIPPED [{modules}]" in done.stdout and "the package triton is not installed" in done.stdout, done.stdout


def test_tritons_own_interpreter_is_refused_bf16():
    """Which it computes wrongly, and does not say so."""
    pytest.importorskip("triton")
    done = run(
        "import torch, sparseft.ops\n"
        "pattern = sparseft.Pattern.from_mask(torch.ones(3, 5, dtype=torch.bool))\n"
        "for dtype in (torch.float32, torch.float16, torch.bfloat16):\n"
        "    weight, values = torch.ones(3, 5, dtype=dtype), torch.ones(15, dtype=dtype)\n"
        "    sparseft.ops.scatter_delta_(weight, values, pattern, 'add')\n"
        "    print(weight.sum().item())",
        SPARSEFT_BACKEND="triton",
        TRITON_INTERPRET="1",
    )
    assert done.stdout.split() == ["30.0", "30.0"]
    assert done.stderr.rstrip().endswith(
        "RuntimeError: Triton's interpreter computes bf16 wrongly: use fp32 or fp16, or a GPU"
    )


def test_import_needs_no_triton_kernels_and_no_transformers():
    """Importing starts nothing that only some uses need."""
    done = run(
        "import sys, sparseft; print([m for m in ('triton', 'transformers', 'peft', 'typer') if m in sys.modules])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


CODE = "import sparseft; print({d['cpu']['serves'] for d in sparseft.backends().values()})"


def test_the_environment_forces():
    assert run(CODE, SPARSEFT_BACKEND="reference").stdout.strip() == "{'reference'}"
    assert run(CODE, SPARSEFT_BACKEND="").stdout.strip() == "{'cpu'}"


def test_the_environment_cannot_force_what_is_not_there():
    done = run(CODE, SPARSEFT_BACKEND="fpga")
    assert done.returncode != 0 and "backend must be one of" in done.stderr and "'fpga'" in done.stderr


class FakeGPUs:
    """A machine with these GPUs, this driver and a CUDA library with all kernels, as far as the choice can see."""

    def __init__(self, monkeypatch, capabilities: list[tuple[int, int]], driver: int, compiler: str):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
        monkeypatch.setattr(backend, "_driver_cuda", lambda: driver)
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
        monkeypatch.setattr(backend, "_missing", {})
        monkeypatch.setattr(backend, "_build_record", lambda here, name: compiler)

    def __enter__(self):
        backend._unfit_gpu.cache_clear()
        return backend.backends()[OPERATION]["cuda"]

    def __exit__(self, *_):
        backend._unfit_gpu.cache_clear()


NVCC = "Cuda compiler driver, V13.0.88"


def test_the_driver_is_asked(monkeypatch):
    class Driver:
        def __init__(self, name: str):
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, version) -> int:
            version._obj.value = 12080
            return 0

    monkeypatch.setattr(backend.ctypes, "CDLL", Driver)
    assert backend._driver_cuda() == 12


def test_the_choice_between_cuda_and_triton_says_that_it_was_not_measured(monkeypatch):
    with FakeGPUs(monkeypatch, [(8, 0), (9, 0)], 13, NVCC) as report:
        assert report["serves"] == "cuda"
        assert report["triton"] == "not needed: cuda comes first by default (not measured: no GPU was there)"


@pytest.mark.parametrize(
    ("capabilities", "driver", "reason"),
    [
        ([(8, 6), (7, 5)], 13, "it needs GPUs of compute capability 8.0 or later, got 7.5"),
        ([(9, 0)], 12, "it was built with CUDA 13, and the driver serves CUDA 12 at most: update the driver"),
    ],
    ids=["old GPU", "old driver"],
)
def test_gpus_that_cannot_run_the_cuda_library(monkeypatch, capabilities, driver, reason):
    with FakeGPUs(monkeypatch, capabilities, driver, NVCC) as report:
        assert report["serves"] == "triton"
        assert report["cuda"] == reason
