"""One run, from the pretrained model to a row of the CSV."""

import datetime
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.machine import describe
from bench.quality.likelihood import Answers, answer, text_loss
from bench.quality.methods import METHODS, Setting
from bench.quality.plan import Run
from bench.quality.report import wilson
from bench.quality.store import Row
from bench.quality.tasks import Item, Task, sample
from bench.quality.training import Clock, Schedule, batches, train

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Bench:
    """What runs need: a loader of the pretrained model and its tokenizer, the tasks by name, and HellaSwag."""

    load: Callable[[], tuple[nn.Module, Any]]
    tasks: dict[str, Task]
    general: Task


def execute(run: Run, bench: Bench, progress: Progress | None = None) -> Row:
    """Train and evaluate. A run whose loss stops being finite gives a row with status "failed: ..."."""
    model, tokenizer = bench.load()
    scale, task = run.scale, bench.tasks[run.task]
    row: Row = {
        "key": run.key, "study": scale.name, "task": run.task, "variant": run.variant.name,
        "method": run.variant.method, "options": json.dumps(run.variant.options, sort_keys=True), "role": run.role,
        "rate": run.rate, "seed": run.seed, "steps": run.steps, "batch": scale.batch, "status": "ok",
        "dtype": str(model.dtype).removeprefix("torch."),
    }  # fmt: skip
    prepare, training, evaluation = Clock(), Clock(), Clock()
    schedule = Schedule(run.steps)
    make = partial(batches, tokenizer, task.train, size=scale.batch, seed=run.seed)
    setting = Setting(run.rate, run.seed, lambda count: make(count=count), schedule)
    try:
        torch.manual_seed(run.seed)
        with prepare:
            trainable = METHODS[run.variant.method](model, setting, **run.variant.arguments())
        row["trained_values"] = trainable.count
        if run.steps:
            data = make(count=run.steps)
            with training:
                losses = train(trainable, data, schedule, progress)
            row["train_loss"] = sum(losses[-10:]) / len(losses[-10:])
            row["skipped_steps"] = getattr(trainable.optimizer, "skipped_steps", 0)
        model = trainable.model
        del trainable
        gc.collect()
        ask = partial(answer, model, tokenizer, progress=progress)
        with evaluation:
            if run.role in ("tune", "screen"):
                found = ask(task, _some(task.validation, scale.validation_rows))
                row |= {"validation_accuracy": found.accuracy, "validation_loss": found.loss,
                        "rows": len(found.hits), "hits": pack_hits(found.hits)}  # fmt: skip
            else:
                row |= _test(run, bench, ask)
            stories = _some(bench.general.test, scale.text_rows)
            row["text_loss"] = text_loss(model, tokenizer, [item.prompt + item.labels[item.answer] for item in stories])
    except FloatingPointError as error:
        row["status"] = f"failed: {error}"
    for name, clock in (("prepare", prepare), ("train", training), ("evaluate", evaluation)):
        row[f"{name}_wall_s"] = round(clock.wall, 2)
        row[f"{name}_cpu_s"] = round(clock.cpu, 2)
    del row["evaluate_cpu_s"]
    return {**row, **describe(), "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


def _test(run: Run, bench: Bench, ask: Callable[..., Answers]) -> Row:
    scale = run.scale
    task = bench.tasks[run.task]
    other = next(other for name, other in bench.tasks.items() if name != run.task)
    found = ask(task, _some(task.test, scale.test_rows))
    elsewhere = ask(other, _some(other.test, scale.other_rows))
    general = ask(bench.general, _some(bench.general.test, scale.hellaswag_rows))
    low, high = wilson(sum(found.hits), len(found.hits))
    return {
        "accuracy": found.accuracy, "low": low, "high": high, "rows": len(found.hits), "loss": found.loss,
        "hits": pack_hits(found.hits), "other": other.name, "other_accuracy": elsewhere.accuracy,
        "other_rows": len(elsewhere.hits), "hellaswag_accuracy": general.accuracy, "hellaswag_rows": len(general.hits),
    }  # fmt: skip


def _some(items: list[Item], count: int) -> list[Item]:
    return sample(items, count) if count else items


def pack_hits(hits: list[bool]) -> str:
    """Which questions were answered right, in hexadecimal after an "x"; the first question is the highest bit."""
    return "x" + f"{int(''.join('1' if hit else '0' for hit in hits), 2):0{-(-len(hits) // 4)}x}"
