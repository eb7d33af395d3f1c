"""Builds csrc/cuda for the CPU (see emulator.h) and talks to the result."""

import ctypes
import hashlib
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "emulator"
FLAGS = [
    "-std=c++17", "-fPIC", "-O1", "-g1", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unknown-pragmas",
    "-DSPARSEFT_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000",
]  # fmt: skip
KINDS = {  # flags of the emulator, of the kernels, of the link
    "checked": ([], ["-fsanitize=thread"], []),
    "thread": (["-DEMULATOR_TSAN"], ["-fsanitize=thread"], ["-fsanitize=thread"]),
    "address": (["-DEMULATOR_ASAN"], ["-fsanitize=address"], ["-fsanitize=address"]),
}


def build(kind: str = "checked", edit: Callable[[Path, str], str] = lambda path, text: text) -> Path:
    """The library of one kind, compiled if its sources changed; `edit` may change a source's text first."""
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    texts = {path: edit(path, path.read_text()) for path in sorted((ROOT / "csrc").glob("cuda/*.cu*"))}
    fixed = [ROOT / "csrc" / "common.h", *(Path(__file__).parent / f"emulator.{end}" for end in ("h", "cpp"))]
    state = [kind, FLAGS, KINDS[kind], torch.__version__, *texts.values(), *(path.read_text() for path in fixed)]
    folder = CACHE / f"{kind}-{hashlib.sha256(repr(state).encode()).hexdigest()[:16]}"
    library = folder / "emulated.so"
    if library.exists():
        return library
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        (folder / "cuda" / path.name).write_text(text)
    (folder / "common.h").write_text(fixed[0].read_text())
    host, kernels, link = KINDS[kind]
    sources = sorted((folder / "cuda").glob("*.cu"))
    common = ["g++", *FLAGS, *include, f"-I{Path(__file__).parent}"]
    jobs = [[*common, *host, "-c", str(fixed[2]), "-o", str(folder / "emulator.o")]]
    jobs += [[*common, *kernels, "-x", "c++", "-c", str(s), "-o", str(s.with_suffix(".o"))] for s in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_run, jobs))
    objects = [str(folder / "emulator.o"), *(str(s.with_suffix(".o")) for s in sources)]
    part = folder / "part.so"
    torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    _run(["g++", "-shared", *link, "-o", str(part), *objects, *torch_libraries])
    part.rename(library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@dataclass
class Traffic:
    """What the warps of one call moved of one tensor, in one direction."""

    requests: int  # warp instructions
    bytes: int  # asked for, summed over warp instructions
    sectors: int  # 32-byte sectors moved, likewise
    distinct_bytes: int  # over the whole call
    distinct_sectors: int

    @property
    def efficiency(self) -> float:
        """Share of the moved bytes that was asked for."""
        return self.bytes / (32 * self.sectors)


class Emulator:
    """The emulated kernels: torch.ops.sparseft_cuda.* on CPU tensors once this exists."""

    def __init__(self, library: Path):
        torch.ops.load_library(library)
        self._library = ctypes.CDLL(str(library))
        for name in ("emulator_places", "emulator_traffic"):
            getattr(self._library, name).restype = ctypes.c_char_p
        self._library.emulator_configure.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_bool, *[ctypes.c_char_p] * 2]
        self.configure()

    def configure(self, seed: int = 0, resident: int = 3, sectors: bool = False, removed: str = "", torn: str = "") -> None:
        """Choose the order of the threads.

        Args:
            resident: blocks in flight at once.
            sectors: log global accesses for `traffic`.
            removed: "file:line" of a barrier or wait that shall do nothing. `torn`: of an atomic that shall be none.
        """
        self._library.emulator_configure(seed, resident, sectors, removed.encode(), torn.encode())

    def places(self) -> list[tuple[str, str]]:
        """(what, "file:line") of every barrier, wait and atomic that has run."""
        lines = self._library.emulator_places().decode().splitlines()
        return [tuple(line.rsplit(" ", 1)) for line in lines]

    def traffic(self, tensor: torch.Tensor) -> tuple[Traffic, Traffic]:
        """(reads, writes) of a tensor in the last call."""
        for line in self._library.emulator_traffic().decode().splitlines():
            address, *figures = map(int, line.split())
            if address == tensor.data_ptr():
                return Traffic(*figures[:5]), Traffic(*figures[5:])
        raise KeyError("the last call did not use this tensor")
