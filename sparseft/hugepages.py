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


def collapse(tensors: Iterable[Tensor]) -> int:
    """Move the memory of contiguous CPU tensors into huge pages, as far as the system can and is allowed to.

    Addresses and contents stay. Memory that lies between the tensors, in the same huge page, moves along.

    Returns:
        How many huge pages the tensors lie in now, for certain; 0 where the system has none.
    """
    size = _page_size()
    if not size:
        return 0
    starts = set()
    for tensor in tensors:
        if tensor.is_cpu and tensor.nbytes >= size // 8:  # smaller ones lie among other things
            begin = tensor.data_ptr()
            starts |= set(range(begin // size * size, begin + tensor.nbytes, size))
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # a page that cannot be collapsed, as one of a file's, or one with a gap, stays as it is
    return sum(madvise(start, size, MADV_COLLAPSE) == 0 for start in sorted(starts))


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
