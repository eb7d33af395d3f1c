"""The operation table's tests of masked_grad, on the emulated CUDA kernel."""

from ..kernels.test_masked_grad import *  # noqa: F403
