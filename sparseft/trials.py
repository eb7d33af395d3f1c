"""Short trainings of one model, each from the same weights, measured on rows held out of the training data."""

import math
import random
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseft import models
from sparseft.data import Encoder, Examples, fingerprint, read_rows, tokenize
from sparseft.evaluation import score
from sparseft.finetune import Display, RunConfig, trainer_for
from sparseft.journal import Journal
from sparseft.layers import densify, selected, sparsify
from sparseft.pattern import Pattern
from sparseft.selection import eligible
from sparseft.trainer import SparseConfig

HELD_OUT, MOST_HELD_OUT = 0.2, 200  # of the training rows, where no others are given


@dataclass(frozen=True)
class Outcome:
    """What one trial came to.

    Attributes:
        loss: mean cross entropy per answer token of the held-out rows. `gain`: how far it fell.
        entries: weights selected. `changed`: those whose value differs after the training.
        tile_share: share of the selected weights' tiles that hold an entry.
        select_seconds, step_seconds, measure_seconds: of the selection (0 if it was known), of a training step, of the
            measurement.
        row_losses: what each held-out row adds to `loss`.
    """

    loss: float
    gain: float
    entries: int
    changed: int
    tile_share: float
    select_seconds: float
    step_seconds: float
    measure_seconds: float
    row_losses: list[float]

    def seconds(self, steps: int) -> float:
        """Time of the whole trial."""
        return self.select_seconds + steps * self.step_seconds + self.measure_seconds

    def figures(self) -> dict[str, Any]:
        """For a report: all but the rows' losses."""
        return {name: value for name, value in asdict(self).items() if name != "row_losses"}

    def lead(self, other: "Outcome") -> tuple[float, float]:
        """How much lower this loss is than another's, and the standard error of that: rows are drawn, differences
        are paired."""
        differences = torch.tensor(other.row_losses, dtype=torch.float64) - torch.tensor(
            self.row_losses, dtype=torch.float64
        )
        n = len(differences)
        return float(differences.sum()), float(differences.std() * n**0.5) if n > 1 else math.inf


