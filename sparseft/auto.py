"""Choose criterion, allocation, density and tile budget by trying them: successive halving within a time budget."""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sparseft import plot
from sparseft.finetune import write_json
from sparseft.trainer import SparseConfig
from sparseft.trials import Outcome, Trials

GRID: dict[str, tuple[Any, ...]] = {  # the first values are those that train has without a search
    "criterion": ("sampled", "balanced", "grad", "taylor", "fisher", "gallop", "magnitude", "random"),
    "allocation": ("layer", "row", "kind", "global"),
    "density": (0.01, 0.005, 0.02, 0.05),
    "tile_budget": (0.1, 1.0),
}
COUNT = 16  # settings that are tried
CLEAR = 2.0  # standard errors by which a setting has to be better than the first
PROBE_STEPS = 2  # of the trial that measures the machine's speed
LEAST_STEPS = 4  # of a first trial: fewer say nothing
REPORT, PLOT = "auto.json", "auto.svg"


@dataclass(frozen=True)
class Try:
    """One trial of a setting in one round."""

    sparse: SparseConfig
    round: int
    steps: int
    outcome: Outcome


@dataclass(frozen=True)
class Plan:
    """How many settings start, and how many steps a first trial has; each round halves the one, doubles the other."""

    count: int
    steps: int

    @property
    def rounds(self) -> list[tuple[int, int]]:
        """(settings, steps) round by round, down to two settings."""
        found, count, steps = [], self.count, self.steps
        while count > 1:
            found.append((count, steps))
            count, steps = -(-count // 2), 2 * steps
        return found


def settings(base: SparseConfig, grid: Mapping[str, Sequence[Any]], count: int, seed: int) -> list[SparseConfig]:
    """`base` and other points of the grid, up to `count`, drawn by the seed; all different.

    Those that differ from `base` in one value come before all others: each says what its one change is worth.

    Raises:
        ValueError: a name in the grid is no field of SparseConfig or has no value, a value does not fit, `count` is
            less than 2, or there is but one setting.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    unknown = [name for name in grid if not hasattr(base, name)]
    if unknown:
        raise ValueError(f"grid: {unknown[0]!r} is no field of SparseConfig")
    empty = [name for name, values in grid.items() if not values]
    if empty:
        raise ValueError(f"grid: {empty[0]!r} must have at least one value, got none")
    points = [replace(base, **dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]
    others = [point for i, point in enumerate(points) if point not in (base, *points[:i])]
    random.Random(seed).shuffle(others)
    others.sort(key=lambda point: sum(getattr(point, name) != getattr(base, name) for name in grid) > 1)
    chosen = [base, *others[: count - 1]]
    if len(chosen) < 2:
        raise ValueError("grid: there is but one setting, nothing to choose")
    return chosen


def plan(count: int, seconds: float, probe: Outcome, most_steps: int) -> Plan:
    """The most settings, at most `count`, for which every round fits into the time, and the steps that it leaves them.

    Args:
        probe: of a trial; its times are taken to be those of all.
        most_steps: of the longest trial.

    Raises:
        ValueError: there is no time for two settings of LEAST_STEPS steps.
    """
    for n in range(count, 1, -1):
        rounds = Plan(n, 1).rounds
        fixed = n * probe.select_seconds + sum(size for size, _ in rounds) * probe.measure_seconds
        per_step = sum(size * steps for size, steps in rounds) * probe.step_seconds
        steps = min(math.floor((seconds - fixed) / per_step), most_steps // rounds[-1][1])
        if steps >= LEAST_STEPS:
            return Plan(n, steps)
    needed = 2 * (probe.select_seconds + probe.measure_seconds + LEAST_STEPS * probe.step_seconds)
    raise ValueError(f"minutes: two settings of {LEAST_STEPS} steps need {needed / 60:.1f} more, {seconds / 60:.1f} "
                     f"are left (and a trial may have at most {most_steps} steps)")  # fmt: skip


def halve(
    candidates: Sequence[SparseConfig], made: Plan, trial: Callable[[SparseConfig, int], Outcome], seconds: float,
    most_steps: int, tell: Callable[[list[Try]], None] = lambda tries: None,
) -> list[Try]:  # fmt: skip
    """Successive halving (Jamieson & Talwalkar, 2016): train all briefly, keep the better half, train these twice as
    long from the start, and so on. Equal losses go to the earlier setting; the first one stays to the end.

    The last round has as many steps as the time allows. A round that, by the times of the one before, would take longer
    than what is left gets fewer steps; if these are no more than those of the round before, it does not begin. A loss
    that is not finite is the worst, also the first setting's; after a round of no others comes none.

    Args:
        seconds: of all trials together, by their own clocks.
        most_steps: of the last round.
        tell: called with every trial so far, after each.

    Returns:
        Every trial; `best` of them is chosen.

    Raises:
        ValueError: no loss was finite.
    """
    tries: list[Try] = []
    alive = list(candidates[: made.count])
    for number, (count, steps) in enumerate(made.rounds):
        if number:
            before = [one for one in tries if one.round == number - 1]
            left = seconds - _spent(tries)
            last = number == len(made.rounds) - 1
            steps = min(most_steps if last else steps, _fitting(before, count, left))
            if steps <= before[0].steps:
                break
            finite = {id(one.sparse): one.outcome.loss for one in before if math.isfinite(one.outcome.loss)}
            if not finite:
                break
            alive.sort(key=lambda sparse: finite.get(id(sparse), math.inf))
            if id(candidates[0]) in finite:
                alive.remove(candidates[0])
                alive.insert(0, candidates[0])
            alive = alive[:count]
        for sparse in alive:
            tries.append(Try(sparse, number, steps, trial(sparse, steps)))
            tell(tries)
    if not math.isfinite(best(tries).outcome.loss):
        raise ValueError("learning_rate: no setting's held-out loss stayed finite; give a lower one")
    return tries


def _spent(tries: Sequence[Try]) -> float:
    """Seconds of these trials. Selections count once, and the first setting's, which the probe made, not at all: a
    search that was interrupted selects again, and has to come to the same rounds."""
    selections = sum(one.outcome.select_seconds for one in tries if one.round == 0 and one.sparse != tries[0].sparse)
    return selections + sum(one.steps * one.outcome.step_seconds + one.outcome.measure_seconds for one in tries)


def _fitting(before: Sequence[Try], count: int, seconds: float) -> int:
    """Steps of a round of `count` trials for which the time is enough, by the mean of the round before."""
    step = sum(one.outcome.step_seconds for one in before) / len(before)
    measure = sum(one.outcome.measure_seconds for one in before) / len(before)
    return math.floor((seconds / count - measure) / step)


def best(tries: Sequence[Try]) -> Try:
    """The trial with the lowest loss in the last round that has a finite one; but the first setting's, if the lead over
    it is less than CLEAR standard errors: few held-out rows after a short training are no reason to leave it."""
    lowest = min(tries, key=lambda one: (not math.isfinite(one.outcome.loss), -one.round, one.outcome.loss))
    for one in tries:
        if one.round == lowest.round and one.sparse == tries[0].sparse and math.isfinite(one.outcome.loss):
            lead, error = lowest.outcome.lead(one.outcome)
            return lowest if lead > CLEAR * error else one
    return lowest


def choose(trials: Trials, minutes: float, grid: Mapping[str, Sequence[Any]] | None = None,
           count: int = COUNT, keep: Callable[[list[Try]], object] = lambda tries: None) -> list[Try]:  # fmt: skip
    """Every trial of a search over `grid` (default GRID) that takes about so many minutes; `best` of them is chosen.

    Args:
        minutes: of all trials together, those in the journal and the one that measures the machine's speed included.
        keep: called with every trial so far, after each.

    Raises:
        ValueError: too little time, or a grid that does not fit.
    """
    if not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes}")
    base = trials.config.sparse
    candidates = settings(base, GRID if grid is None else grid, count, trials.config.seed)
    trials.display.stage(f"Choose among {len(candidates)} settings in {minutes:g} minutes")
    probe = trials(base, PROBE_STEPS)
    most = trials.config.steps or math.ceil(trials.epoch * trials.config.epochs)
    seconds = 60 * minutes - probe.seconds(PROBE_STEPS)
    made = plan(len(candidates), seconds, probe, most)
    trials.display.note(", then ".join(f"{n} settings for {steps} steps" for n, steps in made.rounds))
    if made.count < len(candidates):
        trials.display.note(f"no more: with {made.count + 1} a first trial would have fewer than {LEAST_STEPS} steps, "
                            f"as the minutes and the longest trial ({most} steps) allow")  # fmt: skip

    def tell(tries: list[Try]) -> None:
        one = tries[-1]
        trials.display.note(
            f"round {one.round + 1}, {one.steps} steps, {name(one.sparse)}: loss {one.outcome.loss:.4f}"
        )
        keep(tries)

    return halve(candidates, made, trials, seconds, most, tell)


def name(sparse: SparseConfig) -> str:
    """A setting in a few words."""
    return f"{sparse.criterion} {sparse.allocation} {sparse.density:.3g} tiles {sparse.tile_budget:g}"


def report(tries: Sequence[Try], folder: Path, about: Mapping[str, Any]) -> Path:
    """Write what is known `about` the search and every trial (auto.json), and losses over steps (auto.svg), into a
    folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = best(tries)
    rows = [{"round": one.round, "steps": one.steps, "setting": asdict(one.sparse), **one.outcome.figures()}
            for one in tries]  # fmt: skip
    first = next((one for one in tries if one.round == chosen.round and one.sparse == tries[0].sparse), None)
    leads = [{"setting": name(one.sparse), "lead": lead, "error": error} for one in tries
             if first is not None and one.round == chosen.round and one is not first
             for lead, error in [one.outcome.lead(first.outcome)]]  # fmt: skip
    write_json(folder / REPORT, {**about, "chosen": asdict(chosen.sparse), "loss": chosen.outcome.loss,
                                 "leads_over_the_first": leads, "trials": rows})  # fmt: skip
    series: dict[str, list[tuple[float, float]]] = {}
    for one in sorted(tries, key=lambda one: one.sparse != chosen.sparse):  # the chosen one first
        series.setdefault(name(one.sparse), []).append((one.steps, one.outcome.loss))
    plot.save(folder / PLOT, series, title=f"chosen: {name(chosen.sparse)}", x="steps", y="held-out loss", log_x=True)
    return folder / REPORT
