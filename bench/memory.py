"""How much memory this process has resident, and had at most."""

import ctypes
from pathlib import Path


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status (VmRSS: now, VmHWM: the highest since `forget_peak`)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> int:
    """Give freed memory back, and let the kernel's high-water mark start again from what is resident now; returns
    that."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: what it keeps for later would hide new memory
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")
