"""How much memory this process has resident, and had at most."""

from pathlib import Path


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status (VmRSS: now, VmHWM: the highest since `forget_peak`)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> int:
    """Let the kernel's high-water mark start again from what is resident now; returns that."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")
