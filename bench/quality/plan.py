"""Which run comes next: tuning before testing, one seed of everything before the next, short runs before long ones."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bench.quality.hypotheses import (
    CLAIMS,
    DENSITIES,
    FINALISTS,
    HYPOTHESES,
    SHIPPED,
    SMALL,
    SPARSE,
    UNTRAINED,
    Variant,
)
from bench.quality.store import Row

ROLES = ("tune", "screen", "test", "time")
FACTOR = 10**0.5  # between neighbouring rates


@dataclass(frozen=True)
class Scale:
    """How large a study is.

    Attributes:
        steps, batch: of a run. `tune_steps`: of a run that only compares rates.
        rates: how many rates every variant starts with. `extensions`: how many more it may try where the best one
            so far lies at the edge.
        validation_rows, test_rows, other_rows, hellaswag_rows: questions asked at most; 0: all.
        text_rows: of HellaSwag's stories, read as plain text after every run.
        tasks: the first one is also that of the finalists, and the hypotheses' screens begin with it.
        claims: names of the variants. `tuned`: names of variants that are tuned and tested at their best rate with the
            first task. `finalists`: those that are tested at the default rate with it.
        screen: how many seeds of each hypothesis's variants are compared with their base at the base's rate, over
            `tune_steps` on the validation part; 0: none. `hypotheses`: whether they are also tuned and tested.
        time_of: variant whose CPU time the others get in the second comparison, at equal time; "" for none.
    """

    name: str
    steps: int
    batch: int
    tune_steps: int
    rates: int
    extensions: int
    validation_rows: int
    test_rows: int
    other_rows: int
    hellaswag_rows: int
    text_rows: int
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    claims: tuple[str, ...]
    tuned: tuple[str, ...]
    finalists: tuple[str, ...]
    screen: int
    hypotheses: bool
    time_of: str


FULL = Scale("full", steps=120, batch=16, tune_steps=60, rates=3, extensions=1, validation_rows=0, test_rows=1000,
             other_rows=400, hellaswag_rows=400, text_rows=64, seeds=(0, 1, 2), tasks=("banking77", "arc_easy"),
             claims=tuple(v.name for v in CLAIMS),
             tuned=DENSITIES, finalists=FINALISTS, screen=2, hypotheses=False, time_of="lora-r4")  # fmt: skip
SMALL_SCALE = Scale("small", steps=16, batch=8, tune_steps=8, rates=2, extensions=0, validation_rows=32, test_rows=80,
                    other_rows=24, hellaswag_rows=24, text_rows=8, seeds=(0,), tasks=("banking77", "arc_easy"),
                    claims=SMALL, tuned=(), finalists=(), screen=0, hypotheses=False, time_of="")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training with its evaluation.

    Attributes:
        role: "tune" (judged on the validation part, to choose the rate), "screen" (as short, to compare variants at one
            rate), "test" (equal steps), "time" (equal time: `steps` follow from what was measured).
    """

    scale: Scale
    variant: Variant
    task: str
    role: str
    rate: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        """Names the run by everything that decides its outcome, but for the steps where these are measured."""
        steps = "measured" if self.role == "time" else self.steps
        decides = [self.scale.name, self.scale.batch, self.variant.method, self.variant.options, self.task, self.role,
                   text(self.rate), self.seed, steps]  # fmt: skip
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.task}:{self.variant.name}:{self.role}:{text(self.rate)}:{self.seed}:{digest}"


def text(rate: float) -> str:
    """Rates are compared as this text: three digits."""
    return f"{rate:.3g}"


def todo(rows: Sequence[Row], scale: Scale) -> Iterator[Run]:
    """The runs that can be started now, the next one first; after it, ask again."""
    done = {row["key"] for row in rows}
    for run in _ordered(rows, scale):
        if run.key not in done:
            yield run


