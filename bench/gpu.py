"""The four operations on this machine's GPU: first their tests, then their speed beside torch's and the roofline.

    python -m bench.gpu               runs tests/kernels on the device; stops if anything fails; then the benchmarks
    python -m bench.gpu --no-tests    the benchmarks alone

Writes bench/results/<gpu>.json and prints a table. Under ten minutes; what could not run is listed with its reason.

A line's share is the time that its work would take at this GPU's own measured rates, divided by the time it took:
the larger of bytes / copy bandwidth and FLOPs / bf16 matmul rate. The bytes are those of the definition (what must be
read and written), in whole 32-byte sectors for single weights.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.machine import describe
from sparseft import backend
from sparseft.pattern import Layout, Pattern, pack

ROOT = Path(__file__).parents[1]
SECTOR = 32


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
    grad_out, input = (torch.randn(sizes.tokens, sizes.size, device=device).bfloat16() for _ in range(2))
    out, indices = torch.zeros(len(pattern), device=device), pattern.indices()
    tiles = len(pattern.tiles)
    return Work(
        "masked_grad",
        grad_out.nbytes + input.nbytes + 10 * len(pattern),
        2 * tiles * sizes.tile**2 * sizes.tokens,
        lambda: torch.ops.sparseft.masked_grad_(out, grad_out, input, *pattern.layout, True),
        {"dense dW (cuBLAS)": lambda: grad_out.T @ input,
         "dense dW, gathered": lambda: out.add_((grad_out.T @ input).view(-1)[indices])},
    )  # fmt: skip


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
                lines.append(Line(work.operation, name, 1000 * taken, ideal / taken))
            except Exception as reason:  # out of memory, not built, not supported: the report says so
                failed[f"{work.operation}, {name}"] = f"{type(reason).__name__}: {str(reason).splitlines()[0]}"
    return {"machine": describe(), "sizes": asdict(sizes), "rates": asdict(peak),
            "lines": [asdict(line) for line in lines], "could_not_run": failed}  # fmt: skip


def show(report: dict) -> str:
    """The report as a table."""
    rate = report["rates"]
    head = f"copy {rate['copy'] / 1e12:.2f} TB/s, bf16 matmul {rate['matmul'] / 1e12:.0f} TFLOP/s (measured)"
    rows = [f"{x['operation']:14} {x['implementation']:36} {x['milliseconds']:10.3f} ms {100 * x['share']:6.1f} %"
            for x in report["lines"]]  # fmt: skip
    failed = [f"could not run: {what}: {why}" for what, why in report["could_not_run"].items()]
    return "\n".join([head, *rows, *failed])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-tests", action="store_true", help="benchmarks only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"bench.gpu: no GPU here: torch {torch.__version__} finds no CUDA device")
        return 0
    if not options.no_tests:
        tests = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "tests/kernels"]
        if subprocess.run(tests, cwd=ROOT).returncode:
            print("bench.gpu: tests failed on this device; no speed is reported")
            return 1
    report = measure("cuda", Sizes(), ("cuda", "triton", "reference"))
    file = ROOT / "bench/results" / f"{torch.cuda.get_device_name().replace(' ', '-')}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(show(report), f"written to {file.relative_to(ROOT)}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
