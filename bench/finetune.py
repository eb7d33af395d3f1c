"""One training step of every provider: time of forward, backward and optimizer, and peak memory.

    python -m bench.finetune                                        # everything (about half an hour)
    python -m bench.finetune --providers frozen tiles10 --dtypes bf16 --rounds 1 --append

Each provider has a fresh process in each round; those that no bound compares have one round, with dense fine-tuning.
A process loads the model, resets the kernel's high-water mark, shows that it computes the right thing (`gate`), and
reports its medians. The processes of a round are there together and take turns, a step each, so that what slows the
machine slows all of them. Figures are ratios inside one round, their median over the rounds of this run. The bounds are
SmolLM2's. Writes bench/results/finetune.csv after each round; exits 1 if a bound is short.
"""

import argparse
import contextlib
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.machine import describe
from bench.memory import forget_peak, resident
from bench.providers import PROVIDERS, batch, load, save_selection
from bench.rows import read_rows, write_rows

RESULTS = Path(__file__).parent / "results" / "finetune.csv"
MODELS = ("smollm2", "llama-1b")
DTYPES = ("fp32", "bf16")
REFERENCE = "dense"  # the plot shows shares of it
FLOORS = ("frozen", "leanfloor")  # they train one norm, which a step in bf16 may leave as it is


@dataclass(frozen=True)
class Bound:
    """`provider`'s figure over `against`'s may be at most `most[dtype]`, on BOUNDED_MODEL."""

    figure: str  # a column of the CSV
    provider: str
    against: str
    most: dict[str, float]


def _both(most: float) -> dict[str, float]:
    return {"fp32": most, "bf16": most}


BOUNDED_MODEL = "smollm2"
BOUNDS = [
    Bound("step_ms", "tiles10", "frozen", _both(1.08)),
    Bound("step_ms", "tiles10", "lora8", _both(0.90)),
    Bound("step_ms", "tiles10", "dense", {"fp32": 0.72, "bf16": 0.80}),
    Bound("step_ms", "tiles10", "shira", _both(0.80)),
    Bound("step_ms", "unstructured", "dense", _both(0.82)),
    Bound("peak_mb", "tiles10", "frozen", _both(1.08)),
    Bound("peak_mb", "tiles10", "lora8", _both(0.90)),
    Bound("peak_mb", "tiles10", "shira", _both(0.75)),
    Bound("peak_mb", "tiles10", "dense", {"fp32": 0.45, "bf16": 0.55}),
]


# ---- inside a provider's process ------------------------------------------------------------------------------


def measure(
    name: str, model: nn.Module, data: dict[str, torch.Tensor], patterns: Path, steps: int,
    wait: Callable[[], None] = lambda: None,
) -> dict:  # fmt: skip
    """Medians over `steps` steps (ms, wall and CPU), the peak (MB = 1e6 bytes over the loaded model), and what the
    gate looks at: the first loss and the norm of the gradient at the embedding's output. `wait` is called before each
    of the steps."""
    model(input_ids=data["input_ids"][:1, :8])  # kernels' own buffers, threads
    untouched = _sample(model)
    loaded = forget_peak()
    optimizer = PROVIDERS[name].prepare(model, patterns / name)
    reached: list[float] = []

    def note_gradient(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        output.requires_grad_().register_hook(lambda grad: reached.append(float(grad.norm())))

    hook = model.get_input_embeddings().register_forward_hook(note_gradient)
    losses: list[float] = []
    times: list[tuple[float, float, float, float]] = []
    for step in range(steps + 2):  # the first two warm up
        if step >= 2:
            wait()
        marks, cpu = [time.perf_counter()], time.process_time()
        loss = model(**data).loss
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.perf_counter())
        losses.append(float(loss.detach()))
        del loss
        if step == 0:
            hook.remove()
            if PROVIDERS[name].selection is not None:
                only_selected_changed(model, untouched, patterns / name)
        if step >= 2:
            forward, backward, update = (1e3 * (b - a) for a, b in itertools.pairwise(marks))
            times.append((forward, backward, update, 1e3 * (time.process_time() - cpu)))
    peak = resident("VmHWM") - loaded
    forward, backward, update, cpu_ms = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "forward_ms": forward, "backward_ms": backward, "optimizer_ms": update,
        "step_ms": statistics.median(sum(t[:3]) for t in times), "cpu_ms": cpu_ms,
        "peak_mb": peak / 1e6, "model_mb": sum(p.nbytes for p in set(model.parameters())) / 1e6,
        "trained": sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
        "first_loss": losses[0], "last_loss": losses[-1], "reached": reached[0],
    }  # fmt: skip


