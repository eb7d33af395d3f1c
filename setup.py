"""Builds sparseft/_C.so (CPU) always, sparseft/_C_cuda.so when an nvcc of torch's CUDA major is found; needs no GPU.

Environment:
    SPARSEFT_CUDA   auto (default): build the CUDA library if that is possible here; 1: fail if it is not; 0: do not;
                    a folder: build it with the CUDA toolkit there. A torch without CUDA serves any; torch's extension
                    builder refuses a toolkit of another major version than torch's own.
    SPARSEFT_LOCAL_VERSION   appended to the version as "+..."; tools/wheels.py names a wheel's CUDA by it.
    CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, NVCC_THREADS, CXX: as for any torch extension.

What was built, by what, and why not more, is printed and written to sparseft/_build.json.
"""

import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

VERSION = "0.1.0"
ROOT = Path(__file__).parent
INSTALLED = Path("/usr/local")  # where NVIDIA's installers put toolkits, as cuda-<version>, with a link cuda
TORCH_FLOOR = "0x020a000000000000"  # 2.10: the stable ABI that the libraries are held to


class Toolkit(NamedTuple):
    """A CUDA toolkit; `compiler` is what its nvcc calls itself."""

    root: Path
    version: tuple[int, int]
    compiler: str

    def __str__(self) -> str:
        return f"CUDA {self.version[0]}.{self.version[1]} in {self.root}"


def read_toolkit(nvcc: Path) -> Toolkit | None:
    """The toolkit that an nvcc belongs to; None where there is no nvcc that runs.

    nvcc itself is asked for its root: the one on the PATH may be a wrapper script or a link.
    """
    try:
        about = _output(nvcc, "--version")
        dryrun = _output(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull)
    except OSError:
        return None
    version = re.search(r"release (\d+)\.(\d+), (\S+)", about)
    if not version:
        return None
    top = re.search(r"^#\$ TOP=(\S+)", dryrun, re.MULTILINE)
    root = Path(top[1]) if top else nvcc.resolve().parent.parent
    name = about.partition("\n")[0].removeprefix("nvcc: ")
    return Toolkit(root.resolve(), (int(version[1]), int(version[2])), f"{name}, {version[3]}")


