"""The operation table's tests of masked_grad, on the emulated CUDA kernel: its tiles, whatever the rule chooses."""

import pytest

from ..kernels.test_masked_grad import *  # noqa: F403


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    monkeypatch.setenv("SPARSEFT_MASKED_GRAD", "tiles")
