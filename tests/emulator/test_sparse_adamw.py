"""The operation table's tests of sparse_adamw, on the emulated CUDA kernel."""

from ..kernels.test_sparse_adamw import *  # noqa: F403
