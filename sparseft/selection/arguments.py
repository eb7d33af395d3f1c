"""What select refuses before it looks at the model."""

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from sparseft.pattern import check_tile
from sparseft.selection.budget import ALLOCATIONS, LINES, Allocation
from sparseft.selection.criteria import CRITERIA
from sparseft.selection.criterion import Criterion

STRUCTURES = ("entries", *LINES, "blocks", "channels", "subnet")


def allocation_of(allocation: str | Allocation) -> Allocation:
    """An allocation by its name.

    Raises:
        ValueError: none has that name.
    """
    if isinstance(allocation, Allocation):
        return allocation
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be an Allocation or one of {sorted(ALLOCATIONS)}, got {allocation!r}")
    return ALLOCATIONS[allocation]


def check(
    density: float, k: int | None, tile: tuple[int, int], tile_budget: float, allocation: Allocation, structure: str
) -> None:
    """Shares, counts and names.

    Raises:
        ValueError, TypeError: one of them does not fit, alone or beside another.
    """
    if k is not None:
        _expect("k", k, Integral, "an int")
        if k < 1:
            raise ValueError(f"k must be positive, got {k}")
    for name, share in (("density", density), ("tile_budget", tile_budget)):
        _expect(name, share, Real, "a number")
        if not 0 < share <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {share}")
    if not 0 <= allocation.floor <= 1:
        raise ValueError(f"allocation.floor must lie in [0, 1], got {allocation.floor}")
    if structure not in STRUCTURES:
        raise ValueError(f"structure must be one of {list(STRUCTURES)}, got {structure!r}")
    if structure != "entries" and (allocation.floor or allocation.rows):
        what = "a floor goes" if allocation.floor else "rows go"
        raise ValueError(f"allocation: {what} by entries, and structure is {structure!r}")
    if allocation.floor and allocation.rows:
        raise ValueError("allocation: rows get their entries for certain; floor must be 0")
    check_tile(tile)


def check_batches(rule: Criterion, batches: Any, memory: int | None) -> None:
    """Whether there are batches that the criterion and the limit on memory can do with.

    Raises:
        ValueError, TypeError: there are none, or they are no batches.
    """
    if memory is not None:
        _expect("memory", memory, Real, "a number of bytes")
        if memory < 0:
            raise ValueError(f"memory must not be negative, got {memory}")
    if rule.accumulate is None:
        return
    if batches is None:
        free = sorted(name for name, other in CRITERIA.items() if other.accumulate is None)
        raise ValueError(f"batches must be given: the criterion looks at data (those that do not: {free})")
    check_iterable(batches)
    if memory is not None and not hasattr(batches, "__len__"):
        raise TypeError(f"batches must have a length where memory is limited: they may be read several times; got "
                        f"{type(batches).__name__}")  # fmt: skip


def check_iterable(batches: Any) -> None:
    """
    Raises:
        TypeError: these are no batches, or one that is not in a list.
    """
    if isinstance(batches, Mapping | Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches, got {type(batches).__name__}; one batch: [batch]")


def _expect(name: str, value: object, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, got {value!r}")
