"""The emulator finds planted faults: every barrier, wait and atomic removed in turn, and faults in the sources."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .build import build
from .probe import PROBES, probe

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SYNCHRONISING = {"masked_grad.cu": "masked_grad_", "masked_grad.cuh": "masked_grad_",
                 "panels.cuh": "masked_grad_panels", "select_topk.cu": "select_topk"}  # fmt: skip


def caught(emulator, operation: str, **fault: str) -> str | None:
    """The emulator's first complaint about a kernel with this fault, over a few orders of the threads.

    Wrong results alone do not count: they come with the order of the threads, the complaint must not.
    """
    for seed in range(4):
        emulator.configure(seed=seed, **fault)
        try:
            probe(operation)
        except RuntimeError as complaint:
            return f"seed {seed}: {str(complaint).splitlines()[0]}"
        except AssertionError:
            continue
    return None


def test_every_barrier_wait_and_atomic_is_needed(emulator):
    emulator.configure()
    for operation in set(SYNCHRONISING.values()):
        probe(operation)
    places = emulator.places()
    pattern = re.compile(r"__sync\w+\(|wait_for_copies<\w|atomic[A-Z]\w+\(")
    written = sum(len(pattern.findall(path.read_text())) for path in CSRC.glob("cuda/*.cu*") if path.name != "ptx.cuh")
    assert len(places) == written, f"{written} in the sources, but these ran: {places}"
    missed = []
    for what, place in places:
        operation = SYNCHRONISING[place.partition(":")[0]]
        complaint = caught(emulator, operation, **{"torn" if what == "atomic" else "removed": place})
        print(f"without {what} {place}: {complaint}")
        missed += [] if complaint else [f"{what} {place}"]
    emulator.configure()
    assert not missed, f"nothing was noticed without: {missed}"


def replaced(file: str, *changes: tuple[str, str]) -> Callable[[Path, str], str]:
    """For `build`: a source with parts of its text replaced."""

    def edit(path: Path, text: str) -> str:
        if path.name == file:
            for right, wrong in changes:
                assert right in text, f"{file} changed: {right!r} is not there any more"
                text = text.replace(right, wrong)
        return text

    return edit


FAULTS = {
    "swapped index": ("weights.cuh", "row[i] * owner.cols + col[i]", "col[i] * owner.cols + row[i]", "scatter_delta_"),
    "wrong tail mask": ("masked_grad.cu", "column >= 0 && t0 + t < depth", "column >= 0", "masked_grad_"),
    "tail reads one line too many": (
        "masked_grad.cu", "t0 + t < depth ? operand.column", "t0 + t <= depth ? operand.column", "masked_grad_",
    ),
    "32-bit offset of a weight": ("weights.cuh", "owner.data + row[i] * owner.cols + col[i]",
                                  "owner.data + static_cast<int32_t>(row[i] * owner.cols + col[i])",
                                  "offsets_beyond_int32"),
    "32-bit offset of a panel's line": ("panels.cuh", "column * operand.stride",
                                        "static_cast<int32_t>(column * operand.stride)", "offsets_beyond_int32"),
    "32-bit offset of a copied line": ("panels.cuh", "from.data[(t0 + t) * from.stride + column]",
                                       "from.data[static_cast<int32_t>((t0 + t) * from.stride + column)]",
                                       "offsets_beyond_int32"),
    "panel's tail reads one column too many": ("panels.cuh", "t < depth ? from.data", "t <= depth ? from.data",
                                               "masked_grad_panels"),
    "panel's mark in the next word": ("panels.cuh", "1u << bit); });", "2u << bit); });", "masked_grad_panels"),
    "32-bit offset of an operand": ("masked_grad.cu", "from.data[(t0 + i / pitch) * from.stride + column]",
                                    "from.data[static_cast<int32_t>((t0 + i / pitch) * from.stride + column)]",
                                    "offsets_beyond_int32"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_a_source_is_found(fault):
    file, right, wrong, operation = FAULTS[fault]
    done = run(build("checked", replaced(file, (right, wrong))), operation)
    print(done.stderr.strip().splitlines()[-1])
    assert done.returncode != 0, f"{fault}: nothing was noticed"


FAR = {  # select_topk as it would run on the scores from 2^31 on of tensors that are that much larger
    "(chunk - segment.chunk) * kChunk": "((chunk - segment.chunk) * kChunk + (int64_t{1} << 31))",
    "{call.input<T>(scores[i]), ": "{call.input<T>(scores[i]) - (int64_t{1} << 31), ",
    "nullptr, size, positions": "nullptr, size + (int64_t{1} << 31), positions",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, "where a score lies", "its position"])
def test_scores_beyond_2_31(fault):
    """Nothing on the way to a score, or to its position, is cut to 32 bits; where it is, that is noticed."""
    faults = {
        None: ("", ""),
        "where a score lies": ("segment.scores[at + i]", "segment.scores[static_cast<int32_t>(at + i)]"),
        "its position": ("= segment.first + base +", "= segment.first + static_cast<int32_t>(base) +"),
    }
    edit = replaced("select_topk.cu", *FAR.items(), faults[fault])
    done = run(build("checked", edit), "scores_beyond_int32")
    assert (done.returncode == 0) == (fault is None), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thread", "address"])
def test_sanitizer_finds_nothing(kind):
    done = run(build(kind), *(name for name in PROBES if not name.endswith("beyond_int32")), kind=kind)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "right", "wrong", "message"), [
    ("thread", "__syncthreads();\n  const int64_t chunk = shared.chunk;", "const int64_t chunk = shared.chunk;",
     "data race"),
    ("address", "left = segment.size - at;", "left = segment.size + 1 - at;", "heap-buffer-overflow"),
], ids=["thread", "address"])  # fmt: skip
def test_sanitizer_is_awake(kind, right, wrong, message):
    """Without this, finding nothing could mean that nothing was looked at."""
    done = run(build(kind, replaced("select_topk.cu", (right, wrong))), "select_topk", kind=kind)
    print(next((line for line in done.stderr.splitlines() if message in line), done.stderr[-4000:]))
    assert done.returncode != 0 and message in done.stderr, done.stderr[-4000:]


def run(library: Path, *operations: str, kind: str | None = None) -> subprocess.CompletedProcess:
    """The probe in a process of its own: under a sanitizer its run-time library has to be loaded first."""
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    if kind:
        runtime = {"thread": "libtsan.so", "address": "libasan.so"}[kind]
        found = subprocess.run(["g++", f"-print-file-name={runtime}"], capture_output=True, text=True, check=True)
        environment |= {"LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0",
                        "TSAN_OPTIONS": "halt_on_error=1"}  # fmt: skip
    command = [sys.executable, str(HERE / "probe.py"), str(library), "1", *operations]
    return subprocess.run(command, env=environment, capture_output=True, text=True)
