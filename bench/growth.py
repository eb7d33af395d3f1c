"""How step time and peak memory grow with density, tokens, layers and width, on random Llama-like models.

    python -m bench.growth              # some minutes; --cpu: the step's time is that of the processor, not the clock

One size is varied at a time from a common middle; every point has a fresh process. Writes bench/results/growth.csv
(with the exponents e of figure ~ size^e, fitted by least squares in logarithms) and growth.svg.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.finetune import measure
from bench.machine import describe
from bench.providers import PROVIDERS, batch, save_selection
from bench.rows import write_rows

RESULTS = Path(__file__).parent / "results" / "growth.csv"
SHOWN = ("tiles10", "frozen", "dense")
FIGURES = ("step_ms", "peak_mb")


@dataclass(frozen=True)
class Size:
    """A model and its batch, in fp32."""

    density: float = 0.01
    tokens: int = 512  # of one sequence
    layers: int = 4
    width: int = 512  # of the residual stream; heads of 64, the MLP 3 times as wide


VARIED: dict[str, tuple[float, ...]] = {
    "density": (0.001, 0.003, 0.01, 0.02, 0.05),
    "tokens": (128, 256, 512, 1024, 2048, 4096),
    "layers": (2, 4, 8, 16),
    "width": (256, 512, 1024, 1536),
}


def measure_point(provider: str, size: Size, steps: int) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = size.width // 64
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=4096, hidden_size=size.width, intermediate_size=3 * size.width, use_cache=False,
                    num_attention_heads=heads, num_key_value_heads=heads, num_hidden_layers=size.layers,
                    tie_word_embeddings=True)
    ).train()  # fmt: skip
    data = batch(model, 1, size.tokens)
    with tempfile.TemporaryDirectory() as folder:
        chosen = PROVIDERS[provider].selection
        if chosen is not None:
            save_selection(model, data, chosen, Path(folder, provider), size.density)
        return measure(provider, model, data, Path(folder), steps)


def exponent(sizes: Sequence[float], figures: Sequence[float]) -> float:
    """The e of figure ~ size^e."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (sizes, figures))
    x = x - x.mean()
    return float(x @ y / (x @ x))


def run(steps: int, time_figure: str) -> list[dict[str, Any]]:
    about = {"run": time.strftime("%Y-%m-%dT%H:%M:%S"), "time": time_figure, **describe()}
    rows = []
    processes = multiprocessing.get_context("fork")  # nothing is computed in this one: the children get fresh threads
    for varied, values in VARIED.items():
        for provider in SHOWN:
            measured = []
            for value in values if varied != "density" or provider == "tiles10" else ():
                changed: dict[str, Any] = {varied: value}
                size = replace(Size(), **changed)
                with processes.Pool(1) as pool:
                    result = pool.apply(measure_point, (provider, size, steps))
                figures = {"step_ms": round(result[time_figure], 2), "peak_mb": round(result["peak_mb"], 2)}
                print(f"{varied:8} {value:8g} {provider:8} {figures['step_ms']:9.1f} ms {figures['peak_mb']:8.1f} MB",
                      flush=True)  # fmt: skip
                measured.append({"varied": varied, "provider": provider, **asdict(size), **figures})
            for row in measured:
                fitted = {f"{figure}_exponent": round(exponent(values, [m[figure] for m in measured]), 3)
                          for figure in FIGURES}  # fmt: skip
                rows.append({**row, **fitted, **about})
            if measured:
                print(f"{varied:8} {provider:17} exponents: time {rows[-1]['step_ms_exponent']:.2f}, "
                      f"memory {rows[-1]['peak_mb_exponent']:.2f}", flush=True)  # fmt: skip
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grid, axes = pyplot.subplots(2, len(VARIED), figsize=(13, 6), layout="constrained")
    for column, varied in enumerate(VARIED):
        for line, figure in enumerate(FIGURES):
            axis = axes[line][column]
            for provider in SHOWN:
                points = [row for row in rows if (row["varied"], row["provider"]) == (varied, provider)]
                if points:
                    label = f"{provider}, exponent {float(points[0][f'{figure}_exponent']):.2f}"
                    x, y = ([float(point[name]) for point in points] for name in (varied, figure))
                    axis.loglog(x, y, "o-", label=label)
            axis.set(xlabel=varied, ylabel={"step_ms": "step, ms", "peak_mb": "peak over the model, MB"}[figure])
            axis.legend(fontsize=7)
    head = rows[0]
    what = {"step_ms": "wall", "cpu_ms": "CPU"}[head["time"]]
    grid.suptitle(f"random Llama, fp32, around {Size()}; {what} time; {head['cpu']}, {head['cores']} cores, "
                  f"torch {head['torch']}, {head['commit']}", fontsize=7)  # fmt: skip
    grid.savefig(RESULTS.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="processor time, for a machine that others use, too")
    options = parser.parse_args()
    rows = run(options.steps, "cpu_ms" if options.cpu else "step_ms")
    write_rows(RESULTS, rows)
    draw(rows)


if __name__ == "__main__":
    main()