def _ordered(rows: Sequence[Row], scale: Scale) -> Iterator[Run]:
    """All runs whose rate is known by now, in the order of the study."""
    for task in scale.tasks:
        yield Run(scale, UNTRAINED, task, "test", 0.0, 0, 0)
    claims = [v for v in CLAIMS if v.name in scale.claims]
    varied = [v for h in HYPOTHESES for v in h.variants]
    extra = [replace(v, rates=SHIPPED.rates) for v in varied if v.name in scale.finalists]
    extra += [v for v in varied if scale.hypotheses or v.name in scale.tuned]  # at their tuned rates
    first = scale.tasks[:1]
    for task in first:
        for variant in claims:
            yield from _tuned(rows, scale, variant, task, ())
        yield from _screened(rows, scale, task)
        for variant in (v for v in varied if v.name in scale.tuned):
            yield from _tuned(rows, scale, variant, task, ())
    for stage, tasks in ((claims, first), (extra, first), (claims, scale.tasks[1:])):
        for task in tasks:
            for variant in stage:
                yield from _tuned(rows, scale, variant, task, scale.seeds[:1])
    for task in scale.tasks[1:]:
        yield from _screened(rows, scale, task)
    for seed in scale.seeds[1:]:
        for stage, tasks in ((claims, scale.tasks), (extra, first)):
            for task in tasks:
                for variant in stage:
                    yield from _tuned(rows, scale, variant, task, (seed,))
    for task in scale.tasks if scale.time_of else ():
        for seed in scale.seeds:
            for variant in claims:
                yield from _timed(rows, scale, variant, task, seed)


def _screened(rows, scale: Scale, task: str) -> Iterator[Run]:
    """Every variant of every hypothesis beside its base at the base's rate, seed by seed.

    SPARSE as a base has the default rate, not its tuned one. For the first seed the base's tuning at that rate is the
    same run.
    """
    claims = {v.name: v for v in CLAIMS} | {SPARSE.name: replace(SPARSE, rates=SHIPPED.rates)}
    for seed in scale.seeds[: scale.screen]:
        for h in HYPOTHESES:
            base = claims[h.base]
            rate, _ = choose_rate(rows, scale, base, task)
            if rate is not None:
                for variant in h.variants if seed == scale.seeds[0] else (base, *h.variants):
                    yield Run(scale, variant, task, "screen", rate, seed, scale.tune_steps)


def _tuned(rows, scale: Scale, variant: Variant, task: str, seeds: Sequence[int]) -> Iterator[Run]:
    """The next tuning run if there is one, otherwise the test runs at the chosen rate."""
    rate, missing = choose_rate(rows, scale, variant, task)
    if missing is not None:
        yield tuning(scale, variant, task, missing)
    elif rate is not None:
        for seed in seeds:
            yield Run(scale, variant, task, "test", rate, seed, scale.steps)


def tuning(scale: Scale, variant: Variant, task: str, rate: float) -> Run:
    """The run that tries a rate, always with the first seed."""
    return Run(scale, variant, task, "tune", rate, scale.seeds[0], scale.tune_steps)


def choose_rate(rows: Sequence[Row], scale: Scale, variant: Variant, task: str) -> tuple[float | None, float | None]:
    """(best rate, None) when the variant is tuned, (None, rate to try next) before; (None, None): every rate failed.

    The best has the lowest loss on the validation part (the accuracy of so few questions is too coarse). While it is
    the highest or lowest rate tried, the next one beyond is tried, `scale.extensions` times at most. A variant with a
    single rate is not tuned.
    """
    if len(variant.rates) == 1:
        return variant.rates[0], None
    by_key = {row["key"]: row for row in rows}
    tried = sorted(variant.rates[: scale.rates])
    for extension in range(scale.extensions + 1):
        found = {rate: by_key.get(tuning(scale, variant, task, rate).key) for rate in tried}
        missing = [rate for rate, row in found.items() if row is None]
        if missing:
            return None, missing[0]
        worked = {rate: row for rate, row in found.items() if row is not None and row["status"] == "ok"}
        best = min(worked, key=lambda rate: worked[rate]["validation_loss"], default=None)
        if extension < scale.extensions:
            if best is None or best == tried[0]:
                tried = [tried[0] / FACTOR, *tried]
            elif best == tried[-1]:
                tried = [*tried, tried[-1] * FACTOR]
    return best, None


def _timed(rows, scale: Scale, variant: Variant, task: str, seed: int) -> Iterator[Run]:
    """A run with as many steps as fit into the reference's CPU seconds, preparation included, once both were timed."""

    def tested(name: str) -> Row | None:
        return next((r for r in rows if r["variant"] == name and r["task"] == task and r["role"] == "test"
                     and r["seed"] == seed and r["status"] == "ok"), None)  # fmt: skip

    mine, reference = tested(variant.name), tested(scale.time_of)
    if mine is None or reference is None or variant.name == scale.time_of:
        return
    budget = reference["prepare_cpu_s"] + reference["train_cpu_s"] - mine["prepare_cpu_s"]
    steps = int(budget / (mine["train_cpu_s"] / mine["steps"]))
    if steps > 0:
        yield Run(scale, variant, task, "time", mine["rate"], seed, steps)
