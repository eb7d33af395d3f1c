"""What a figure was measured on."""

import os
import platform
import subprocess
from pathlib import Path

import torch


def describe() -> dict[str, str]:
    """Processor, cores, GPU, versions and commit, for the head of a results file."""
    import transformers

    here = Path(__file__).parent.parent
    git = ["git", "-C", str(here)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    # the results that a run has written itself say nothing about the code
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!bench/results"], capture_output=True)
    dirty = "-dirty" if commit and changed.returncode else ""
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    return {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit + dirty or "unknown",
    }
