"""Train one group of weights at a time, and rank the groups by what they gain per changed weight."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparseft import plot
from sparseft.finetune import write_json
from sparseft.selection.budget import kind
from sparseft.trials import Outcome, Trials

REPORT, PLOT = "ablate.json", "ablate.svg"
THIRDS = ("early", "middle", "late")


@dataclass(frozen=True)
class Ablation:
    """One group trained alone; `outcome.gain` per million changed weights is `per_million`."""

    group: str
    weights: int
    outcome: Outcome

    @property
    def per_million(self) -> float:
        return 1e6 * self.outcome.gain / self.outcome.changed if self.outcome.changed else 0.0


def groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Weights by what they are ("q" for all q_proj and so on), then by their layer's third (early, middle, late).

    Where a name stands in several places of a layer, they are apart: GPT-2's "attn.c_proj" and "mlp.c_proj". Weights
    without a layer number are in no third; thirds that are empty, and groups that hold everything, are left out.
    """
    names = list(names)
    found: dict[str, list[str]] = {}
    layers = {name: int(match[1]) for name in names if (match := re.search(r"\.(\d+)\.", name))}
    places = {name: kind(name).removesuffix(".weight") for name in names}
    homes: dict[str, set[str]] = {}
    for place in places.values():
        homes.setdefault(_last(place), set()).add(place)
    for name, place in places.items():
        alone = len(homes[_last(place)]) == 1
        found.setdefault(_last(place).removesuffix("_proj") if alone else place, []).append(name)
    depth = 1 + max(layers.values(), default=0)
    for name, number in layers.items():
        found.setdefault(THIRDS[3 * number // depth], []).append(name)
    order = [kind for kind in found if kind not in THIRDS] + [third for third in THIRDS if third in found]
    return {group: found[group] for group in order if len(found[group]) < len(names)}


def _last(place: str) -> str:
    return place.rpartition(".")[2]


def ablate(trials: Trials, steps: int, keep: Callable[[list[Ablation]], object] = lambda found: None) -> list[Ablation]:
    """Every group trained alone for so many steps at the configured density of its own weights, best first.

    Args:
        keep: called with the ranking so far, after each group.

    Raises:
        ValueError: `steps` is not positive, or the model has no two groups.
    """
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    weights = trials.weights
    parts = groups(weights)
    if len(parts) < 2:
        raise ValueError(f"the model has no groups to compare among {list(weights)[:3]} and so on")
    found: list[Ablation] = []
    for group, names in parts.items():
        trials.display.stage(f"Train {group} alone ({len(names)} weights)")
        alone = replace(trials.config.sparse, include=names, exclude=None, train_norms=False, train_targets=False)
        outcome = trials(alone, steps)
        found.append(Ablation(group, sum(weights[name].numel() for name in names), outcome))
        trials.display.note(f"loss {outcome.loss:.4f}, gain {outcome.gain:.4f} by {outcome.changed:,} changed weights")
        found.sort(key=lambda one: (math.isnan(one.per_million), -one.per_million))
        keep(found)
    return found


def report(found: Sequence[Ablation], folder: Path, about: Mapping[str, Any]) -> Path:
    """Write what is known `about` the trials and the ranking (ablate.json), and gain over changed weights (ablate.svg),
    into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"group": one.group, "weights": one.weights, "gain_per_million": one.per_million, **one.outcome.figures()}
            for one in found]  # fmt: skip
    write_json(folder / REPORT, {**about, "groups": rows})
    plot.save(folder / PLOT, {one.group: [(one.outcome.changed, one.outcome.gain)] for one in found}, lines=False,
              title="one group of weights trained alone", x="changed weights", y="gain in held-out loss")  # fmt: skip
    return folder / REPORT
