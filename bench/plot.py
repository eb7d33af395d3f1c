"""Draws bench/results/finetune.csv: step time and peak memory of each provider, as shares of dense fine-tuning.

python -m bench.plot                # writes bench/results/finetune.svg
"""

import statistics
import sys

from bench.finetune import RESULTS
from bench.rows import read_rows

SHOWN = {
    "frozen": "floor: no weight gradients", "columns": "sparseft, columns", "tiles5": "sparseft, tiles 5 %",
    "tiles10": "sparseft, tiles 10 %", "linear10": "..., linear layers only",
    "alone10": "..., torch's attention and loss", "leanfloor": "the floor, lean",
    "tiles20": "sparseft, tiles 20 %", "unstructured": "sparseft, unstructured",
    "lora8": "LoRA r=8", "lora16": "LoRA r=16", "shira": "SHiRA", "supertuning": "Super-Tuning", "dense": "dense AdamW",
}  # fmt: skip


def shares(rows: list[dict[str, str]], figure: str, dtype: str) -> dict[str, float]:
    """Provider -> its median figure over dense's; those that were not measured together with it are left out."""
    rounds: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["model"] == "smollm2" and row["dtype"] == dtype:
            rounds.setdefault((row["run"], row["round"]), {})[row["provider"]] = float(row[figure])
    found: dict[str, list[float]] = {}
    for figures in rounds.values():
        for name, value in figures.items():
            if "dense" in figures:
                found.setdefault(name, []).append(value / figures["dense"])
    return {name: statistics.median(found[name]) for name in SHOWN if name in found}


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not RESULTS.exists():
        sys.exit(f"{RESULTS} is not there: run python -m bench.finetune first")
    rows = read_rows(RESULTS)
    rows = [row for row in rows if row["cpu"] == rows[-1]["cpu"]]  # the last row's machine: shares differ between them
    measured = {row["provider"] for row in rows}
    labels = [SHOWN[name] for name in SHOWN if name in measured]
    place = {name: len(labels) - i for i, name in enumerate(name for name in SHOWN if name in measured)}
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, column, title in zip(axes, ("step_ms", "peak_mb"), ("step time", "peak memory over the model"),
                                   strict=True):  # fmt: skip
        for number, dtype in enumerate(("bf16", "fp32")):
            share = shares(rows, column, dtype)
            bars = axis.barh(
                [place[name] - 0.4 * number for name in share], list(share.values()), height=0.38, label=dtype
            )
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.set(title=f"{title}, share of dense", xlim=(0, 1.2))
        axis.set_yticks([at - 0.2 for at in place.values()], labels)
    axes[0].legend()
    head = rows[-1]
    figure.supxlabel(f"SmolLM2-135M, {head['rows']} x {head['tokens']} tokens; {head['cpu']}, {head['cores']} cores, "
                     f"torch {head['torch']}, {head['commit']}", fontsize=7)  # fmt: skip
    figure.savefig(RESULTS.with_suffix(".svg"))
    print(f"written {RESULTS.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