def find_toolkits() -> list[Toolkit]:
    """Every CUDA toolkit here, the preferred one first."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home, "bin", "nvcc") for home in homes if home]
    candidates += [Path(found)] if (found := shutil.which("nvcc")) else []
    candidates += [INSTALLED / "cuda" / "bin" / "nvcc", *sorted(INSTALLED.glob("cuda-*/bin/nvcc"), reverse=True)]
    toolkits: dict[Path, Toolkit] = {}
    for nvcc in candidates:
        if toolkit := read_toolkit(nvcc):
            toolkits.setdefault(toolkit.root, toolkit)
    return list(toolkits.values())


def architectures(version: tuple[int, int]) -> str:
    """What a CUDA version is to compile for: all it knows from 8.0 on (tensor cores, asynchronous copies)."""
    return "8.0;8.6;8.9;9.0;10.0;12.0+PTX" if version >= (12, 8) else "8.0;8.6;8.9;9.0+PTX"


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout if done.returncode == 0 else ""


def choose_cuda() -> tuple[Toolkit | None, str]:
    """The toolkit to build the CUDA library with, or None; and the reason."""
    wanted = os.environ.get("SPARSEFT_CUDA", "auto")
    if wanted == "0":
        return None, "SPARSEFT_CUDA=0"
    if wanted not in ("auto", "1"):
        given = read_toolkit(Path(wanted, "bin", "nvcc"))
        if given is None:
            raise SystemExit(f"sparseft: SPARSEFT_CUDA must be auto, 0, 1 or a CUDA toolkit's folder, got {wanted!r}")
        return given, f"SPARSEFT_CUDA names {given}"
    toolkits = find_toolkits()
    listed = ", ".join(map(str, toolkits)) or "none"
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a build without CUDA (nvcc found: {listed})"
    else:
        wanted_major = int(torch.version.cuda.split(".")[0])
        for toolkit in toolkits:
            if toolkit.version[0] == wanted_major:
                return toolkit, f"{toolkit} fits torch {torch.__version__}"
        reason = f"torch {torch.__version__} needs an nvcc {wanted_major}.x (nvcc found: {listed})"
    if wanted == "1":
        raise SystemExit(f"sparseft: SPARSEFT_CUDA=1, but the CUDA library cannot be built: {reason}")
    return None, reason


def extensions(toolkit: Toolkit | None) -> list[Extension]:
    """The libraries to build."""
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    if toolkit is not None:
        cpp_extension.CUDA_HOME = str(toolkit.root)  # torch's own guess is wrong for a wrapped nvcc
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(toolkit.version))

    def sources(pattern: str) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(pattern))]

    define = f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}"
    paths = f"-ffile-prefix-map={ROOT.resolve()}/="  # error messages name csrc/..., not this machine's folders
    # a square root that sets errno is a branch for each number: no loop with one becomes vectors
    cxx = ["-O3", "-std=c++17", "-Wall", "-fno-math-errno", "-fvisibility=hidden", define, paths]
    link = ["-Wl,--as-needed", "-s"]
    built = [CppExtension("sparseft._C", sources("csrc/cpu/*.cpp"), extra_compile_args={"cxx": cxx},
                          extra_link_args=link, py_limited_api=True)]  # fmt: skip
    if toolkit is not None:
        nvcc = ["-O3", "-std=c++17", "-lineinfo", "--threads", os.environ.get("NVCC_THREADS", "2"), define,
                "-DUSE_CUDA", f"-Xcompiler=-fvisibility=hidden,{paths}"]  # fmt: skip
        cuda = CUDAExtension("sparseft._C_cuda", sources("csrc/cuda/*.cu"), py_limited_api=True,
                             extra_compile_args={"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": nvcc})  # fmt: skip
        # The runtime is linked in, and nothing of torch's CUDA part: the library runs beside any torch.
        cuda.libraries = [name for name in cuda.libraries if name not in ("cudart", "c10_cuda", "torch_cuda")]
        cuda.extra_link_args = [*link, "-lcudart_static", "-ldl", "-lrt", "-lpthread",
                                "-Wl,--exclude-libs,libcudart_static.a"]  # fmt: skip
        built.append(cuda)
    return built


class AnyPythonWheel(bdist_wheel):
    """The libraries hold no Python API (torch.ops.load_library opens them): one wheel serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def main() -> None:
    toolkit, reason = choose_cuda()
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise SystemExit(f"sparseft: no C++ compiler: {compiler!r} was not found (install g++, or set CXX)")
    libraries = extensions(toolkit)
    record = {
        "libraries": [f"{library.name.rpartition('.')[2]}.so" for library in libraries],
        "cuda": f"{'built' if toolkit else 'not built'}: {reason}",
        "compiler": _output(*compiler.split(), "--version").partition("\n")[0],
        "cuda compiler": toolkit.compiler if toolkit else "none",
        "torch": torch.__version__,
        "platform": platform.platform(),
    }
    print("sparseft: " + "; ".join(f"{key}: {value}" for key, value in record.items()), flush=True)

    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension.with_options(no_python_abi_suffix=True)):
        def get_export_symbols(self, ext):  # no PyInit function: see AnyPythonWheel
            return []

        def run(self):
            super().run()
            package = ROOT / "sparseft" if self.inplace else Path(self.build_lib, "sparseft")
            (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    local = os.environ.get("SPARSEFT_LOCAL_VERSION")
    setup(
        version=f"{VERSION}+{local}" if local else VERSION,
        packages=[*find_packages(include=["sparseft", "sparseft.*"]), "sparseft.kernels"],
        package_dir={"sparseft.kernels": "kernels"},
        ext_modules=libraries,
        cmdclass={"build_ext": Build, "bdist_wheel": AnyPythonWheel},
        zip_safe=False,
    )


if __name__ == "__main__":  # true under pip as well; tools/ imports this file to ask what is here
    main()
