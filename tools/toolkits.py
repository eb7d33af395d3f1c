"""Finds or assembles the CUDA toolkit of a version, for tools/wheels.py.

In this order: an installed toolkit of exactly that version; from 13.0 on NVIDIA's nvcc packages of PyPI; for 12.x,
whose PyPI packages have no nvcc, clang with their headers, libdevice and ptxas (tools/clang_nvcc.py is their nvcc).
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setup import Toolkit, find_toolkits, read_toolkit

HERE = Path(__file__).resolve().parent
CLANGS = ("clang++-22", "clang++-21", "clang++-20")  # 20 is the first that knows sm_100 and sm_120
FATBINARY = "13.0"  # cu12's packages lack the program fatbinary; this version's is taken, told not to compress


def find(version: str, cache: Path) -> Toolkit:
    """The toolkit of a CUDA version "major.minor"; what has to be fetched or assembled goes into `cache`.

    Raises:
        ValueError: there is none, with what would help.
    """
    try:
        major, minor = map(int, version.split("."))
    except ValueError:
        raise ValueError(f"a CUDA version is written as in 12.8, got {version!r}") from None
    for toolkit in find_toolkits():
        if toolkit.version == (major, minor) and _static_runtime(toolkit.root):
            return toolkit
    if major < 12:
        raise ValueError(f"CUDA {version} is not installed here, and older than what PyPI's packages can serve (12.0)")
    cache.mkdir(parents=True, exist_ok=True)
    root = (cache / f"cuda-{version}").resolve()
    found = read_toolkit(root / "bin" / "nvcc")
    if found is None:
        shutil.rmtree(root, ignore_errors=True)
        if major == 12:
            _assemble_for_clang(version, root, cache)
        else:
            with tempfile.TemporaryDirectory(dir=cache) as parts:
                _install(Path(parts), version, "nvcc", "nvvm", "crt", "runtime", "cccl")
                shutil.move(Path(parts, "nvidia", f"cu{major}"), root)
        found = read_toolkit(root / "bin" / "nvcc")
    if found is None or found.version != (major, minor) or not _static_runtime(root):
        raise ValueError(f"CUDA {version}: what was put together in {root} does not work ({found})")
    return found


def _static_runtime(root: Path) -> bool:
    return any((root / folder / "libcudart_static.a").exists() for folder in ("lib64", "lib"))


def _install(target: Path, version: str, *parts: str) -> None:
    """NVIDIA's packages of a CUDA version, without what they depend on."""
    major = version.split(".")[0]
    names = {part: "nvidia-nvvm" if part == "nvvm" else f"nvidia-cuda-{part}" for part in parts}
    suffix = "-cu12" if major == "12" else ""  # from 13 on the names bear no version
    _run(
        sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", "install", "--no-deps", "--target", target,
        *(f"{name}{suffix}=={version}.*" for name in names.values()),
    )  # fmt: skip


def _assemble_for_clang(version: str, root: Path, cache: Path) -> None:
    clang = next((path for name in CLANGS if (path := shutil.which(name))), None)
    if clang is None:
        raise ValueError(
            f"CUDA {version} is not installed here, and PyPI has no nvcc of 12.x: install that toolkit, or one of "
            f"{', '.join(CLANGS)} (apt-get install clang-22) to compile with clang instead"
        )
    with tempfile.TemporaryDirectory(dir=cache) as parts:
        _install(Path(parts), version, "nvcc", "runtime", "cccl")
        nvidia = Path(parts, "nvidia")
        for part in ("cuda_cccl", "cuda_nvcc", "cuda_runtime"):
            shutil.copytree(nvidia / part / "include", root / "include", dirs_exist_ok=True)
        for folder in ("nvvm", "bin"):
            shutil.move(nvidia / "cuda_nvcc" / folder, root / folder)
    (root / "include" / "curand_mtgp32_kernel.h").touch()  # clang includes it always; no package is needed for us
    (root / "bin" / "ptxas").chmod(0o755)
    (root / "bin" / "fatbinary").symlink_to(find(FATBINARY, cache).root / "bin" / "fatbinary")
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "clang_nvcc.py"} {clang} {root} "$@"\n')
    nvcc.chmod(0o755)
    # no cu12 package has the static runtime either
    (root / "lib64").mkdir()
    runtime = root / "lib64" / "borrowed_cudart.o"
    _run(clang, "-x", "c", "-O2", "-fPIC", "-Wall", "-Werror", f"-I{root}/include",
         "-c", HERE / "borrowed_cudart.c", "-o", runtime)  # fmt: skip
    _run("ar", "rcs", root / "lib64" / "libcudart_static.a", runtime)


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(map(str, command))} failed:\n{done.stdout[-3000:]}")
