"""The operation table finds planted faults: with each of these in a kernel's source, one of its tests fails."""

import shutil
import sys
from pathlib import Path

import pytest
import sparseft.kernels
import torch
from triton.runtime.errors import InterpreterError

from ..kernels import test_masked_grad, test_scatter_delta, test_select_topk, test_sparse_adamw
from ..kernels.conftest import Implementation
from ..kernels.table import SEVERAL_LAYERS, Memory
from . import strict, test_order

LAYERS = SEVERAL_LAYERS[0]
KERNELS = Path(sparseft.kernels.__path__[0])


def masked_grad(folder: Path) -> None:
    test_masked_grad.test_tokens(Implementation("triton", "masked_grad_", "cpu"), Memory("cpu"), 17, torch.bfloat16)


def far_operands(folder: Path) -> None:
    test_masked_grad.test_offsets_beyond_int32(Implementation("triton", "masked_grad_", "cpu"), folder)


def scatter_delta(folder: Path) -> None:
    dtypes = (torch.bfloat16, torch.float32)
    test_scatter_delta.test_entries(Implementation("triton", "scatter_delta_", "cpu"), Memory("cpu"), LAYERS, dtypes)


def far_weights(folder: Path) -> None:
    test_scatter_delta.test_offsets_beyond_int32(Implementation("triton", "scatter_delta_", "cpu"), folder, "add")


def sparse_adamw(folder: Path) -> None:
    here = Implementation("triton", "sparse_adamw_", "cpu"), Memory("cpu")
    test_sparse_adamw.test_entries(*here, LAYERS, torch.bfloat16)


def select_topk(folder: Path) -> None:
    test_select_topk.test_sizes(Implementation("triton", "select_topk", "cpu"), 4097, torch.float32)


def swap(folder: Path) -> None:
    test_order.test_only_add_writes_what_it_read_without_a_barrier("swap")


BOUNDS, SHARED = "out of bounds", "several lanes|race on"
FAULTS = {  # what: file, right, wrong, which part of the table notices, and how
    "an offset one too large": (
        "entries.py", "start + row * stride + col, held", "start + row * stride + col + 1, held",
        scatter_delta, BOUNDS,
    ),
    "the stride of another layer": (
        "entries.py", "tl.load(table + 2 * layer + 1, mask=held", "tl.load(table + 0 * layer + 1, mask=held",
        sparse_adamw, SHARED,
    ),
    "a 32-bit offset of a weight": (
        "entries.py", "start + row * stride + col, held", "(start + row * stride + col).to(tl.int32), held",
        far_weights, BOUNDS,
    ),
    "a store without its mask": (
        "sparse_adamw.py", "tl.store(exp_avg + entry, m, mask=mask)", "tl.store(exp_avg + entry, m)",
        sparse_adamw, BOUNDS,
    ),
    "a load without its mask": (
        "masked_grad.py", "tl.load(at_a, mask=there & (m < width_a)[None, :], other=0.0)", "tl.load(at_a)",
        masked_grad, BOUNDS,
    ),
    "one token too many": (
        "masked_grad.py", "there = (t < tokens - t0)", "there = (t <= tokens - t0)",
        masked_grad, BOUNDS,
    ),
    "a 32-bit offset of an operand": (
        "compact.py", "t[:, None] * source_token", "(t[:, None] * source_token).to(tl.int32)",
        far_operands, BOUNDS,
    ),
    "every program does all tiles": (
        "masked_grad.py", "range(tl.program_id(0), count, tl.num_programs(0))", "range(0, count)",
        masked_grad, SHARED,
    ),
    "a swap without its barrier": (
        "scatter_delta.py", "tl.debug_barrier()", "pass",
        swap, "values",
    ),
    "lanes that share a place": (
        "select_topk.py", "before_above + (rank >> 16)", "before_above + (rank >> 17)",
        select_topk, SHARED,
    ),
    "programs that share a histogram": (
        "select_topk.py", "histogram = histograms + program.to(tl.int64) * BINS", "histogram = histograms",
        select_topk, BOUNDS,
    ),
    "a last block without its mask": (
        "select_topk.py", "mask = whole + lane < length", "mask = lane >= 0",
        select_topk, BOUNDS,
    ),
}  # fmt: skip


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """`plant(file, right, wrong)`: from now on the kernels are those with this change, until the test ends."""
    before = {name: module for name, module in sys.modules.items() if name.startswith("sparseft.kernels.")}

    def forget() -> None:
        for name in [name for name in sys.modules if name.startswith("sparseft.kernels.")]:
            del sys.modules[name]

    def change(file: str, right: str, wrong: str) -> None:
        folder = tmp_path / "kernels"
        shutil.copytree(KERNELS, folder, ignore=shutil.ignore_patterns("__pycache__"))
        text = (folder / file).read_text()
        assert right in text, f"{file} changed: {right!r} is not there any more"
        (folder / file).write_text(text.replace(right, wrong))
        monkeypatch.setattr(sparseft.kernels, "__path__", [str(folder)])
        forget()
        strict.announce()

    yield change
    forget()
    sys.modules.update(before)
    for name, module in before.items():
        setattr(sparseft.kernels, name.rpartition(".")[2], module)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, plant, tmp_path):
    file, right, wrong, table, how = FAULTS[fault]
    table(tmp_path)  # right as it is
    plant(file, right, wrong)
    with pytest.raises((InterpreterError, RuntimeError, AssertionError), match=how) as noticed:
        table(tmp_path)
    print(f"{fault}: {str(noticed.value).splitlines()[0]}")
