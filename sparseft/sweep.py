"""Density against tile budget: what a change learns, and what a step costs."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparseft import plot
from sparseft.finetune import write_json
from sparseft.trials import Outcome, Trials

DENSITIES, TILE_BUDGETS = (0.0025, 0.005, 0.01, 0.02, 0.05), (0.05, 0.1, 0.2, 1.0)
REPORT, PLOT = "sweep.json", "sweep.svg"


@dataclass(frozen=True)
class Point:
    """One density with one tile budget."""

    density: float
    tile_budget: float
    outcome: Outcome


def sweep(trials: Trials, steps: int, densities: Sequence[float] = DENSITIES,
          tile_budgets: Sequence[float] = TILE_BUDGETS,
          keep: Callable[[list[Point]], object] = lambda found: None) -> list[Point]:  # fmt: skip
    """A trial of so many steps for every pair.

    Args:
        keep: called with all points so far, after each.

    Raises:
        ValueError: `steps` is not positive, there is no pair, or a share lies outside (0, 1].
    """
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    pairs = list(itertools.product(densities, tile_budgets))
    if not pairs:
        raise ValueError("densities and tile_budgets must hold at least one value each")
    settings = [replace(trials.config.sparse, density=d, tile_budget=t) for d, t in pairs]  # refuses bad ones at once
    found: list[Point] = []
    for (density, tile_budget), sparse in zip(pairs, settings, strict=True):
        trials.display.stage(f"Density {density:g}, tile budget {tile_budget:g}")
        outcome = trials(sparse, steps)
        found.append(Point(density, tile_budget, outcome))
        trials.display.note(f"loss {outcome.loss:.4f}, {outcome.step_seconds:.2f} s per step")
        keep(found)
    return found


def report(found: Sequence[Point], folder: Path, about: Mapping[str, Any]) -> Path:
    """Write what is known `about` the trials and the points (sweep.json), and loss over seconds per step (sweep.svg),
    into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"density": p.density, "tile_budget": p.tile_budget, **p.outcome.figures()} for p in found]
    write_json(folder / REPORT, {**about, "points": rows})
    series: dict[str, list[tuple[float, float]]] = {}
    labels: dict[str, list[str]] = {}
    for p in sorted(found, key=lambda p: p.density):
        name = f"tile budget {p.tile_budget:g}"
        series.setdefault(name, []).append((p.outcome.step_seconds, p.outcome.loss))
        labels.setdefault(name, []).append(f"{p.density:g}")
    plot.save(folder / PLOT, series, title="beside each point: its density", x="seconds per step", y="held-out loss",
              labels=labels)  # fmt: skip
    return folder / REPORT
