"""Each operation on this CPU against the torch line that people would write, and against its floor.

    python -m bench.ops                             # everything (about eight minutes)
    python -m bench.ops --only masked_grad --rounds 1 --append

A group of calls is timed alternating, after ours was checked; figures are medians of the turns' ratios. Floors are
measured in the same turns: a copy's bandwidth, a read of the scores. All groups are measured in each round, minutes
apart and in new memory: what others on the host do to the caches meanwhile changes some ratios by half. The median over
the rounds is held against the bounds. Writes bench/results/ops.csv; exits 1 if a bound is short.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.machine import describe
from bench.memory import forget_peak, resident
from bench.rows import read_rows, write_rows
from sparseft import reference
from sparseft.hugepages import collapse
from sparseft.ops import masked_grad, scatter_delta_, select_topk, sparse_adamw_
from sparseft.pattern import Pattern, pack

RESULTS = Path(__file__).parent / "results" / "ops.csv"
LINE = 64  # bytes that memory is read and written in
LEAST = 4.0  # seconds that a group is timed: a second may be one of those in which others on the host use the caches
COLUMNS = ("operation", "size", "dtype", "what", "figure", "unit", "bound", "verdict", "round")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """What is measured; the shapes are SmolLM2-135M's, layer by layer, and its embedding."""

    squares: tuple[int, ...] = (1024, 4096)
    tokens: tuple[int, ...] = (512, 2048)
    densities: tuple[float, ...] = (0.01, 0.05)
    shapes: tuple[tuple[int, int], ...] = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576),
                                           (576, 1536))  # fmt: skip
    layers: int = 30
    embedding: tuple[int, int] = (49152, 576)
    scores: int = 106_168_320
    repeats: int = 7


@dataclass
class Group:
    """Calls that do the same work, "ours" among them, and what their figures may be.

    `bounds`: (what, figure of a turn's seconds, bound), `apart`: (what, figure measured by itself, bound); a figure at
    or above its bound is good.
    """

    operation: str
    size: str
    dtype: str
    calls: dict[str, Callable[[], object]]
    check: Callable[[], None]
    bounds: list[tuple[str, Callable[[dict[str, float]], float], float]] = field(default_factory=list)
    apart: list[tuple[str, Callable[[], float], float]] = field(default_factory=list)
    repeats: int | None = None


def alternating(calls: dict[str, Callable[[], object]], repeats: int, least: float) -> list[dict[str, float]]:
    """Seconds of each call, turn by turn; one turn more than is counted, and for `least` seconds at least."""
    turns: list[dict[str, float]] = []
    begun = time.perf_counter()
    while len(turns) <= repeats or time.perf_counter() - begun < least:
        turns.append({name: seconds_of(call) for name, call in calls.items()})
    return turns[1:]


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def faster_than(rival: str) -> Callable[[dict[str, float]], float]:
    return lambda seconds: seconds[rival] / seconds["ours"]


# ---- the operations -------------------------------------------------------------------------------------------


def masked_grads(sizes: Sizes) -> Iterator[Group]:
    least = {("fp32", 0.01): 8.0, ("bf16", 0.01): 5.0, ("fp32", 0.05): 4.0, ("bf16", 0.05): 3.0}
    for n in sizes.squares:
        for tokens in sizes.tokens:
            for name, dtype in DTYPES.items():
                for density in sizes.densities:
                    yield _masked_grad(n, tokens, name, dtype, density, least[name, density])
    for name, dtype in DTYPES.items():
        for fill in (0.1, 1.0):
            yield _block_grad(min(sizes.squares), min(sizes.tokens), name, dtype, fill)


