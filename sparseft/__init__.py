"""sparseft: fine-tune a language model by changing about 1 % of its weights in place."""

from sparseft import ops
from sparseft.backend import backends
from sparseft.delta import Delta
from sparseft.layers import SparseLinear, densify, parameters, sparsify
from sparseft.optim import SparseAdamW
from sparseft.pattern import Pattern
from sparseft.rates import param_groups
from sparseft.reselection import patterns, reselect, select_late
from sparseft.schedules import DropAndGrow, Schedule, SelectAgain
from sparseft.selection import select

__all__ = [
    "Delta",
    "DropAndGrow",
    "Pattern",
    "Schedule",
    "SelectAgain",
    "SparseAdamW",
    "SparseLinear",
    "backends",
    "densify",
    "ops",
    "param_groups",
    "parameters",
    "patterns",
    "reselect",
    "select",
    "select_late",
    "sparsify",
]
