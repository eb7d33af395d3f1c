"""Huge pages under tensors on the CPU.

A sparse update touches one entry here and one there; with pages of 4 KiB it spends much of its time on finding pages
(misses of the TLB).
"""

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MADV_COLLAPSE = 25  # since Linux 6.1
LARGEST = 1 << 25  # bytes of a page: larger ones (512 MiB on some arm64) hold too much that lies between tensors
PATIENCE = 16  # pages refused in a row, after which no other is asked for: each try takes time


def collapse(tensors: Iterable[Tensor]) -> int:
    """Move the memory of contiguous CPU tensors into huge pages, as far as the system can and is allowed to.

    Addresses and contents stay. Memory that lies between the tensors, in the same huge page, moves along. Takes some
    milliseconds for a page of 2 MiB, once; memory mapped from a file stays as it is.

    Returns:
        How many huge pages the tensors lie in now, for certain; 0 where the system has none.
    """
    size = _page_size()
    if not 0 < size <= LARGEST:
        return 0
    starts = set()
    for tensor in tensors:
        if tensor.is_cpu and tensor.nbytes >= size // 8:  # smaller ones lie among other things
            begin = tensor.data_ptr()
            starts |= set(range(begin // size * size, begin + tensor.nbytes, size))
    moved = refused = 0
    for start in sorted(starts):
        if _advise(start, size):
            moved, refused = moved + 1, 0
        else:  # it stays as it is: mapped from a file, with a gap, no room
            refused += 1
        if refused == PATIENCE:
            break
    return moved


def _advise(start: int, size: int) -> bool:
    """Whether the memory [start, start + size) lies in a huge page now."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise(start, size, MADV_COLLAPSE) == 0


def _page_size() -> int:
    """Bytes of a huge page; 0 if there are none, or they are switched off."""
    if sys.platform != "linux":
        return 0
    try:
        if "[never]" in (SETTINGS / "enabled").read_text():
            return 0
        return int((SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0