class Trials:
    """A loaded model with its data, ready to be trained again and again.

    Args:
        config: of the trainings; its `sparse` and `steps` are given trial by trial, its `evals` and `rehearse` have no
            say.
        held_out: rows to measure on, as in `data.read_rows`; None holds out a fifth of the training rows, at most 200,
            chosen by the seed.
        journal: file that keeps every finished trial; those that it holds already are not made again. None: no file.

    Attributes:
        start: the loss before any training.
    """

    def __init__(self, config: RunConfig, held_out: str | None, display: Display, journal: Path | None = None):
        rows = read_rows(config.data)
        if held_out is None:
            rows, other = split(rows, config.seed)
        else:
            other = read_rows(held_out)
        data = {"held_out": held_out, "rows_sha256": fingerprint(rows), "held_out_sha256": fingerprint(other)}
        self._journal = None if journal is None else Journal(journal, config, data)
        self.config, self.display = config, display
        display.stage(f"Load {config.model}")
        self.model, self.tokenizer = models.load(config.model, dtype=config.dtype, device=models.device(config.device))
        encoder = Encoder(self.tokenizer, chat_template=config.chat_template, system=config.system,
                          max_length=config.max_length)  # fmt: skip
        self.examples = tokenize(rows, encoder)
        self.held_out: Examples = tokenize(other, encoder)
        display.note(f"training: {self.examples.report()}")
        display.note(f"held out: {self.held_out.report()}")
        self._patterns: dict[str, dict[str, Pattern]] = {}
        self._born = _clocks()
        self._before = (self._journal.seconds, self._journal.cpu_seconds) if self._journal else (0.0, 0.0)
        self.start = sum(self._row_losses())
        display.note(f"held-out loss before training: {self.start:.4f}")

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights that may be selected."""
        return eligible(self.model, self.config.sparse.include, self.config.sparse.exclude)

    @property
    def epoch(self) -> int:
        """Steps in which every row is seen once."""
        return -(-len(self.examples) // (self.config.batch_size * self.config.accumulate))

    def about(self) -> dict[str, Any]:
        """For a report: the configuration, rows, threads, the first loss; seconds on the clock, and of CPU time, since
        the data were ready, and of the trials that an interrupted search left."""
        clock, cpu = (now - then for now, then in zip(_clocks(), self._born, strict=True))
        clock, cpu = clock + self._before[0], cpu + self._before[1]
        return {"config": asdict(self.config), "rows": len(self.examples), "held_out_rows": len(self.held_out),
                "threads": torch.get_num_threads(), "start_loss": self.start, "seconds": clock,
                "cpu_seconds": cpu}  # fmt: skip

    def __call__(self, sparse: SparseConfig, steps: int) -> Outcome:
        """Select as `sparse` says (once; later trials of it reuse that), train, measure, take the training back.

        Selected weights stay the same in a trial, whatever `sparse.refresh` says. A trial that the journal holds is not
        made again.
        """
        if self._journal is None:
            return self._train(sparse, steps)
        known = self._journal.find(sparse, steps)
        if known is not None:
            return _read(known, self._journal.path)
        begun = _clocks()
        outcome = self._train(sparse, steps)
        clock, cpu = (now - then for now, then in zip(_clocks(), begun, strict=True))
        self._journal.add(sparse, steps, asdict(outcome), clock, cpu)
        return outcome

    def _train(self, sparse: SparseConfig, steps: int) -> Outcome:
        config = replace(self.config, sparse=replace(sparse, refresh=None), steps=steps, save_steps=0)
        with tempfile.TemporaryDirectory() as folder:
            clock = time.perf_counter()
            trainer = trainer_for(config, self.model, self.tokenizer, self.examples, Path(folder), self.display)
            try:
                key = _key(sparse)
                known = self._patterns.get(key)
                patterns = trainer.select() if known is None else known
                self._patterns[key] = patterns
                select_seconds = 0.0 if known is not None else time.perf_counter() - clock
                sparsify(self.model, patterns)
                clock = time.perf_counter()
                trainer.train()
                step_seconds = (time.perf_counter() - clock) / steps
                clock = time.perf_counter()
                row_losses = self._row_losses()
                measure_seconds = time.perf_counter() - clock
                changed = sum(int((p.gather(self.model.get_parameter(name).detach()) != chosen.base).sum())
                              for name, chosen in selected(self.model).items() for p in [chosen.pattern])  # fmt: skip
            finally:
                self._rewind()
        everything = sum(-(-p.shape[0] // p.tile[0]) * -(-p.shape[1] // p.tile[1]) for p in patterns.values())
        loss = sum(row_losses)
        return Outcome(loss, self.start - loss, sum(map(len, patterns.values())), changed,
                       sum(len(p.tiles) for p in patterns.values()) / everything,
                       select_seconds, step_seconds, measure_seconds, row_losses)  # fmt: skip

    def _row_losses(self) -> list[float]:
        """Each held-out row's cross entropy, over the answer tokens of all."""
        losses, counts = score(self.model, self.tokenizer, self.held_out.items, batch_size=2 * self.config.batch_size)
        return (losses.double() / counts.sum()).tolist()

    @torch.no_grad()
    def _rewind(self) -> None:
        """Back to the pretrained weights, to the bit, and to a plain model."""
        for chosen in selected(self.model).values():
            at = chosen.pattern.indices()
            flat = chosen.weight.view(-1)
            flat[at] = chosen.base
        if selected(self.model):
            densify(self.model)
        self.model.zero_grad()


def _read(known: dict[str, Any], journal: Path) -> Outcome:
    """
    Raises:
        ValueError: another version of sparseft wrote the journal.
    """
    expected = {field.name for field in fields(Outcome)}
    if known.keys() != expected:
        raise ValueError(f"{journal}: its trials must have {sorted(expected)}, got {sorted(known)}; remove it to start "
                         "again")  # fmt: skip
    return Outcome(**known)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def split(rows: list[dict], seed: int) -> tuple[list[dict], list[dict]]:
    """Training rows and held-out rows, both in their order.

    Raises:
        ValueError: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError("data: one row cannot be split; give the held-out rows")
    count = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(rows))))
    out = set(random.Random(seed).sample(range(len(rows)), count))
    return [r for i, r in enumerate(rows) if i not in out], [r for i, r in enumerate(rows) if i in out]


def _key(sparse: SparseConfig) -> str:
    """Equal for equal settings (which may hold lists)."""
    return repr(sparse)