def _masked_grad(n: int, tokens: int, name: str, dtype: torch.dtype, density: float, least: float) -> Group:
    """Entries at random: the worst case, with no row or column that is not needed."""
    generator = torch.Generator().manual_seed(0)
    grad_out, input = (torch.randn(tokens, n, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(n, n, generator=generator) < density
    pattern = Pattern.from_mask(mask)
    indices = pattern.indices()
    calls = {
        "ours": lambda: masked_grad(grad_out, input, pattern),
        "dense GEMM": lambda: grad_out.T @ input,
        "dense GEMM + gather": lambda: (grad_out.T @ input).view(-1)[indices],
    }
    bounds = [
        ("x dense GEMM", faster_than("dense GEMM"), least),
        ("x dense GEMM + gather", faster_than("dense GEMM + gather"), 1.0),
    ]
    if dtype == torch.float32:  # it takes no other on the CPU
        zeros = mask.float().to_sparse_csr()
        calls["torch.sparse.sampled_addmm"] = lambda: torch.sparse.sampled_addmm(zeros, grad_out.T, input, beta=0)
        bounds.append(("x sampled_addmm", faster_than("torch.sparse.sampled_addmm"), 1.0))
    check = partial(_check_masked_grad, grad_out, input, pattern)
    return Group("masked_grad", f"{n}x{n}, T={tokens}, {density:.0%}", name, calls, check, bounds)


def _check_masked_grad(grad_out: Tensor, input: Tensor, pattern: Pattern) -> None:
    """Some of the entries, within the rounding of sums in fp32."""
    indices, (tokens, n) = pattern.indices(), input.shape
    some = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:4096]
    products = grad_out[:, indices[some] // n].double() * input[:, indices[some] % n].double()
    bound = (tokens + 1) * 2.0**-24 * 1.01 * products.abs().sum(0)
    got = masked_grad(grad_out, input, pattern)[some].double()
    assert bool(((got - products.sum(0)).abs() <= bound).all()), "masked_grad is wrong"


def _block_grad(n: int, tokens: int, name: str, dtype: torch.dtype, fill: float) -> Group:
    """Entries in some rows and columns only, as sorted tiles have them (a tenth of a block) or as whole columns do:
    dot products against the dense product of what is needed, and a gather. No bound: this says which to build on."""
    generator = torch.Generator().manual_seed(0)
    grad_out, input = (torch.randn(tokens, n, generator=generator).to(dtype) for _ in range(2))
    rows, cols = (torch.randperm(n, generator=generator)[: n * share // 100].sort().values
                  for share in ((100, 5) if fill == 1 else (32, 32)))  # fmt: skip
    mask = torch.zeros(n, n, dtype=torch.bool)
    mask[rows[:, None], cols] = torch.rand(len(rows), len(cols), generator=generator) < fill
    pattern = Pattern.from_mask(mask)
    places = mask[rows][:, cols].flatten().nonzero().squeeze(1)

    def block() -> Tensor:
        needed = grad_out if fill == 1 else grad_out[:, rows]
        product = (needed.T @ input[:, cols]).view(-1)
        return product if fill == 1 else product[places]

    calls = {"ours": lambda: masked_grad(grad_out, input, pattern), "GEMM of the block + gather": block,
             "dense GEMM": lambda: grad_out.T @ input}  # fmt: skip
    check = partial(_check_masked_grad, grad_out, input, pattern)
    what = "5% of columns" if fill == 1 else "1% in a block"
    return Group("masked_grad", f"{n}x{n}, T={tokens}, {what}", name, calls, check)


def adamws(sizes: Sizes) -> Iterator[Group]:
    for name, dtype in DTYPES.items():
        yield _adamw(sizes, name, dtype)


def _adamw(sizes: Sizes, name: str, dtype: torch.dtype) -> Group:
    """1 % of all linear weights, against fused AdamW on all weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = sizes.shapes * sizes.layers
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    patterns = [_random_pattern(shape, 0.01, generator) for shape in shapes]
    layout = pack(patterns)
    values = torch.cat([p.gather(w).float() for p, w in zip(patterns, weights, strict=True)])
    grad = torch.randn(len(values), generator=generator)
    exp_avg, exp_avg_sq = torch.zeros_like(values), torch.zeros_like(values)
    step, lr = torch.ones(len(weights), dtype=torch.int64), torch.tensor(1e-6, dtype=torch.float64)
    dense, huge = (_dense_adamw((*shapes, sizes.embedding), dtype) for _ in range(2))

    # the lines of the weights that hold an entry, read and written; values and moments likewise; gradient, positions
    per_line = LINE // dtype.itemsize
    lines = sum(torch.unique(p.indices() // per_line).numel() for p in patterns)
    moved = 2 * LINE * lines + len(values) * (3 * 8 + 4 + 2)
    # copied in pieces that the cache cannot hold, as the weights are
    source = torch.empty(64 << 20).fill_(1.0)
    target = torch.zeros_like(source)
    collapse([source, target, *weights, values, exp_avg, exp_avg_sq])  # the latter four as SparseAdamW does
    collapse([t for p, state in huge.state.items() for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])])

    def ours() -> None:
        sparse_adamw_(weights, values, grad, exp_avg, exp_avg_sq, layout, step=step, lr=lr, weight_decay=0.01)

    def check() -> None:
        part = pack(patterns[:2])
        count = len(part.local)
        state = [t[:count].clone() for t in (values, exp_avg, exp_avg_sq)]
        few, expected = [w.clone() for w in weights[:2]], [w.clone() for w in weights[:2]]
        sparse_adamw_(few, state[0], grad[:count], state[1], state[2], part, step=step[:2], lr=lr, weight_decay=0.01)
        again = [t[:count].clone() for t in (values, exp_avg, exp_avg_sq)]
        reference.sparse_adamw_(expected, again[0], grad[:count], again[1], again[2], None, step[:2], None, *part, lr,
                                0.9, 0.999, 1e-8, 0.01, False, None, None)  # fmt: skip
        for got, want in zip([*few, *state], [*expected, *again], strict=True):
            torch.testing.assert_close(got, want)

    bounds = [
        ("of the floor (cache lines at copy bandwidth)",
         lambda s: moved / (2 * source.nbytes / s["copy"]) / s["ours"], 0.8),
    ]  # fmt: skip
    if name == "fp32":
        rival = "dense fused AdamW in huge pages"
        bounds.append((f"x {rival}", faster_than(rival), 1 / 0.07))
    nothing = torch.zeros_like(values)
    collapse([nothing])
    # "ours" comes after the copy, which leaves nothing of it in the caches
    calls = {"ours": ours, "dense fused AdamW": dense.step,
             "the write alone: scatter_delta_": lambda: scatter_delta_(weights, nothing, layout),
             "dense fused AdamW in huge pages": huge.step, "copy": lambda: target.copy_(source)}  # fmt: skip
    count = sum(p.numel() for p in dense.state)
    return Group("sparse_adamw", f"{len(values)} of {count}", name, calls, check, bounds)


def _dense_adamw(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> torch.optim.Optimizer:
    """After its first step: all memory is there."""
    weights = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for parameter in weights:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)
    optimizer.step()
    return optimizer


def _random_pattern(shape: tuple[int, int], density: float, generator: torch.Generator) -> Pattern:
    return Pattern.from_mask(torch.rand(shape, generator=generator) < density)


def topks(sizes: Sizes) -> Iterator[Group]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(sizes.scores, generator=generator)
    k = sizes.scores // 100

    def check() -> None:
        ties = torch.randint(-20, 20, (100_003,), generator=generator).float()
        for few in (1, 1000, 60_000):
            assert torch.equal(select_topk(ties, few), reference.select_topk([ties], [], few, "abs"))
        threshold = scores.abs().kthvalue(sizes.scores - k + 1).values
        assert bool((scores.abs()[select_topk(scores, k)] >= threshold).all()), "select_topk is wrong"

    def memory() -> float:
        """In processes of their own: in this one, freed memory would hide what is taken. The kernel counts what is
        resident to within half a megabyte: the median of three."""
        command = [sys.executable, "-m", "bench.ops", "--topk-memory", str(sizes.scores)]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(3)]
        return 8 * k / statistics.median(float(done.stdout.splitlines()[-1]) for done in runs)

    calls = {
        "ours": lambda: select_topk(scores, k),
        "torch.topk": lambda: torch.topk(scores.abs(), k, sorted=False),
        "read": lambda: scores.sum(),
    }
    bounds = [
        ("x torch.topk", faster_than("torch.topk"), 60.0),
        ("of one read of the scores", lambda s: s["read"] / s["ours"], 1 / 3),
    ]
    apart = [("output / extra memory", memory, 1 / 1.2)]
    yield Group("select_topk", f"{k} of {sizes.scores}", "fp32", calls, check, bounds, apart, repeats=3)


def topk_memory(count: int) -> int:
    """Bytes that selecting 1 % of so many scores takes, its result included."""
    scores = torch.randn(count)
    scores.sum()  # starts the threads
    select_topk(scores[:1000], 10)
    before = forget_peak()
    kept = select_topk(scores, count // 100)
    return max(resident("VmHWM") - before, kept.nbytes)


def switches(sizes: Sizes) -> Iterator[Group]:
    for name, dtype in DTYPES.items():
        yield _switch(sizes, name, dtype)


def _switch(sizes: Sizes, name: str, dtype: torch.dtype) -> Group:
    """A change of 1 % put on and taken off, against merging and unmerging LoRA r=16 (PEFT)."""
    from peft import LoraConfig, inject_adapter_in_model

    generator = torch.Generator().manual_seed(0)
    shapes = sizes.shapes * sizes.layers
    linears = nn.ModuleList(nn.Linear(cols, rows, bias=False, dtype=dtype) for rows, cols in shapes)
    weights = [linear.weight.detach().clone() for linear in linears]
    patterns = [_random_pattern(shape, 0.01, generator) for shape in shapes]
    layout = pack(patterns)
    values = torch.randn(len(layout.local), generator=generator).to(dtype)
    config = LoraConfig(r=16, target_modules=[str(i) for i in range(len(shapes))])
    adapted = inject_adapter_in_model(config, nn.ModuleDict({"layers": linears}))
    adapters = [module for module in adapted.modules() if hasattr(module, "unmerge")]
    assert len(adapters) == len(shapes)

    def ours() -> None:
        scatter_delta_(weights, values, layout, "swap")
        scatter_delta_(weights, values, layout, "swap")

    def lora() -> None:
        for adapter in adapters:
            adapter.merge()
        for adapter in adapters:
            adapter.unmerge()

    def check() -> None:
        before = [w.clone() for w in weights]
        scatter_delta_(weights, values, layout, "swap")
        assert not all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
        scatter_delta_(weights, values, layout, "swap")
        assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True)), "the switch is not exact"

    bounds = [("x LoRA r=16 merge + unmerge", faster_than("LoRA r=16"), 10.0)]
    return Group("delta switch", f"{len(values)} values", name, {"ours": ours, "LoRA r=16": lora}, check, bounds)


OPERATIONS: dict[str, Callable[[Sizes], Iterator[Group]]] = {
    "masked_grad": masked_grads, "sparse_adamw": adamws, "select_topk": topks, "switch": switches,
}  # fmt: skip


# ---- the run --------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(group: Group, repeats: int, least: float = 0.0) -> list[dict[str, Any]]:
    """Check and time a group; one row for each call, and one for each bound."""
    group.check()
    turns = alternating(group.calls, group.repeats or repeats, least)
    about = {"operation": group.operation, "size": group.size, "dtype": group.dtype}
    rows: list[dict[str, Any]] = []
    for name in group.calls:
        taken = statistics.median(turn[name] for turn in turns)
        rows.append({**about, "what": name, "figure": 1e3 * taken, "unit": "ms", "bound": None, "verdict": ""})
    figures = [(what, statistics.median(map(figure, turns)), bound) for what, figure, bound in group.bounds]
    for what, reached, bound in [*figures, *((what, figure(), bound) for what, figure, bound in group.apart)]:
        rows.append({**about, "what": what, "figure": reached, "unit": "ratio", "bound": bound, "verdict": ""})
    return rows


def judge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each figure that has a bound: its median over the rounds, and whether that is ok."""
    by_figure: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["bound"] is not None:
            by_figure.setdefault((row["operation"], row["size"], row["dtype"], row["what"]), []).append(row)
    judged = []
    for of_rounds in by_figure.values():
        figures = [row["figure"] for row in of_rounds]
        median = statistics.median(figures)
        verdict = "ok" if median >= of_rounds[0]["bound"] else "short"
        judged.append({**of_rounds[0], "figure": median, "least": min(figures), "most": max(figures),
                       "verdict": verdict, "round": "median"})  # fmt: skip
    return judged


def stored(row: dict[str, Any]) -> dict[str, Any]:
    """As the results file has it."""
    figure, bound = float(f"{row['figure']:.4g}"), "" if row["bound"] is None else round(row["bound"], 3)
    return {**{name: row[name] for name in COLUMNS}, "figure": figure, "bound": bound}


def show(row: dict[str, Any]) -> str:
    line = f"{row['operation']:12} {row['size']:34} {row['dtype']} {row['what']:44} {row['figure']:8.2f} {row['unit']}"
    if row["bound"] is None:
        return line
    spread = f"{row['least']:.2f} to {row['most']:.2f}; " if row["verdict"] else ""
    return f"{line} ({spread}>= {row['bound']:.4g}) {row['verdict']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=tuple(OPERATIONS), choices=tuple(OPERATIONS))
    parser.add_argument("--append", action="store_true", help="add to the results instead of replacing them")
    parser.add_argument("--repeats", type=int, default=Sizes.repeats, help="timed turns of each call, at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--topk-memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.topk_memory:
        print(topk_memory(options.topk_memory))
        return
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    sizes, about = Sizes(), {"run": time.strftime("%Y-%m-%dT%H:%M:%S"), **describe()}
    former = read_rows(RESULTS) if options.append else []
    rows: list[dict[str, Any]] = []

    def write(more: Sequence[dict[str, Any]]) -> None:
        for row in more:
            print(show(row), flush=True)
        rows.extend(more)
        write_rows(RESULTS, [*former, *({**stored(row), **about} for row in rows)])  # if it is stopped, that stays

    for number in range(1, options.rounds + 1):
        print(f"round {number} of {options.rounds}")
        for name in options.only:
            for group in OPERATIONS[name](sizes):
                write([{**row, "round": number} for row in measure(group, options.repeats, LEAST)])
    judged = judge(rows)
    print("medians over the rounds")
    write(judged)
    sys.exit(1 if any(row["verdict"] == "short" for row in judged) else 0)


if __name__ == "__main__":
    main()
