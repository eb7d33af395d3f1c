"""The four operations on this machine's GPU: first their tests, then their speed beside torch's and the roofline.

    python -m bench.gpu               runs tests/kernels on the device; stops if anything fails; then the benchmarks
    python -m bench.gpu --no-tests    the benchmarks alone

Writes bench/results/<gpu>.json and prints a table; tests that were skipped and calls that could not run are listed with
their reasons. The tests compile some 500 kernels: several processes share them, and have six minutes.

A line's share is the time that its work would take at this GPU's own measured rates, divided by the time it took:
the larger of bytes / copy bandwidth and FLOPs / bf16 matmul rate. The bytes are those of the definition (what must be
read and written), in whole 32-byte sectors for single weights; the FLOPs those of the active tiles.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import Tensor

from bench.machine import describe
from sparseft import backend
from sparseft.pattern import Layout, Pattern, pack

ROOT = Path(__file__).parents[1]
SECTOR = 32
TEST_SECONDS = 360


@dataclass(frozen=True)
class Sizes:
    """The work: layers of [size, size] weights in bf16, 1 % of their entries in 10 % of their tiles."""

    size: int = 4096
    layers: int = 16
    tokens: int = 16384
    scores: int = 1 << 28
    repeats: int = 20
    tile: int = 64


@dataclass
class Rates:
    """What this GPU reaches, measured."""

    copy: float  # bytes per second, read and written
    matmul: float  # FLOPs per second, bf16


@dataclass
class Line:
    """One timed call."""

    operation: str
    implementation: str
    milliseconds: float
    terabytes: float  # per second
    teraflops: float
    share: float  # of the roofline


@dataclass
class Work:
    """One operation: what must be moved and computed, our call, and what torch offers instead."""

    operation: str
    moved: int  # bytes
    flops: int
    ours: Callable[[], object]
    others: dict[str, Callable[[], object]]


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call after three for warming up (the first one compiles)."""
    times = []
    for i in range(repeats + 3):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            taken = begin.elapsed_time(end) / 1000
        else:
            start = time.perf_counter()
            call()
            taken = time.perf_counter() - start
        times += [taken] if i >= 3 else []
    return statistics.median(times)


def rates(device: str, sizes: Sizes) -> Rates:
    """A copy of as many bytes as there are scores, and a square bf16 product."""
    source = torch.ones(sizes.scores, dtype=torch.bfloat16, device=device)
    target, square = torch.empty_like(source), torch.ones(2 * sizes.size, 2 * sizes.size, device=device).bfloat16()
    copied = seconds(lambda: target.copy_(source), device, sizes.repeats)
    multiplied = seconds(lambda: square @ square, device, sizes.repeats)
    return Rates(2 * source.nbytes / copied, 2 * len(square) ** 3 / multiplied)


def clustered(sizes: Sizes, seed: int, device: str) -> Pattern:
    """10 % of the tiles, 10 % of the entries of each."""
    generator = torch.Generator().manual_seed(seed)
    across = sizes.size // sizes.tile
    active = torch.rand(across, across, generator=generator) < 0.1
    active[0, 0] = True
    blocks = active.repeat_interleave(sizes.tile, 0).repeat_interleave(sizes.tile, 1)
    mask = blocks & (torch.rand(sizes.size, sizes.size, generator=generator) < 0.1)
    rows, cols = (mask.any(dim).nonzero().squeeze(1) for dim in (1, 0))
    indices = mask.view(-1).nonzero().squeeze(1)
    return Pattern.from_indices(indices, mask.shape, row_order=rows, col_order=cols, tile=(sizes.tile,) * 2).to(device)


