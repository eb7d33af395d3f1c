"""Every kernel, compiled for GPUs that are not here, stays within its committed budget."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def test_compile_report():
    """In a process of its own: in this one, kernels are interpreted."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.compile_report", "--check"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("every kernel is within its budget")
