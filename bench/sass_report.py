"""What the CUDA library's machine code holds, for every architecture in it, against a table of expectations.

python -m bench.sass_report [LIBRARY]       (default: sparseft/_C_cuda.so; needs cuobjdump and nvdisasm, no GPU)

A row of the table bounds, for the kernels whose name it matches, the registers of a thread, the bytes of stack (a
spill shows there), the local memory instructions, and counts of the instructions that the kernel is built around.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
INSTRUCTIONS = {
    "load16": r"\bLDG\.\S*\b128\b",
    "store16": r"\bSTG\.\S*\b128\b",
    "copy": r"\bLDGSTS\.\S*\b128\b",  # cp.async of 16 bytes
    "matrix": r"\bLDSM\.\S*MT88\.4\b",  # ldmatrix.x4.trans
    "mma": r"\bHMMA\.16816\.F32\b",
    "smem_atomic": r"\bATOMS\.",
    "atomic": r"\b(?:ATOMG?|REDG?)\.",
    "barrier": r"\bBAR\.(?:SYNC|RED)",
    "local": r"\b(?:LDL|STL)\b",
}
ANY = (0, 10**9)
CLEAN = {"stack": (0, 0), "local": (0, 0)}
# (kernel, what is expected of it as (least, most)). Every kernel has to match a row.
EXPECTED = [
    (r"tensor_core::masked_grad<.*, 64>",
     CLEAN | {"registers": (1, 144), "mma": (16, 64), "matrix": (8, 32), "copy": (4, 32)}),
    (r"tensor_core::masked_grad<.*, 128>",
     CLEAN | {"registers": (1, 192), "mma": (32, 128), "matrix": (12, 48), "copy": (4, 32)}),
    (r"compact_columns", CLEAN | {"registers": (1, 40)}),
    (r"plain::masked_grad<", CLEAN | {"registers": (1, 128), "mma": (0, 0), "barrier": (3, 8)}),
    (r"scatter_delta<", CLEAN | {"registers": (1, 96), "atomic": (0, 0)}),
    (r"scatter_delta<float, float>", {"load16": (2, 4), "store16": (2, 4)}),
    (r"sparse_adamw<", CLEAN | {"registers": (1, 192), "atomic": (0, 0), "load16": (4, 24)}),
    (r"sparse_adamw<.*, (float|double)>", {"store16": (3, 12)}),
    (r"sparse_adamw<.*, (BFloat16|Half)>", {"store16": (2, 8)}),  # no masters: four values are 8 bytes
    (r"count_digit<", CLEAN | {"registers": (1, 64), "load16": (1, 16), "smem_atomic": (1, 32), "atomic": (2, 32)}),
    (r"choose_digit", CLEAN | {"registers": (1, 64)}),
    (r"compact<", CLEAN | {"registers": (1, 80), "load16": (1, 16), "atomic": (1, 1), "barrier": (3, 3)}),
    (r"begin_selection|store_records", CLEAN | {"registers": (1, 32)}),
]  # fmt: skip


@dataclass
class Kernel:
    """One kernel on one architecture."""

    architecture: str
    name: str
    figures: dict[str, int] = field(default_factory=dict)


def find_tool(name: str) -> str:
    """A program of the CUDA toolkit: from CUDA_HOME, the PATH, a usual folder, or the package triton."""
    folders = [
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"),
        *sorted(Path("/usr/local").glob("cuda-*/bin")),
    ]
    if spec := find_spec("triton"):
        folders.append(Path(spec.origin or "").parent / "backends" / "nvidia" / "bin")
    found = shutil.which(name) or next((str(f / name) for f in folders if (f / name).exists()), None)
    if not found:
        raise SystemExit(f"{name} was not found: install a CUDA toolkit, or the package triton")
    return found


def read_library(library: Path) -> list[Kernel]:
    """All kernels of a library with their figures."""
    with tempfile.TemporaryDirectory() as folder:
        _output(find_tool("cuobjdump"), "-xelf", "all", str(library.resolve()), cwd=folder)
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(_read_cubin, sorted(Path(folder).glob("*.cubin"))))
    kernels = [kernel for part in found for kernel in part]
    names = _output("c++filt", *(kernel.name for kernel in kernels)).splitlines() if kernels else []
    for kernel, name in zip(kernels, names, strict=True):
        kernel.name = re.sub(
            r"sparseft::|\(anonymous namespace\)::|c10::|void |\(.*", "", name.replace("(anonymous namespace)::", "")
        )
    return kernels


def _read_cubin(cubin: Path) -> list[Kernel]:
    match = re.search(r"sm_\d+", cubin.name)
    usage = _output(find_tool("cuobjdump"), "--dump-resource-usage", str(cubin))
    code = _output(find_tool("nvdisasm"), "-c", str(cubin))
    bodies = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\s*\.section|\Z)", code, re.S | re.M))
    kernels = []
    for name, registers, stack, shared in re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        figures = {"registers": int(registers), "stack": int(stack), "shared": int(shared)}
        figures |= {key: len(re.findall(pattern, bodies[name])) for key, pattern in INSTRUCTIONS.items()}
        kernels.append(Kernel(match[0] if match else "?", name, figures))
    return kernels


def _output(*command: str, cwd: str | None = None) -> str:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def violations(kernels: list[Kernel]) -> list[str]:
    """Where the machine code differs from the table."""
    bad = [f"{a}: not in the library" for a in ARCHITECTURES if a not in {k.architecture for k in kernels}]
    for kernel in kernels:
        rows = [expected for pattern, expected in EXPECTED if re.search(pattern, kernel.name)]
        if not rows:
            bad.append(f"{kernel.architecture} {kernel.name}: no row of the table")
        for expected in rows:
            for key, (least, most) in expected.items():
                if not least <= kernel.figures[key] <= most:
                    bad.append(f"{kernel.architecture} {kernel.name}: {key} is {kernel.figures[key]}, "
                               f"expected {least} to {most}")  # fmt: skip
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "sparseft" / "_C_cuda.so"
    parser.add_argument("library", nargs="?", type=Path, default=default)
    library = parser.parse_args().library
    if not library.exists():
        raise SystemExit(f"{library} does not exist: build it with SPARSEFT_CUDA=1, or name another library")
    kernels = read_library(library)
    columns = ["registers", "stack", *INSTRUCTIONS]
    grouped = defaultdict(list)
    for kernel in kernels:
        grouped[kernel.name].append(kernel)
    print(
        f"{'least-most over ' + str(len({k.architecture for k in kernels})) + ' architectures':44}",
        *(f"{c:>11}" for c in columns),
    )
    for name, group in sorted(grouped.items()):
        cells = []
        for column in columns:
            figures = [kernel.figures[column] for kernel in group]
            cells.append(f"{min(figures)}-{max(figures)}" if min(figures) != max(figures) else f"{figures[0]}")
        print(f"{name[:44]:44}", *(f"{cell:>11}" for cell in cells))
    bad = violations(kernels)
    print(*bad, f"{len(kernels)} kernels, {len(bad)} expectations not met", sep="\n")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
