"""sparseft: fine-tune a language model by changing about 1 % of its weights in place."""

from sparseft import ops
from sparseft.backend import backends
from sparseft.layers import SparseLinear, densify, parameters, sparsify
from sparseft.pattern import Pattern

__all__ = ["Pattern", "SparseLinear", "backends", "densify", "ops", "parameters", "sparsify"]
