"""Runs this project's kernels in the strict interpreter: import it before any of them.

The kernels find all weights (scores) but the first through a table of addresses; `hardened` has to hear of them.
"""

import importlib
from collections.abc import Callable, Sequence

from torch import Tensor

from . import hardened  # isort: split


def announce() -> None:
    """Have the kernels tell `hardened` what they reach; again if they were imported anew."""
    _announce("scatter_delta", "address_table", lambda weights: weights)
    _announce("sparse_adamw", "address_table", lambda weights: weights)
    _announce("select_topk", "_cut", lambda scores, others: [*scores, *others])


def _announce(kernel: str, function: str, reached: Callable[..., Sequence[Tensor]]) -> None:
    module = importlib.import_module(f"sparseft.kernels.{kernel}")
    original = getattr(module, function)

    def announced(*args):
        hardened.reachable(reached(*args))
        return original(*args)

    setattr(module, function, announced)


announce()
