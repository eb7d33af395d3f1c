"""Tables and plots of the finished runs."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.quality.hypotheses import HYPOTHESES
from bench.quality.store import Row

# two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
NORMAL = 1.959964


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson, 1927): what other test questions would have given."""
    share, z = hits / n, NORMAL
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def mean_and_half(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % confidence interval over seeds (Student's t); None for a single one."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, None
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, (STUDENT[n - 2] if n - 2 < len(STUDENT) else NORMAL) * deviation / math.sqrt(n)


def unpack_hits(hits: str, n: int) -> list[bool]:
    """The inverse of `execute.pack_hits`."""
    return [digit == "1" for digit in f"{int(hits[1:], 16):0{n}b}"]


def paired(rows: Sequence[Row], base: Sequence[Row]) -> tuple[float, float, int] | None:
    """Difference of the accuracies at the seeds that both have, half its 95 % confidence interval, number of seeds.

    The interval is over the test questions: per question the difference of its hits, averaged over the seeds.
    """
    by_seed = {row["seed"]: row for row in base}
    pairs = [(row, by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
    if not pairs:
        return None
    n = int(pairs[0][0]["rows"])
    total = [0.0] * n
    for mine, other in pairs:
        for i, (a, b) in enumerate(zip(unpack_hits(mine["hits"], n), unpack_hits(other["hits"], n), strict=True)):
            total[i] += (a - b) / len(pairs)
    mean = sum(total) / n
    variance = sum((d - mean) ** 2 for d in total) / max(1, n - 1)
    return mean, NORMAL * math.sqrt(variance / n), len(pairs)


def summary(rows: Sequence[Row]) -> str:
    """Markdown: per study, task and role one row per variant, then the hypotheses' paired differences."""
    parts = []
    worked = [row for row in rows if row["status"] == "ok"]
    tested = [row for row in worked if row["role"] in ("test", "time")]
    for study, task, role in _distinct((r["study"], r["task"], r["role"]) for r in tested):
        mine = [r for r in tested if (r["study"], r["task"], r["role"]) == (study, task, role)]
        equal = "time" if role == "time" else "steps"
        parts += [f"### {task}, equal {equal} ({study})", "", _variants(mine), ""]
    for role, where in (("screen", "short runs at one rate, validation part"), ("test", "test part")):
        if found := _differences([r for r in worked if r["role"] == role], [r for r in worked if r["role"] == "tune"]):
            parts += [f"### Hypotheses, difference to the paired variant ({where})", "", found, ""]
    if tuned := _rates([r for r in worked if r["role"] == "tune"]):
        parts += ["### Rates, accuracy on the validation part after the short runs", "", tuned, ""]
    failed = [row for row in rows if row["status"] != "ok"]
    parts += [f"{len(rows)} runs, {len(failed)} of them failed."]
    return "\n".join(parts)


def _variants(rows: Sequence[Row]) -> str:
    lines = ["| variant | values | rate | seeds | accuracy | other task | HellaSwag | text loss | CPU s / step | "
             "prepare CPU s |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, rate in _distinct((r["variant"], r["rate"]) for r in rows):
        mine = [r for r in rows if (r["variant"], r["rate"]) == (name, rate)]
        steps = sum(r["steps"] for r in mine)
        per_step = f"{sum(r['train_cpu_s'] for r in mine) / steps:.2f}" if steps else "-"
        lines.append(
            f"| {name} | {mine[0].get('trained_values', 0):,.0f} | {rate:.3g} | {len(mine)} | "
            + " | ".join(_percent([r[c] for r in mine]) for c in ("accuracy", "other_accuracy", "hellaswag_accuracy"))
            + f" | {_mean(mine, 'text_loss')} | {per_step} | "
            + f"{mean_and_half([r['prepare_cpu_s'] for r in mine])[0]:.1f} |"
        )
    return "\n".join(lines)


def _differences(rows: Sequence[Row], tuned: Sequence[Row]) -> str:
    """`tuned`: what stands in for a base's short run where there is none: its tuning at the same rate."""
    lines = []
    for h in HYPOTHESES:
        for variant in h.variants:
            for study, task, rate in _distinct(
                (r["study"], r["task"], r["rate"]) for r in rows if r["variant"] == variant.name
            ):
                here = [r for r in rows if (r["study"], r["task"]) == (study, task)]
                mine = [r for r in here if (r["variant"], r["rate"]) == (variant.name, rate)]
                base = [r for r in here if r["variant"] == h.base]
                if mine[0]["role"] == "screen":
                    base = base + [r for r in tuned if (r["variant"], r["study"], r["task"], r["rate"]) ==
                                   (h.base, study, task, mine[0]["rate"])]  # fmt: skip
                mine, base = _at_seeds_of(base, mine), _at_seeds_of(mine, base)
                found = paired(mine, base)
                if found is not None:
                    mean, half, seeds = found
                    loss = _mean_loss(mine) - _mean_loss(base)
                    text = f"{_mean(mine, 'text_loss')} ({_mean(base, 'text_loss')})"
                    lines.append(f"| {h.name} | {variant.name} | {h.base} | {task} | {seeds} | "
                                 f"{100 * mean:+.1f} ± {100 * half:.1f} | {loss:+.3f} | {text} |")  # fmt: skip
    head = ["| hypothesis | variant | against | task | seeds | accuracy, points | loss of the right label | "
            "text loss (the other's) |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    return "\n".join(head + lines) if lines else ""


def _at_seeds_of(others: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The rows whose seeds `others` have too."""
    seeds = {row["seed"] for row in others}
    return [row for row in rows if row["seed"] in seeds]


def _mean_loss(rows: Sequence[Row]) -> float:
    losses = [row["loss"] if "loss" in row else row["validation_loss"] for row in rows]
    return sum(losses) / len(losses)


def _rates(rows: Sequence[Row]) -> str:
    lines = []
    for task, name in _distinct((r["task"], r["variant"]) for r in rows):
        mine = sorted((r for r in rows if (r["task"], r["variant"]) == (task, name)), key=lambda r: r["rate"])
        tried = ", ".join(f"{r['rate']:.2g}: {100 * r['validation_accuracy']:.1f} % ({r['validation_loss']:.3f})"
                          for r in mine)  # fmt: skip
        lines.append(f"| {task} | {name} | {tried} |")
    return (
        "\n".join(["| task | variant | rate: accuracy (loss of the right label) |", "|---|---|---|", *lines])
        if lines
        else ""
    )


def _mean(rows: Sequence[Row], column: str) -> str:
    """Over the rows that have it; older ones have no text loss."""
    values = [row[column] for row in rows if column in row]
    return f"{mean_and_half(values)[0]:.2f}" if values else "-"


def _percent(values: Sequence[float]) -> str:
    mean, half = mean_and_half(values)
    return f"{100 * mean:.1f} %" + ("" if half is None else f" ± {100 * half:.1f}")


def _distinct(keys: Iterable[tuple]) -> list[tuple]:
    return list(dict.fromkeys(keys))


def plot(rows: Sequence[Row], results: Path) -> list[Path]:
    """Accuracy over trained values, and ability kept over accuracy: a file per task beside the CSV `results`, with its
    name in front; needs matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = []
    tested = [r for r in rows if r["role"] == "test" and r["status"] == "ok" and r["steps"]]
    for study, task in _distinct((r["study"], r["task"]) for r in tested):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        here = [r for r in tested if (r["study"], r["task"]) == (study, task)]
        for (name,) in _distinct((r["variant"],) for r in here):
            mine = [r for r in here if r["variant"] == name]
            mean, half = mean_and_half([100 * r["accuracy"] for r in mine])
            general, _ = mean_and_half([100 * r["hellaswag_accuracy"] for r in mine])
            left.errorbar([mine[0]["trained_values"]], [mean], yerr=[half or 0.0], fmt="o", label=name)
            right.plot([mean], [general], "o", label=name)
        left.set(xscale="log", xlabel="trained values", ylabel=f"{task}, test accuracy (%)")
        right.set(xlabel=f"{task}, test accuracy (%)", ylabel="HellaSwag, zero-shot (%)")
        right.legend(fontsize=6)
        files.append(results.with_name(f"{results.stem}-{study}-{task}.png"))
        figure.savefig(files[-1], dpi=120)
        pyplot.close(figure)
    return files