def _sample(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of one layer's projections."""
    names = [name for name, p in model.named_parameters() if ".layers.1." in name and p.dim() == 2]
    return {name: model.get_parameter(name).detach().clone() for name in names}


def only_selected_changed(model: nn.Module, before: dict[str, torch.Tensor], patterns: Path) -> None:
    """The gate of sparse training: a step changes most selected entries, and no other."""
    from sparseft import Pattern

    assert any((patterns / f"{name}.safetensors").exists() for name in before), "nothing is selected in this layer"
    for name, old in before.items():
        file = patterns / f"{name}.safetensors"
        mask = Pattern.load(file).to_mask() if file.exists() else torch.zeros_like(old, dtype=torch.bool)
        changed = model.get_parameter(name) != old
        assert not (changed & ~mask).any(), f"{name}: an entry changed that is not selected"
        assert changed[mask].float().mean() > 0.5 or not mask.any(), f"{name}: most selected entries did not change"


# ---- the processes' parent ------------------------------------------------------------------------------------


WAITING = "waiting\n"


class Process:
    """A process of this module, for one provider: `work` is its name, or "select" and its name."""

    def __init__(self, work: str, model: str, dtype: str, options: argparse.Namespace, patterns: Path):
        sizes = ["--rows", str(options.rows), "--tokens", str(options.tokens), "--steps", str(options.steps),
                 "--attention", options.attention]  # fmt: skip
        command = [sys.executable, "-m", "bench.finetune", "--child", work, "--models", model, "--dtypes", dtype,
                   "--patterns", str(patterns), *sizes]  # fmt: skip
        self.about = f"{work} ({model}, {dtype})"
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open until `end`)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                        text=True, bufsize=1)  # fmt: skip

    def listen(self) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            sys.exit(f"{self.about} failed with exit status {status}:\n{self.errors.read()[-3000:]}")
        return line

    def take_turn(self) -> str:
        """Let it make a step; its line afterwards."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone: `listen` says why
            self.process.stdin.write("\n")
        return self.listen()

    def end(self) -> None:
        """After its last line: wait until its memory is free."""
        self.process.communicate()
        self.errors.close()


def wait_for_turn() -> None:
    """In a provider's process: say that it waits, and wait. Without a parent there are no more turns."""
    print(WAITING, end="", flush=True)
    if not sys.stdin.readline():
        sys.exit("the benchmark has ended")


def together(
    names: Sequence[str], model: str, dtype: str, options: argparse.Namespace, patterns: Path
) -> dict[str, dict[str, Any]]:
    """What providers report that take turns."""
    processes: dict[str, Process] = {}
    for name in names:
        processes[name] = Process(name, model, dtype, options, patterns)
        said = processes[name].listen()  # one after the other: loading and the first steps want the whole machine
        assert said == WAITING, f"{name} says {said!r} before its first turn"
    last: dict[str, str] = {}
    for _ in range(options.steps):
        for name, process in processes.items():
            last[name] = process.take_turn()
    for process in processes.values():
        process.end()
    return {name: json.loads(line) for name, line in last.items()}


def run_child(options: argparse.Namespace) -> None:
    (model,), (dtype,), where = options.models, options.dtypes, Path(options.patterns)
    provider = PROVIDERS[options.child.removeprefix("select ")]
    if options.child.startswith("select "):
        loaded = load(model, dtype)
        assert provider.selection is not None
        save_selection(loaded, batch(loaded, options.rows, options.tokens), provider.selection, where / provider.name)
        print("{}")
    else:
        loaded = load(model, dtype)
        if provider.selection is None and provider.name != "leanfloor":
            loaded.set_attn_implementation(options.attention)
        data = batch(loaded, options.rows, options.tokens)
        print(json.dumps(measure(provider.name, loaded, data, where, options.steps, wait_for_turn)), flush=True)
        sys.stdin.readline()  # nobody's last step is measured while another process gives its memory back


def gate(results: dict[str, dict[str, Any]], dtype: str) -> None:
    """All start at the same loss, all lead the gradient down to the embedding, all but the floors learn; else there is
    no figure."""
    first = next(iter(results.values()))
    tolerance = {"fp32": 1e-3, "bf16": 3e-2}[dtype]
    for name, result in results.items():
        for what in ("first_loss", "reached"):
            if not math.isclose(result[what], first[what], rel_tol=tolerance):
                sys.exit(f"{name}: {what} is {result[what]}, the others' {first[what]}: no figures")
        if name not in FLOORS and not result["last_loss"] < result["first_loss"]:
            sys.exit(f"{name} does not learn: loss {result['first_loss']} -> {result['last_loss']}: no figures")


