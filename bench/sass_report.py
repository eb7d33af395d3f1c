"""What the CUDA library's machine code holds, for every architecture in it, against what its sources ask for.

python -m bench.sass_report [LIBRARY]       (default: sparseft/_C_cuda.so; needs cuobjdump and nvdisasm, no GPU)

No expectation is a figure that a compiler once gave; each follows from the sources or from the hardware (`expected`):

- No stack, no local memory: nothing spills, no array in registers is indexed at run time.
- Registers: as many blocks as the kernel's __launch_bounds__ asks for fit a multiprocessor's 65,536 registers.
  Where it asks for one (masked_grad by whole tiles, fp32 and fp64) this cannot fail: there the line above alone counts.
  How many blocks would be fastest is for a GPU to say.
- Accesses of 16 bytes: one for each 16 bytes of each stream that a thread reads or writes per turn.
- Tensor cores: one instruction for each 16 x 8 product of a warp's share of the tile; they accumulate in registers, so
  that these loops are always unrolled. The same for the multiplications of the ordinary cores.
- Atomics: none where every output has one writer; in shared memory where that is what the histogram is made for.
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
    "matrix": r"\bLDSM\.\S*MT?88\.4\b",  # ldmatrix.x4, .trans or not
    "mma": r"\bHMMA\.16816\.F32\b",
    "fma": r"\b[FD]FMA\b",
    "smem_atomic": r"\bATOMS\.",
    "atomic": r"(?<!\.)\b(?:ATOMG?|REDG?)\.",  # not the reduction of a barrier, BAR.RED
    "local": r"\b(?:LDL|STL)\b",
}
REGISTERS = 65_536  # of a multiprocessor, on every architecture here
REGISTER_UNIT = 8  # registers of a thread are handed out in units of 8 (256 a warp)
SIZES = {"float": 4, "double": 8, "Half": 2, "BFloat16": 2}
NOTHING = {"stack": 0, "local": 0}


@dataclass(frozen=True)
class Expectation:
    """Bounds of a kernel's figures. `threads` of a block and `blocks` on a multiprocessor: its __launch_bounds__."""

    threads: int
    blocks: int = 1
    least: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)

    def violations(self, figures: dict[str, int]) -> list[str]:
        units = -(-figures["registers"] // REGISTER_UNIT)
        taken = units * REGISTER_UNIT * self.threads * self.blocks
        bad = [f"{self.blocks} blocks need {taken} registers, there are {REGISTERS}"] if taken > REGISTERS else []
        bad += [f"{k}: {figures[k]}, at least {n} expected" for k, n in self.least.items() if figures[k] < n]
        bad += [f"{k}: {figures[k]}, at most {n} allowed" for k, n in (NOTHING | self.most).items() if figures[k] > n]
        return bad


def expected(name: str) -> Expectation | None:
    """What csrc/cuda asks of the kernel of that name; None for one that is not known."""
    if found := re.search(r"tensor_core::masked_grad<\w+, (\d+)>", name):
        # A warp's share is 32 x side / 2. Per 16 steps of t: a product for each 16 x 8 of it; ldmatrix.x4 for each
        # 16 rows and each 16 columns. cp.async for each of the two operands.
        side = int(found[1])
        threads = side // 32 * 2 * 32
        least = {"mma": 32 // 16 * (side // 2 // 8), "matrix": 32 // 16 + side // 2 // 16, "copy": 2}
        return Expectation(threads, least=least, most={"atomic": 0})
    if "panels::masked_grad<" in name:
        # A warp's share is 16 x 16. Per 16 steps of t: two products of 16 x 8, ldmatrix.x4 for the rows and for the
        # columns. Columns are marked by atomics in shared memory; every output has one writer.
        least = {"mma": 2, "matrix": 2, "copy": 1, "smem_atomic": 1}
        return Expectation(128, 4, least=least, most={"atomic": 0})
    if "plain::masked_grad<" in name:  # a thread's 4 x 4 sums
        return Expectation(256, least={"fma": 4 * 4}, most={"mma": 0, "atomic": 0})
    if found := re.search(r"scatter_delta<(\w+), (\w+)>", name):
        # Two quads of values a thread, read always, written by a swap, which wants both of one type.
        vectors = 2 * _vectors(found[2])
        stores = vectors if found[1] == found[2] else 0
        return Expectation(256, 2, least={"load16": vectors, "store16": stores}, most={"atomic": 0})
    if found := re.search(r"sparse_adamw<(\w+), (\w+)>", name):
        # A quad of the gradient and two moments in at least fp32, of the value in its own type (the weight's, where
        # there are no masters), of the base in the weight's, of int32 births; value and moments are written.
        wide = "double" if found[1] == "double" else "float"
        loads = 3 * _vectors(wide) + _vectors(found[2]) + _vectors(found[1]) + 1
        stores = 2 * _vectors(wide) + _vectors(found[2])
        return Expectation(256, 2, least={"load16": loads, "store16": stores}, most={"atomic": 0})
    if found := re.search(r"count_digit<(\w+), (\w+)>", name):  # of one score tensor, or of two that are multiplied
        loads = 2 if found[2] == "true" else 1
        return Expectation(256, 4, least={"load16": loads, "smem_atomic": 1, "atomic": 1})
    if found := re.search(r"\bcompact<(\w+), (\w+)>", name):
        # 16 elements a thread and tensor, as 16-byte groups whose bits stay in registers; one ticket a block.
        loads = SIZES[found[1]] * (2 if found[2] == "true" else 1)
        return Expectation(256, 4, least={"load16": loads}, most={"atomic": 1})
    if re.search("choose_digit|compact_columns|panels::turn", name):
        return Expectation(256, most={"atomic": 0})
    if re.search("begin_selection|store_records", name):
        return Expectation(64, most={"atomic": 0})
    return None


def _vectors(dtype: str) -> int:
    """Accesses of 16 bytes that a quad of a type takes; a quad of halves moves in one of 8."""
    return 4 * SIZES[dtype] // 16


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
    """Where the machine code falls short."""
    bad = [f"{a}: not in the library" for a in ARCHITECTURES if a not in {k.architecture for k in kernels}]
    for kernel in kernels:
        expectation = expected(kernel.name)
        found = ["not known here"] if expectation is None else expectation.violations(kernel.figures)
        bad += [f"{kernel.architecture} {kernel.name}: {what}" for what in found]
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
