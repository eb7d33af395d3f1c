"""What a build chooses on machines with and without CUDA, what the doctor says of it, and the tools of a release."""

import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparseft import backend, cli

ROOT = Path(__file__).resolve().parents[1]


def load(path: Path):
    """A module of the checkout that is no part of the package, as its scripts import it from the root."""
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."))
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """The module setup.py on a machine without any toolkit; `add(version)` installs one (a script for its nvcc)."""
    module = load(ROOT / "setup.py")
    for name in ("CUDA_HOME", "CUDA_PATH", "SPARSEFT_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # sh is there, nvcc is not
    monkeypatch.setattr(module, "INSTALLED", tmp_path / "usr-local")
    return module


def install(setup, version: str, root: Path | None = None, wrapper: Path | None = None) -> Path:
    """A toolkit of that version; `wrapper` is an nvcc elsewhere that only calls it."""
    root = root or setup.INSTALLED / f"cuda-{version}"
    nvcc = root / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo "nvcc: a compiler"; echo "release {version}, V{version}.1"\n'
        f'else echo "#\\$ TOP={root}"; fi\n'
    )
    nvcc.chmod(0o755)
    if wrapper:
        wrapper.parent.mkdir(parents=True, exist_ok=True)
        wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
        wrapper.chmod(0o755)
    return root


# ---- what a build from source chooses ----