def rounds_of(providers: Sequence[str], count: int, model: str) -> list[list[str]]:
    """Who takes part in each round: `count` rounds (one, where there are no bounds) of what a bound compares, each
    beginning with another, and one of the rest with the reference."""
    compared = {name for bound in BOUNDS for name in (bound.provider, bound.against)}
    first = [name for name in providers if name in compared]
    rest = [name for name in providers if name not in compared]
    if rest and REFERENCE in providers:
        rest.insert(0, REFERENCE)
    turns = [[*first[i % len(first) :], *first[: i % len(first)]] for i in range(count)] if first else []
    return [*(turns if model == BOUNDED_MODEL else turns[:1]), *([rest] if rest else [])]


FIGURES = ("forward_ms", "backward_ms", "optimizer_ms", "step_ms", "cpu_ms", "peak_mb", "model_mb", "trained")


def run(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of each round, one for each process."""
    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    machine = describe()
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models:
            for dtype in options.dtypes:
                patterns = Path(options.patterns or scratch) / f"{model}-{dtype}"
                for name in options.providers:
                    if PROVIDERS[name].selection is not None and not (patterns / name).exists():
                        selecting = Process(f"select {name}", model, dtype, options, patterns)
                        selecting.listen()
                        selecting.end()
                for number, names in enumerate(rounds_of(options.providers, options.rounds, model)):
                    results = together(names, model, dtype, options, patterns)
                    gate(results, dtype)
                    rows = []
                    for name, result in results.items():
                        step, peak = result["step_ms"], result["peak_mb"]
                        print(f"{model} {dtype} round {number} {name:12} {step:7.0f} ms {peak:7.0f} MB", flush=True)
                        figures = {figure: round(result[figure], 2) for figure in FIGURES}
                        where = {"run": started, "round": number, "model": model, "dtype": dtype, "rows": options.rows,
                                 "tokens": options.tokens, "provider": name}  # fmt: skip
                        rows.append({**where, **figures, **machine})
                    yield rows


def ratio(rows: Sequence[dict[str, Any]], bound: Bound, dtype: str, time_figure: str = "step_ms") -> float | None:
    """The median over rounds of one figure over another's, None if no round has both; `time_figure` is read for
    bounds on the step's time."""
    figure = time_figure if bound.figure == "step_ms" else bound.figure
    chosen = [row for row in rows if row["model"] == BOUNDED_MODEL and row["dtype"] == dtype]
    by_round: dict[tuple, dict[str, float]] = {}
    for row in chosen:
        by_round.setdefault((row["run"], row["round"]), {})[row["provider"]] = float(row[figure])
    found = [
        r[bound.provider] / r[bound.against] for r in by_round.values() if {bound.provider, bound.against} <= set(r)
    ]
    return statistics.median(found) if found else None


def report(rows: Sequence[dict[str, Any]], time_figure: str) -> bool:
    """Print every bound with its figure; whether all hold that were measured."""
    short = False
    for bound in BOUNDS:
        for dtype, most in bound.most.items():
            figure = ratio(rows, bound, dtype, time_figure)
            measured = {"step_ms": time_figure}.get(bound.figure, bound.figure).partition("_")[0]
            what = f"{measured} {bound.provider} / {bound.against}, {dtype}"
            if figure is None:
                print(f"  {what:36} not measured")
                continue
            short |= figure > most
            print(f"  {what:36} {figure:6.3f} (<= {most}) {'ok' if figure <= most else 'short'}")
    return not short


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--providers", nargs="+", default=tuple(PROVIDERS), choices=tuple(PROVIDERS))
    parser.add_argument("--rounds", type=int, default=3, help="of the providers that a bound compares")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--patterns", help="folder in which selections are kept for the next run")
    parser.add_argument("--append", action="store_true", help="add to the results instead of replacing them")
    parser.add_argument("--cpu", action="store_true",
                        help="hold processor time against the bounds, on a machine that others use, too")  # fmt: skip
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"),
                        help="the rivals' and the floor's (eager is faster for them in bf16 with few tokens, and takes "
                             "more memory); results are written with sdpa only")  # fmt: skip
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options)
        return
    former = read_rows(RESULTS) if options.append else []
    measured: list[dict[str, Any]] = []
    for of_round in run(options):
        measured += of_round
        if options.attention == "sdpa":
            write_rows(RESULTS, [*former, *measured])
    sys.exit(0 if report(measured, "cpu_ms" if options.cpu else "step_ms") else 1)


if __name__ == "__main__":
    main()
