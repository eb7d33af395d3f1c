"""The operation table's tests of scatter_delta, on the emulated CUDA kernel."""

from ..kernels.test_scatter_delta import *  # noqa: F403
