"""Takes nvcc's place for a build by clang: clang_nvcc.py CLANG TOOLKIT, then nvcc's arguments.

Only what torch's extension builder and setup.py say to nvcc is understood; clang refuses what it does not know.
"""

import os
import re
import subprocess
import sys
from pathlib import Path


def translate(arguments: list[str]) -> list[str]:
    """nvcc's arguments in clang's words."""
    result = ["--no-cuda-include-ptx=all"]  # clang would add that of every architecture
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument in ("--threads", "-ccbin"):  # one process does it all, and is the host compiler too
            queue.pop(0)
        elif argument in ("-lineinfo", "--expt-relaxed-constexpr"):  # only profilers miss it; always so in clang
            continue
        elif argument in ("-Xcompiler", "--compiler-options"):
            result += queue.pop(0).strip("'").split(",")
        elif argument.startswith("-Xcompiler="):
            result += argument.removeprefix("-Xcompiler=").split(",")
        elif found := re.fullmatch(r"-gencode=arch=compute_(\w+),code=(sm|compute)_(\w+)", argument):
            result.append(f"--cuda-{'gpu-arch' if found[2] == 'sm' else 'include-ptx'}=sm_{found[1]}")
        else:
            result.append(argument)
    return result


def main() -> None:
    clang, toolkit, *arguments = sys.argv[1:]
    if arguments == ["--version"]:
        name = subprocess.run([clang, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
        header = Path(toolkit, "include", "cuda.h").read_text()
        number = int(re.findall(r"#define CUDA_VERSION (\d+)", header)[0])  # 12080: 12.8
        release = f"{number // 1000}.{number % 1000 // 10}"
        print(f"{name} in nvcc's place\nheaders, libdevice and ptxas of CUDA, release {release}, V{release}")
    elif "--dryrun" in arguments:
        print(f"#$ TOP={toolkit}")
    else:
        fixed = ["-x", "cuda", f"--cuda-path={toolkit}", "--no-offload-new-driver", "-Wno-unknown-cuda-version",
                 "-Xcuda-fatbinary", "--compress-mode=none"]  # fmt: skip
        os.execv(clang, [clang, *fixed, *translate(arguments)])


if __name__ == "__main__":
    main()
