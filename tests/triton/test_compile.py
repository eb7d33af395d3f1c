"""Every kernel, compiled for GPUs that are not here, stays within its committed budget."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

FEW_REGISTERS = """
from functools import partial
import torch
from bench import compile_report as report
from sparseft.kernels import masked_grad

right = masked_grad.configuration
masked_grad.configuration = lambda *arguments: right(*arguments) | {"maxnreg": 64}
report.calls = lambda: [("16x16", partial(report._masked_grad, torch.bfloat16, (16, 16)))]
print("\\n".join(report.complaints(80, report.compiled(80), {})))
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own: in this one, kernels are interpreted."""
    command = [sys.executable, "-W", "ignore", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_compile_report():
    done = run("-m", "bench.compile_report", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("every kernel is within its budget")


def test_a_planted_spill_is_noticed():
    done = run("-c", FEW_REGISTERS)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert "sm_80 _tiles 16x16: spills" in done.stdout