def test_without_nvcc_the_cpu_library_is_built_and_the_reason_kept(setup, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    toolkit, reason = setup.choose_cuda()
    assert toolkit is None and "needs an nvcc 13.x (nvcc found: none)" in reason
    monkeypatch.setenv("SPARSEFT_CUDA", "1")
    with pytest.raises(SystemExit, match=r"SPARSEFT_CUDA=1, but the CUDA library cannot be built: .*nvcc found: none"):
        setup.choose_cuda()


def test_a_torch_without_cuda_gets_the_cpu_library_though_nvcc_is_there(setup, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    root = install(setup, "13.0")
    toolkit, reason = setup.choose_cuda()
    assert toolkit is None
    assert "is a build without CUDA" in reason and f"nvcc found: CUDA 13.0 in {root}" in reason


def test_the_toolkit_of_torchs_major_is_taken(setup, monkeypatch):
    install(setup, "13.0")
    older = install(setup, "12.8")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    toolkit, reason = setup.choose_cuda()
    assert toolkit.root == older and toolkit.version == (12, 8) and toolkit.compiler == "a compiler, V12.8.1"
    assert "fits torch" in reason
    monkeypatch.setenv("SPARSEFT_CUDA", "0")
    assert setup.choose_cuda() == (None, "SPARSEFT_CUDA=0")


def test_a_folder_names_the_toolkit_whatever_torch_is(setup, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    root = install(setup, "12.8", tmp_path / "elsewhere")
    monkeypatch.setenv("SPARSEFT_CUDA", str(root))
    toolkit, reason = setup.choose_cuda()
    assert toolkit.root == root and "SPARSEFT_CUDA names CUDA 12.8" in reason
    monkeypatch.setenv("SPARSEFT_CUDA", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"auto, 0, 1 or a CUDA toolkit's folder, got .*nowhere"):
        setup.choose_cuda()


def test_a_wrapper_on_the_path_is_followed_to_its_toolkit(setup, monkeypatch, tmp_path):
    root = install(setup, "13.0", tmp_path / "real", wrapper=tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert [toolkit.root for toolkit in setup.find_toolkits()] == [root]


def test_every_toolkit_compiles_for_what_it_knows(setup):
    assert setup.architectures((13, 0)) == setup.architectures((12, 8)) == "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    assert setup.architectures((12, 6)) == "8.0;8.6;8.9;9.0+PTX"


def test_the_doctor_says_what_the_build_got_and_why(monkeypatch, tmp_path):
    record = {"libraries": ["_C.so"], "cuda": "not built: no nvcc on this machine", "compiler": "c++ 99"}
    (tmp_path / "_build.json").write_text(json.dumps(record))
    monkeypatch.setattr(backend, "__file__", str(tmp_path / "backend.py"))
    monkeypatch.setattr(backend, "_missing", {})
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    backend.load()
    output = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "200"}).output
    assert "cuda (cuda tensors): _C_cuda.so is not there: not built: no nvcc on this machine" in output
    for text in ("['_C.so']", "c++ 99"):
        assert text in output


# ---- the tools of a release ----


def test_a_toolkit_that_cannot_be_had_is_refused_with_what_would_help(setup, monkeypatch, tmp_path):
    toolkits = load(ROOT / "tools" / "toolkits.py")
    monkeypatch.setattr(toolkits, "CLANGS", ("clang-of-nowhere",))
    with pytest.raises(ValueError, match=r"no nvcc of 12\.x: install that toolkit, or one of clang-of-nowhere"):
        toolkits.find("12.8", tmp_path / "cache")
    with pytest.raises(ValueError, match=r"CUDA 11\.8 is not installed here"):
        toolkits.find("11.8", tmp_path / "cache")
    with pytest.raises(ValueError, match=r"as in 12\.8, got 'twelve'"):
        toolkits.find("twelve", tmp_path / "cache")


def test_an_installed_toolkit_is_taken_where_it_has_the_static_runtime(setup, tmp_path):
    toolkits = load(ROOT / "tools" / "toolkits.py")
    root = install(setup, "11.8")
    with pytest.raises(ValueError, match=r"CUDA 11\.8 is not installed here"):
        toolkits.find("11.8", tmp_path)
    (root / "lib64").mkdir()
    (root / "lib64" / "libcudart_static.a").touch()
    assert toolkits.find("11.8", tmp_path).root == root


def test_clang_is_told_what_nvcc_would_be():
    translate = load(ROOT / "tools" / "clang_nvcc.py").translate
    torchs = ["-I/a", "-c", "x.cu", "-o", "x.o", "--expt-relaxed-constexpr", "--compiler-options", "'-fPIC'",
              "-gencode=arch=compute_120,code=compute_120", "-gencode=arch=compute_120,code=sm_120",
              "-gencode=arch=compute_80,code=sm_80"]  # fmt: skip
    ours = ["-O3", "-std=c++17", "-lineinfo", "--threads", "2", "-Xcompiler=-fvisibility=hidden,-ffile-prefix-map=/a/="]
    assert translate([*torchs, *ours]) == [
        "--no-cuda-include-ptx=all", "-I/a", "-c", "x.cu", "-o", "x.o", "-fPIC", "--cuda-include-ptx=sm_120",
        "--cuda-gpu-arch=sm_120", "--cuda-gpu-arch=sm_80", "-O3", "-std=c++17", "-fvisibility=hidden",
        "-ffile-prefix-map=/a/=",
    ]  # fmt: skip


def test_the_borrowed_runtime_finds_and_does_without_cudart(tmp_path):
    """Compiled against declarations of the same size, beside a libcudart that is not there and one that is."""
    (tmp_path / "cuda_runtime_api.h").write_text(
        "#include <stddef.h>\ntypedef int cudaError_t; typedef void* cudaStream_t;\n"
        "typedef struct { unsigned x, y, z; } dim3; enum cudaFuncAttribute { a };\n"
        "enum { cudaErrorInitializationError = 3 };\n"
    )
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#include "cuda_runtime_api.h"\ncudaError_t cudaFuncSetAttribute(const void*, int, int);\n'
        "const char* cudaGetErrorString(cudaError_t); void** __cudaRegisterFatBinary(void*);\n"
        "void __cudaRegisterFatBinaryEnd(void**);\n"
        "void call(void) { __cudaRegisterFatBinaryEnd(__cudaRegisterFatBinary(0));\n"
        '  printf("%d %s\\n", cudaFuncSetAttribute(0, 0, 0), cudaGetErrorString(7)); fflush(stdout); }\n'
    )
    (tmp_path / "cudart.c").write_text(
        "int cudaFuncSetAttribute(const void* a, int b, int c) { return 0; }\n"
        'const char* cudaGetErrorString(int e) { return e == 7 ? "from the runtime" : "other"; }\n'
    )
    library, runtime = tmp_path / "library.so", tmp_path / "cudart.so"
    compiler = ["gcc", "-shared", "-fPIC", f"-I{tmp_path}"]
    borrowed = ROOT / "tools" / "borrowed_cudart.c"
    subprocess.run([*compiler, tmp_path / "main.c", borrowed, "-o", library, "-ldl"], check=True)
    subprocess.run([*compiler, tmp_path / "cudart.c", "-o", runtime], check=True)
    load_library = f"ctypes.CDLL({str(library)!r}).call()"
    for before, said in {"": "3 this torch brings no CUDA runtime", f"ctypes.CDLL({str(runtime)!r}, "
                         "ctypes.RTLD_GLOBAL);": "0 from the runtime"}.items():  # fmt: skip
        code = f"import ctypes; {before} {load_library}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == said


@pytest.fixture
def wheels(setup, monkeypatch, tmp_path):
    """The module tools/wheels.py, working in a folder of its own."""
    module = load(ROOT / "tools" / "wheels.py")
    monkeypatch.setattr(module, "WORK", tmp_path)
    return module


def pack(wheels, folder: Path, libraries: dict[str, Path], tag: str = "py3-none-any"):
    """A wheel with these libraries."""
    path = folder / f"sparseft-1-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sparseft/_build.json", '{"compiler": "c++ 99"}')
        for name, library in libraries.items():
            archive.write(library, f"sparseft/{name}")
    return wheels.Built(path, 0.0, "_C_cuda.so" in libraries)


COMPILED = ROOT / "sparseft" / "_C.so"


