"""Gives freed memory back to the system where the C library would keep it."""

import ctypes
import sys
from collections.abc import Callable

EVERY = 1 << 22


class HeapTrim:
    """Returns the heap's free pages after every few MB that were freed.

    Gradients come and go while small results stay between them. glibc (2.36) takes tensors below 32 MB from a heap that
    such neighbours cut up, finds few of its holes large enough for the next gradient, and keeps the pages of all: the
    process would grow by more than all gradients together. Elsewhere than in glibc this does nothing.
    """

    def __init__(self) -> None:
        self._trim: Callable[[int], int] | None = None
        if sys.platform == "linux":
            self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._freed = 0

    def freed(self, size: int) -> None:
        """Note that `size` bytes of CPU tensors were freed."""
        self._freed += size
        if self._trim is not None and self._freed >= EVERY:
            self._trim(0)
            self._freed = 0
