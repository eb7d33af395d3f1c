"""Builds sparseft/_C.so (CPU) always, sparseft/_C_cuda.so when an nvcc of torch's CUDA major is found; needs no GPU.

Environment:
    SPARSEFT_CUDA   auto (default): build the CUDA library if that is possible here; 1: fail if it is not; 0: do not.
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

import torch
from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
TORCH_FLOOR = "0x020a000000000000"  # 2.10: the stable ABI that the libraries are held to
# by CUDA major; masked_grad needs the tensor cores and asynchronous copies of 8.0
ARCHITECTURES = {12: "8.0;8.6;8.9;9.0+PTX", 13: "8.0;8.6;8.9;9.0;10.0;12.0+PTX"}


def find_toolkits() -> list[tuple[Path, tuple[int, int]]]:
    """Root and version of every CUDA toolkit here, the preferred one first.

    nvcc itself is asked for its root: the one on the PATH may be a wrapper script or a link.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home, "bin", "nvcc") for home in homes if home]
    candidates += [Path(found)] if (found := shutil.which("nvcc")) else []
    candidates += [Path("/usr/local/cuda/bin/nvcc"), *sorted(Path("/usr/local").glob("cuda-*/bin/nvcc"), reverse=True)]
    toolkits: dict[Path, tuple[int, int]] = {}
    for nvcc in candidates:
        try:
            release = _output(nvcc, "--version")
            dryrun = _output(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull)
        except OSError:
            continue
        version = re.search(r"release (\d+)\.(\d+)", release)
        top = re.search(r"^#\$ TOP=(\S+)", dryrun, re.MULTILINE)
        if version:
            root = Path(top[1]) if top else nvcc.resolve().parent.parent
            toolkits.setdefault(root.resolve(), (int(version[1]), int(version[2])))
    return list(toolkits.items())


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout if done.returncode == 0 else ""


def choose_cuda() -> tuple[Path | None, str]:
    """The toolkit to build the CUDA library with, or None; and the reason."""
    wanted = os.environ.get("SPARSEFT_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"sparseft: SPARSEFT_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None, "SPARSEFT_CUDA=0"
    toolkits = find_toolkits()
    listed = ", ".join(f"{major}.{minor} in {root}" for root, (major, minor) in toolkits) or "none"
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a build without CUDA (nvcc found: {listed})"
    else:
        wanted_major = int(torch.version.cuda.split(".")[0])
        for root, (major, minor) in toolkits:
            if major == wanted_major:
                return root, f"nvcc {major}.{minor} in {root} fits torch {torch.__version__}"
        reason = f"torch {torch.__version__} needs an nvcc {wanted_major}.x (nvcc found: {listed})"
    if wanted == "1":
        raise SystemExit(f"sparseft: SPARSEFT_CUDA=1, but the CUDA library cannot be built: {reason}")
    return None, reason


def extensions(toolkit: Path | None) -> list[Extension]:
    """The libraries to build. Torch reads CUDA_HOME when its module is imported: hence the late import."""
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit)
        major = int(torch.version.cuda.split(".")[0])
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES.get(major, "9.0+PTX"))
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    def sources(pattern: str) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(pattern))]

    define = f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}"
    paths = f"-ffile-prefix-map={ROOT.resolve()}/="  # error messages name csrc/..., not this machine's folders
    cxx = ["-O3", "-std=c++17", "-Wall", "-fvisibility=hidden", define, paths]
    link = ["-Wl,--as-needed", "-s"]
    built = [CppExtension("sparseft._C", sources("csrc/cpu/*.cpp"), extra_compile_args={"cxx": cxx},
                          extra_link_args=link, py_limited_api=True)]  # fmt: skip
    if toolkit is not None:
        nvcc = ["-O3", "-std=c++17", "-lineinfo", "--threads", os.environ.get("NVCC_THREADS", "2"), define,
                "-DUSE_CUDA", f"-Xcompiler=-fvisibility=hidden,{paths}"]  # fmt: skip
        cuda = CUDAExtension("sparseft._C_cuda", sources("csrc/cuda/*.cu"), py_limited_api=True,
                             extra_compile_args={"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": nvcc})  # fmt: skip
        # The runtime is linked in: the library then runs beside any torch, whatever CUDA that one brings.
        cuda.libraries.remove("cudart")
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

    setup(
        packages=[*find_packages(include=["sparseft", "sparseft.*"]), "sparseft.kernels"],
        package_dir={"sparseft.kernels": "kernels"},
        ext_modules=libraries,
        cmdclass={"build_ext": Build, "bdist_wheel": AnyPythonWheel},
        zip_safe=False,
    )


if __name__ == "__main__":  # true under pip as well; `make wheel` imports this file to ask choose_cuda
    main()
