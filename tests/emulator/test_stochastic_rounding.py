"""The operation table's tests of stochastic rounding, on the emulated CUDA kernel."""

from ..kernels.test_stochastic_rounding import *  # noqa: F403
