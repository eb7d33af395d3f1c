"""Which implementation serves each operation: finds them at import, chooses at each call, explains itself.

Implementations, the preferred first: `cuda` (compiled, CUDA tensors), `triton` (CUDA tensors; CPU tensors under
TRITON_INTERPRET=1, bf16 excepted), `cpu` (compiled, CPU tensors), `reference` (plain torch, any device). That `cuda`
comes before `triton` is the order by default: no GPU has been there to measure which is faster for which operation.

Environment: SPARSEFT_BACKEND=<name> forces one implementation; an operation or device it cannot serve raises.
"""

import ctypes
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from sparseft import reference

OPERATIONS = ("masked_grad_", "scatter_delta_", "sparse_adamw_", "select_topk")
NAMES = ("cuda", "triton", "cpu", "reference")
OLDEST_GPU = (8, 0)  # compute capability: what csrc/cuda is compiled for (setup.py)
_LIBRARIES = {"cpu": "_C.so", "cuda": "_C_cuda.so"}

_missing: dict[str, str] = {}  # implementation -> why it is not there
_forced: str | None = None


def load() -> None:
    """Load the compiled libraries and note what is missing; never raises for an absent one."""
    here = Path(__file__).parent
    for name, file in _LIBRARIES.items():
        if not (here / file).exists():
            _missing[name] = f"{file} is not there: {_build_record(here, name)}"
            continue
        try:
            torch.ops.load_library(here / file)
        except OSError as error:
            _missing[name] = f"{file} failed to load: {error}"
    if importlib.util.find_spec("triton") is None:
        _missing["triton"] = "the package triton is not installed"
    force(os.environ.get("SPARSEFT_BACKEND") or None)


def _build_record(here: Path, name: str) -> str:
    """Why a library was not built, as the build noted it."""
    record = here / "_build.json"
    if not record.exists():
        return "sparseft runs from sources that were not built (pip install .)"
    return str(json.loads(record.read_text()).get(name, "the build made no such library"))


def force(name: str | None) -> None:
    """Make one implementation serve every operation; None returns to the automatic choice.

    Raises:
        ValueError: no implementation has that name, or it is not available here (with the reason).
    """
    global _forced
    if name is not None and name not in NAMES:
        raise ValueError(f"backend must be one of {NAMES} or None, got {name!r}")
    if name in _missing:
        raise ValueError(f"backend {name!r} is not available: {_missing[name]}")
    _forced = name


@contextmanager
def forced(name: str | None) -> Iterator[None]:
    """`force(name)` inside a with block."""
    before = _forced
    force(name)
    try:
        yield
    finally:
        force(before)


def kernel(operation: str, device_type: str) -> Callable:
    """The function that serves `operation` on tensors of `device_type`.

    Raises:
        RuntimeError: the forced implementation does not serve them, with the reason.
    """
    if _forced is None:
        return _choose(operation, device_type)
    reason = _refusal(_forced, operation, device_type)
    if reason:
        raise RuntimeError(f"sparseft.{operation}: forced backend {_forced!r} cannot serve it: {reason}")
    return _function(_forced, operation)


@cache  # what is installed does not change, and a training step calls hundreds of operations
def _choose(operation: str, device_type: str) -> Callable:
    return _function(next(n for n in NAMES if not _refusal(n, operation, device_type)), operation)


def _refusal(name: str, operation: str, device_type: str) -> str | None:
    """Why an implementation cannot serve an operation on a device, or None if it can."""
    if name == "reference":
        return None
    if name in _missing:
        return _missing[name]
    if name in _LIBRARIES:
        if device_type != name:
            return f"it runs on {name} tensors only, got {device_type}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"sparseft_{name}::{operation}", name.upper()):
            return f"{_LIBRARIES[name]} has no kernel for it"
        return _unfit_gpu() if name == "cuda" else None
    if not _has_triton_kernel(operation):
        return "there is no Triton kernel for it"
    if device_type == "cpu" and (os.environ.get("TRITON_INTERPRET") != "1" or _forced != "triton"):
        return "on CPU tensors it runs only when forced and under TRITON_INTERPRET=1"
    return None if device_type in ("cpu", "cuda") else f"it runs on cuda tensors only, got {device_type}"


@cache
def _unfit_gpu() -> str | None:
    """Why the CUDA library cannot run on this machine's GPUs, or None if it can (or if there are none to ask)."""
    if not torch.cuda.is_available():
        return None
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if oldest < OLDEST_GPU:
        return "it needs GPUs of compute capability {}.{} or later, got {}.{}".format(*OLDEST_GPU, *oldest)
    driver = _driver_cuda()
    built = re.search(r"V(\d+)\.", _build_record(Path(__file__).parent, "cuda compiler"))
    if built and driver < int(built[1]):
        return f"it was built with CUDA {built[1]}, and the driver serves CUDA {driver} at most: update the driver"
    return None


def _driver_cuda() -> int:
    """The major version of the CUDA that the driver serves: programs of any of its minor versions run."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000  # 12080: 12.8


@cache
def _has_triton_kernel(operation: str) -> bool:
    try:
        return importlib.util.find_spec(f"sparseft.kernels.{operation.rstrip('_')}") is not None
    except ModuleNotFoundError:  # sparseft runs from its sources, without an installation
        return False


def _function(name: str, operation: str) -> Callable:
    if name == "reference":
        return getattr(reference, operation)
    if name == "triton":  # imported here: importing sparseft must never need a driver
        return getattr(importlib.import_module(f"sparseft.kernels.{operation.rstrip('_')}"), operation)
    return getattr(getattr(torch.ops, f"sparseft_{name}"), operation).default


def has_cpu_library() -> bool:
    """Whether the compiled CPU library may be used: it is there, and no other implementation is forced."""
    return "cpu" not in _missing and _forced in (None, "cpu")


def runs_on_cpu_library(x: torch.Tensor) -> bool:
    """Whether the compiled CPU library may be called directly for `x`: fp32 or bf16, and nobody who traces or watches
    would miss the operations that are called otherwise."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and x.dtype in (torch.float32, torch.bfloat16)
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and has_cpu_library()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def backends() -> dict[str, dict[str, dict[str, str]]]:
    """Who serves each operation on each device type, and why not the faster ones.

    Returns:
        {operation: {device type: {"serves": name, <other implementation>: why it does not}}} for "cpu" and "cuda".
    """
    report: dict[str, dict[str, dict[str, str]]] = {}
    for operation in OPERATIONS:
        report[operation] = {}
        for device in ("cpu", "cuda"):
            reasons = {name: _refusal(name, operation, device) for name in NAMES}
            able = [name for name in NAMES if reasons[name] is None]
            if _forced is not None:
                serving = _forced if _forced in able else f"nothing: {_forced} is forced and {reasons[_forced]}"
            else:
                serving = able[0]
            if _forced is not None:
                idle = "not chosen: another is forced"
            elif device == "cpu":
                idle = f"not needed: {serving} is faster"
            else:
                idle = f"not needed: {serving} comes first by default (not measured: no GPU was there)"
            others = {name: reason or idle for name, reason in reasons.items() if name != serving}
            report[operation][device] = {"serves": serving, **others}
    return report
