"""One training loop for all methods: same batches, same schedule, logits only where there is a loss."""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.quality.likelihood import logits_at
from bench.quality.tasks import Item
from sparseft.data import IGNORE, Collator, shift

if TYPE_CHECKING:
    from bench.quality.methods import Trainable

Batch = dict[str, Tensor]
POOL = 8  # batches whose rows are sorted by length together, so that a batch has little padding


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `warmup` (share of the steps), then a cosine to zero; gradients are clipped to `clip`."""

    steps: int
    warmup: float = 0.05
    clip: float = 1.0

    def factor(self, step: int) -> float:
        """What the rate is multiplied with at step 0, 1, ..., steps - 1; never zero."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


@dataclass
class Clock:
    """Wall and CPU seconds (all threads) that a block took, added up."""

    wall: float = 0.0
    cpu: float = 0.0

    def __enter__(self) -> "Clock":
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall += time.perf_counter() - self._start[0]
        self.cpu += time.process_time() - self._start[1]


def example(tokenizer, item: Item) -> dict[str, list[int]]:
    """Prompt, right label and end of text, with the loss on the last two."""
    prompt = tokenizer(item.prompt, add_special_tokens=False).input_ids
    label = [*tokenizer(item.labels[item.answer], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return {"input_ids": prompt + label, "labels": [IGNORE] * len(prompt) + label}


def batches(tokenizer, items: Sequence[Item], *, size: int, count: int, seed: int) -> list[Batch]:
    """The first `count` batches of a run: as many epochs as they take, each in another order, decided by the seed."""
    collate, mix = Collator.of(tokenizer), random.Random(seed)
    examples = [example(tokenizer, item) for item in items]
    made: list[Batch] = []
    while len(made) < count:
        order = mix.sample(examples, len(examples))
        pools = [order[i : i + POOL * size] for i in range(0, len(order), POOL * size)]
        epoch = []
        for pool in pools:
            pool.sort(key=lambda e: len(e["input_ids"]))
            epoch += [pool[i : i + size] for i in range(0, len(pool), size)]
        mix.shuffle(epoch)
        made += [collate(rows) for rows in epoch]
    return made[:count]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy of the labelled tokens, with logits at these positions only."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    target = shift(batch["labels"])
    where = target != IGNORE
    logits = logits_at(model, where, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return F.cross_entropy(logits.float(), target[where])


def train(
    trainable: "Trainable", batches: Sequence[Batch], schedule: Schedule,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[float]:  # fmt: skip
    """Take one step per batch; the losses.

    Raises:
        FloatingPointError: the loss is not finite: the rate is too high, and what follows would say nothing.
    """
    optimizer: Any = trainable.optimizer
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    trainable.model.train()
    for step, batch in enumerate(batches):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule.factor(step)
        loss = loss_of(trainable.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable.parameters, schedule.clip)
        optimizer.step()
        optimizer.zero_grad()
        if trainable.after_step is not None:
            trainable.after_step(batch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"step {step}: the loss is {losses[-1]}")
        if progress is not None:
            progress("steps", step + 1, len(batches))
    return losses
