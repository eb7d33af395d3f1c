"""Builds csrc/cuda for the CPU (see emulator.h) and talks to the result."""

import ctypes
import hashlib
import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "emulator"
FLAGS = [
    "-std=c++17", "-fPIC", "-O2", "-g1", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unknown-pragmas",
    "-DSPARSEFT_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000",
]  # fmt: skip
KINDS = {  # flags of the emulator, of the kernels, of the link
    "checked": ([], ["-fsanitize=thread"], []),
    "thread": (["-DEMULATOR_TSAN"], ["-fsanitize=thread"], ["-fsanitize=thread"]),
    "address": (["-DEMULATOR_ASAN"], ["-fsanitize=address"], ["-fsanitize=address"]),
}


def build(kind: str = "checked", edit: Callable[[Path, str], str] = lambda path, text: text) -> Path:
    """The library of one kind; what has not changed is not compiled again. `edit` may change a source's text first."""
    texts = {path.name: edit(path, path.read_text()) for path in sorted((ROOT / "csrc" / "cuda").iterdir())}
    texts |= {path.name: path.read_text() for path in (ROOT / "csrc").glob("*.h")}
    texts |= {path.name: path.read_text() for path in HERE.glob("emulator.*")}
    names = ["emulator.cpp", *(name for name in texts if name.endswith(".cu"))]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda name: _compile(kind, name, texts), names))
    library = CACHE / f"{kind}-{_digest([path.name for path in objects])}.so"
    if not library.exists():
        torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
        _make(library, ["g++", "-shared", *KINDS[kind][2], *map(str, objects), *torch_libraries])
    return library


def _compile(kind: str, name: str, texts: dict[str, str]) -> Path:
    """The object of one source, from copies of it and of what it includes in a folder named after their content."""
    needed, queue = set(), [name, "emulator.h"]
    while queue:
        file = queue.pop()
        needed.add(file)
        included = (match.rpartition("/")[2] for match in re.findall(r'#include "(.+)"', texts[file]))
        queue += [found for found in included if found in texts and found not in needed]
    flags = [*FLAGS, *KINDS[kind][0 if name == "emulator.cpp" else 1]]
    flags += [f"-I{path}" for path in cpp_extension.include_paths()]
    folder = CACHE / _digest([kind, name, flags, torch.__version__, [(file, texts[file]) for file in sorted(needed)]])
    target = folder.with_suffix(".o")
    if not target.exists():
        for file in needed:
            place = folder / (file if (ROOT / "csrc" / file).exists() else f"cuda/{file}")
            place.parent.mkdir(parents=True, exist_ok=True)
            part = place.with_name(f"{place.name}.{os.getpid()}")  # another process may be compiling from this folder
            part.write_text(texts[file])
            part.replace(place)
        _make(target, ["g++", *flags, f"-I{folder}/cuda", "-x", "c++", "-c", str(folder / "cuda" / name)])
    return target


def _digest(state: object) -> str:
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def _make(target: Path, command: list[str]) -> None:
    """Run a compiler; the file appears under its name once it is whole (two test processes may build at once)."""
    part = target.with_suffix(f".{os.getpid()}")
    done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    part.rename(target)


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
        self._library.emulator_configure.argtypes = [
            ctypes.c_uint64,
            ctypes.c_int,
            ctypes.c_bool,
            *[ctypes.c_char_p] * 2,
        ]
        self.configure()

    def configure(
        self, seed: int = 0, resident: int = 3, sectors: bool = False, removed: str = "", torn: str = ""
    ) -> None:
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