def works(sizes: Sizes, device: str) -> Iterator[Work]:
    """The operations, one after the other: each one's memory is free before the next one's is taken."""
    yield _masked_grad(sizes, device)
    yield _shared_input(sizes, device)
    yield _unstructured(sizes, device)
    patterns = [clustered(sizes, seed, device) for seed in range(sizes.layers)]
    layout = pack(patterns)
    weights = [torch.randn(sizes.size, sizes.size, device=device).bfloat16() for _ in patterns]
    sectors = sum(torch.unique(p.indices() * 2 // SECTOR).numel() for p in patterns) * SECTOR
    yield _scatter_delta(layout, weights, [p.indices() for p in patterns], sectors)
    yield _sparse_adamw(layout, weights, sectors)
    del weights, layout, patterns
    yield _select_topk(sizes, device)


def _masked_grad(sizes: Sizes, device: str) -> Work:
    pattern = clustered(sizes, 0, device)
    grad_out, input = _operands(sizes, device, 2)
    out, indices = torch.zeros(len(pattern), device=device), pattern.indices()
    return Work(
        "masked_grad",
        grad_out.nbytes + input.nbytes + 10 * len(pattern),
        2 * len(pattern.tiles) * sizes.tile**2 * sizes.tokens,
        lambda: torch.ops.sparseft.masked_grad_(out, grad_out, input, *pattern.layout, True),
        {"dense dW (cuBLAS)": lambda: grad_out.T @ input,
         "dense dW, gathered": lambda: out.add_((grad_out.T @ input).view(-1)[indices])},
    )  # fmt: skip


def _shared_input(sizes: Sizes, device: str) -> Work:
    """q, k and v: three calls, and one launch for all three."""
    patterns = [clustered(sizes, seed, device) for seed in range(3)]
    *grad_outs, input = _operands(sizes, device, 4)
    layout = pack(patterns)
    out = torch.zeros(len(layout.local), device=device)
    parts = out.split([len(p) for p in patterns])

    def one_by_one():
        for part, grad_out, pattern in zip(parts, grad_outs, patterns, strict=True):
            torch.ops.sparseft.masked_grad_(part, grad_out, input, *pattern.layout, True)

    return Work(
        "masked_grad x 3",
        sum(g.nbytes for g in grad_outs) + input.nbytes + 10 * len(out),
        2 * len(layout.tiles) * sizes.tile**2 * sizes.tokens,
        one_by_one,
        {"triton, one launch": partial(_in_triton, out, grad_outs, input, layout)},
    )


def _unstructured(sizes: Sizes, device: str) -> Work:
    """1 % of the entries, anywhere: every tile is active, and holds few."""
    mask = torch.rand(sizes.size, sizes.size, generator=torch.Generator().manual_seed(0)) < 0.01
    pattern = Pattern.from_mask(mask, tile=(sizes.tile,) * 2).to(device)
    grad_out, input = _operands(sizes, device, 2)
    out = torch.zeros(len(pattern), device=device)
    return Work(
        "masked_grad, 1 %",
        grad_out.nbytes + input.nbytes + 10 * len(pattern),
        2 * len(pattern) * sizes.tokens,
        lambda: torch.ops.sparseft.masked_grad_(out, grad_out, input, *pattern.layout, True),
        {"dense dW (cuBLAS)": lambda: grad_out.T @ input,
         **{f"triton, {v}": partial(_in_triton, out, grad_out, input, pattern.layout, variant=v)
            for v in ("tiles", "panels")}},
    )  # fmt: skip


def _operands(sizes: Sizes, device: str, count: int) -> list[Tensor]:
    return [torch.randn(sizes.tokens, sizes.size, device=device).bfloat16() for _ in range(count)]


def _in_triton(out: Tensor, grad_out: Tensor | list[Tensor], input: Tensor, layout: Layout, **options: str) -> None:
    """What Triton's function does beyond the operation."""
    with backend.forced("triton"):  # says why, if it is not there
        from sparseft.kernels.masked_grad import masked_grad_

        masked_grad_(out, grad_out, input, *layout, True, **options)


def _scatter_delta(layout: Layout, weights: list[Tensor], indices: list[Tensor], sectors: int) -> Work:
    values = torch.randn(len(layout.local), device=layout.local.device).bfloat16()
    parts = values.split([len(i) for i in indices])

    def by_index():
        for weight, index, part in zip(weights, indices, parts, strict=True):
            weight.view(-1)[index] += part

    return Work(
        "scatter_delta", 2 * sectors + 4 * len(values), 0,
        lambda: torch.ops.sparseft.scatter_delta_(weights, values, *layout, "add", 1.0),
        {"torch, by index": by_index, "dense add of all weights": lambda: torch._foreach_add_(weights, weights)},
    )  # fmt: skip


def _sparse_adamw(layout: Layout, weights: list[Tensor], sectors: int) -> Work:
    device = layout.local.device
    values, grad, exp_avg, exp_avg_sq = torch.zeros(4, len(layout.local), device=device).unbind()
    step, lr = torch.ones(len(weights), dtype=torch.int64, device=device), torch.tensor(1e-3, device=device)
    few = [torch.nn.Parameter(w.clone()) for w in weights[:4]]  # dense states of all would be large
    for p in few:
        p.grad = torch.zeros_like(p)
    dense = torch.optim.AdamW(few, fused=True)
    return Work(
        "sparse_adamw", 2 * sectors + 30 * len(values), 0,
        lambda: torch.ops.sparseft.sparse_adamw_(
            weights, values, grad, exp_avg, exp_avg_sq, None, step, None, *layout, lr, 0.9, 0.999, 1e-8, 0.0, False,
            None, None),
        {f"dense fused AdamW, {len(few)} of {len(weights)} layers": dense.step},
    )  # fmt: skip


def _select_topk(sizes: Sizes, device: str) -> Work:
    scores = torch.randn(sizes.scores, device=device).bfloat16()
    k = sizes.scores // 100
    return Work(
        "select_topk", 2 * scores.nbytes + 8 * k, 0,
        lambda: torch.ops.sparseft.select_topk([scores], [], k, "abs"),
        {"torch.topk": lambda: torch.topk(scores.abs(), k)},
    )  # fmt: skip


def measure(device: str, sizes: Sizes, implementations: tuple[str, ...]) -> dict:
    """Times everything; what fails is recorded with its reason, and the rest goes on."""
    peak = rates(device, sizes)
    lines: list[Line] = []
    failed: dict[str, str] = {}
    for work in works(sizes, device):
        ideal = max(work.moved / peak.copy, work.flops / peak.matmul)
        calls = [(name, name, work.ours) for name in implementations] + [(n, None, c) for n, c in work.others.items()]
        for name, forced, call in calls:
            try:
                with backend.forced(forced):
                    taken = seconds(call, device, sizes.repeats)
                rate = work.moved / taken / 1e12, work.flops / taken / 1e12
                lines.append(Line(work.operation, name, 1000 * taken, *rate, ideal / taken))
            except Exception as reason:  # out of memory, not built, not supported: the report says so
                failed[f"{work.operation}, {name}"] = f"{type(reason).__name__}: {str(reason).splitlines()[0]}"
    return {"machine": describe(), "sizes": asdict(sizes), "rates": asdict(peak),
            "lines": [asdict(line) for line in lines], "could_not_run": failed}  # fmt: skip


def show(report: dict) -> str:
    """The report as a table."""
    rate = report["rates"]
    head = f"copy {rate['copy'] / 1e12:.2f} TB/s, bf16 matmul {rate['matmul'] / 1e12:.0f} TFLOP/s (measured)"
    head += f"\n{'':53}{'ms':>10}{'TB/s':>8}{'TFLOP/s':>9}{'share':>8}"
    rows = [f"{x['operation']:17}{x['implementation']:36}{x['milliseconds']:10.3f}{x['terabytes']:8.2f}"
            f"{x['teraflops']:9.1f}{100 * x['share']:6.1f} %" for x in report["lines"]]  # fmt: skip
    failed = [f"could not run: {what}: {why}" for what, why in report["could_not_run"].items()]
    return "\n".join([head, *rows, *failed])


def test() -> tuple[int, dict[str, int | str]]:
    """The operation table on the device: pytest's exit status (-1: out of time), and how many it skipped, by reason."""
    memory = torch.cuda.get_device_properties(0).total_memory >> 30  # GiB; a test of 2^31 elements takes up to 9
    workers = max(1, min(8, os.cpu_count() or 1, memory // 10))
    with tempfile.NamedTemporaryFile(suffix=".xml") as file:
        command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "-n", str(workers), "-k",
                   "cuda or triton", f"--junitxml={file.name}", "tests/kernels"]  # fmt: skip
        environment = os.environ | {"SPARSEFT_LARGE": "1", "TRITON_INTERPRET": "0"}
        try:
            status = subprocess.run(command, cwd=ROOT, env=environment, timeout=TEST_SECONDS).returncode
        except subprocess.TimeoutExpired:
            return -1, {}
        skipped = ElementTree.parse(file.name).iter("skipped")
        return status, dict(Counter(str(one.get("message")).splitlines()[0] for one in skipped))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-tests", action="store_true", help="benchmarks only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"bench.gpu: no GPU here: torch {torch.__version__} finds no CUDA device")
        return 1
    skipped: dict[str, int | str] = {"not asked for (--no-tests)": "all"}
    if not options.no_tests:
        status, skipped = test()
        if status:
            why = f"did not end in {TEST_SECONDS} s" if status < 0 else "failed"
            print(f"bench.gpu: tests {why} on this device; no speed is reported")
            return 1
    report = {"skipped_tests": skipped, **measure("cuda", Sizes(), ("cuda", "triton", "reference"))}
    file = ROOT / "bench/results" / f"{torch.cuda.get_device_name().replace(' ', '-')}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(show(report), *(f"skipped {count} tests: {why}" for why, count in skipped.items()), sep="\n")
    print(f"written to {file.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
