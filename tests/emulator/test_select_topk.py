"""The operation table's tests of select_topk, on the emulated CUDA kernel."""

from ..kernels.test_select_topk import *  # noqa: F403