def test_the_audit_passes_the_library_that_was_built(wheels, tmp_path):
    assert wheels.audit(pack(wheels, tmp_path, {"_C.so": COMPILED})) == {"compiler": "c++ 99"}


def test_the_audit_refuses_bad_wheels(wheels, monkeypatch, tmp_path):
    with pytest.raises(wheels.Failure, match="not for any Python 3"):
        wheels.audit(pack(wheels, tmp_path, {"_C.so": COMPILED}, tag="cp311-cp311-linux_x86_64"))
    with pytest.raises(wheels.Failure, match=r"holds \[\], not \['sparseft/_C\.so'\]"):
        wheels.audit(pack(wheels, tmp_path, {}))
    good = pack(wheels, tmp_path, {"_C.so": COMPILED})
    monkeypatch.setattr(wheels, "MOST_BYTES", good.path.stat().st_size)
    with pytest.raises(wheels.Failure, match="are the limit"):
        wheels.audit(good)


@pytest.mark.parametrize(("function", "soname", "message"), [
    ("aoti_torch_get_dtype", "libcudart.so.12", "_C_cuda.so needs libcudart.so.12"),  # stable, of torch 2.10 or before
    ("_ZN3c105ErrorC1ENS_14SourceLocationESs", "libtorch.so", "stable ABI False"),  # c10::Error: C++, not stable
    ("puts", "libtorch.so", r"stable ABI .*\(0, 0\)"),  # no operation of torch's at all
])  # fmt: skip
def test_the_audit_refuses_bad_libraries(wheels, tmp_path, function, soname, message):
    stub, library = tmp_path / "stub.so", tmp_path / "library.so"
    (tmp_path / "stub.c").write_text(f"void {function}(void) {{}}")
    (tmp_path / "library.c").write_text(f"void {function}(void); void call(void) {{ {function}(); }}")
    gcc = ["gcc", "-shared", "-fPIC", "-fno-builtin"]
    subprocess.run([*gcc, f"-Wl,-soname,{soname}", tmp_path / "stub.c", "-o", stub], check=True)
    subprocess.run([*gcc, tmp_path / "library.c", stub, "-o", library], check=True)
    with pytest.raises(wheels.Failure, match=message):
        wheels.audit(pack(wheels, tmp_path, {"_C.so": COMPILED, "_C_cuda.so": library}))


# ---- what the machine code must hold ----


def figures(**changed: int) -> dict[str, int]:
    """Those of a kernel that meets every expectation."""
    return (
        dict.fromkeys(load(ROOT / "bench" / "sass_report.py").INSTRUCTIONS, 0) | {"stack": 0, "registers": 32} | changed
    )


@pytest.mark.parametrize(("name", "good", "bad"), [
    # 32 x 64 sums of a warp: 2 x 8 products, 2 + 4 ldmatrix
    ("tensor_core::masked_grad<Half, 128>", {"mma": 16, "matrix": 6, "copy": 2}, {"mma": 15}),
    ("tensor_core::masked_grad<Half, 64>", {"mma": 8, "matrix": 4, "copy": 2}, {"matrix": 3}),
    ("plain::masked_grad<float>", {"fma": 16}, {"mma": 1}),
    ("scatter_delta<float, float>", {"load16": 2, "store16": 2}, {"store16": 1}),
    ("scatter_delta<Half, float>", {"load16": 2}, {"atomic": 1}),
    ("scatter_delta<Half, Half>", {}, {"local": 1}),
    ("sparse_adamw<float, float>", {"load16": 6, "store16": 3}, {"load16": 5}),  # 4 streams, base, births
    ("sparse_adamw<BFloat16, float>", {"load16": 5, "store16": 3}, {"registers": 129}),  # two blocks of 256: 128 each
    ("sparse_adamw<Half, Half>", {"load16": 4, "store16": 2}, {"store16": 1}),  # no masters: a quad is 8 bytes
    ("sparse_adamw<double, double>", {"load16": 11, "store16": 6}, {"store16": 5}),
    ("count_digit<float, true>", {"load16": 2, "smem_atomic": 1, "atomic": 1, "registers": 64}, {"registers": 65}),
    ("compact<float, true>", {"load16": 8, "atomic": 1}, {"atomic": 2}),
    ("choose_digit", {}, {"stack": 8}),
    ("store_records<Weight<float> >", {}, {"atomic": 1}),
])  # fmt: skip
def test_expected_machine_code(name, good, bad):
    expectation = load(ROOT / "bench" / "sass_report.py").expected(name)
    assert expectation.violations(figures(**good)) == []
    assert len(expectation.violations(figures(**good) | bad)) == 1


def test_an_unknown_kernel_is_reported():
    report = load(ROOT / "bench" / "sass_report.py")
    found = report.violations([report.Kernel(arch, "new_kernel", figures()) for arch in report.ARCHITECTURES])
    assert found == [f"{arch} new_kernel: not known here" for arch in report.ARCHITECTURES]
