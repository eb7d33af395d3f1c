"""One fine-tuning run from files to files: load, evaluate, select, train, evaluate, save. `sparseft train` is this."""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from sparseft import models
from sparseft.data import IGNORE, Collator, Encoder, Examples, Row, check_question, read_rows, reference, tokenize
from sparseft.delta import Delta
from sparseft.evaluation import Progress, Result, continuations, evaluate
from sparseft.selection import eligible
from sparseft.trainer import SparseConfig, SparseTrainer, SparseTrainingArguments

DELTA, METRICS, CONFIG = "delta.safetensors", "metrics.json", "config.json"
HISTORY, SAMPLES, CHECKPOINTS = "history.jsonl", "samples.jsonl", "checkpoints"


class Display(Protocol):
    """Who is told how far a run is."""

    def stage(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's outcome, as stored in its config.json.

    Attributes:
        model, dtype, device: as in `models.load`; device "auto" is the GPU if there is one.
        data: as in `data.read_rows`. `evals`: name -> rows to evaluate on, before and after, likewise.
        chat_template, system, max_length: as in `data.Encoder`.
        sparse: what to select.
        epochs, learning_rate, batch_size, accumulate, weight_decay, warmup, seed: of the training; `steps` > 0
            overrides epochs. `save_steps` > 0 keeps a checkpoint every so many steps.
        max_new_tokens: length of the answers in the evaluation.
        rehearse: rows without answers ({prompt} or {question}). The model's own greedy answers to them, of at most
            `rehearse_tokens` tokens, join the training data, so that it keeps its ways (a form of rehearsal).
    """

    model: str
    data: str
    evals: dict[str, str] = field(default_factory=dict)
    dtype: str = "auto"
    device: str = "auto"
    chat_template: bool | None = None
    system: str | None = None
    max_length: int = 1024
    sparse: SparseConfig = field(default_factory=SparseConfig)
    epochs: float = 3.0
    steps: int = 0
    learning_rate: float = SparseTrainingArguments.learning_rate
    batch_size: int = SparseTrainingArguments.per_device_train_batch_size
    accumulate: int = 1
    weight_decay: float = SparseTrainingArguments.weight_decay
    warmup: float = SparseTrainingArguments.warmup_steps
    gradient_checkpointing: bool = False
    seed: int = 0
    save_steps: int = 0
    max_new_tokens: int = 64
    rehearse: str | None = None
    rehearse_tokens: int = 32


@dataclass
class Run:
    """A finished run: its folder, the trained model (still sparsified), its delta and its metrics."""

    folder: Path
    model: nn.Module
    delta: Delta
    metrics: dict[str, Any]
    before: dict[str, Result]
    after: dict[str, Result]


def run(config: RunConfig, folder: Path, display: Display, *, resume: bool = False) -> Run:
    """Fine-tune as `config` says and fill `folder` with metrics, delta, config, history and sample answers.

    Args:
        resume: continue from the newest checkpoint in the folder.

    Raises:
        ValueError: bad input; nothing was trained and the folder was not made.
    """
    _check_folder(folder, config, resume)
    rows = read_rows(config.data)
    eval_rows = {name: read_rows(source) for name, source in config.evals.items()}
    questions = read_rows(config.rehearse, check=check_question) if config.rehearse else []
    device = models.device(config.device)
    clock = _Clock(device)

    display.stage(f"Load {config.model}")
    with clock("load"):
        model, tokenizer = models.load(config.model, dtype=config.dtype, device=device)
    encoder = Encoder(tokenizer, chat_template=config.chat_template, system=config.system, max_length=config.max_length)
    examples = tokenize(rows, encoder)
    weights = models.count(model)
    share = sum(w.numel() for w in eligible(model, config.sparse.include, config.sparse.exclude).values())
    display.note(f"{weights:,} weights, {model.dtype}, {device.type}")
    display.note(f"{config.data}: {examples.report()}")
    start = models.state_sha256(model)
    before = _evaluate_all(model, encoder, eval_rows, config, display, clock, "before")

    if questions:
        display.stage(f"Rehearse {len(questions)} questions")
        with clock("rehearse"):
            own = rehearsal(model, encoder, questions, config.rehearse_tokens, display.progress)
        examples = replace(examples, items=[*examples.items, *own])
        display.note(f"{config.rehearse}: {len(own)} of the model's own answers join the training data")

    trainer = trainer_for(config, model, tokenizer, examples, folder, display)
    if not resume:
        display.stage(f"Select {config.sparse.density:.2%} of {share:,} weights ({config.sparse.criterion})")
        with clock("select"):
            try:
                trainer.create_optimizer()
            except BaseException:
                shutil.rmtree(folder)  # Trainer made it; nothing is in it yet
                raise
        write_json(folder / CONFIG, asdict(config))
    display.stage("Train")
    with clock("train"):
        trained = trainer.train(resume_from_checkpoint=resume or None)
    after = _evaluate_all(model, encoder, eval_rows, config, display, clock, "after")

    scores = {name: {"before": before[name].metrics(), "after": after[name].metrics()} for name in before}
    delta = trainer.delta({"model": config.model, "config": asdict(config), "metrics": scores})
    delta.save(folder / DELTA)
    figures = delta.summary().total
    metrics = {
        "evals": scores,
        "train_loss": trained.training_loss,
        "steps": trained.global_step,
        "skipped_steps": delta.metadata["skipped_steps"],
        "changed_weights": figures.changed,
        "selected_weights": figures.entries,
        "eligible_weights": share,
        "model_weights": weights,
        "delta_bytes": (folder / DELTA).stat().st_size,
        "seconds": clock.total,
        "seconds_by_stage": clock.stages,
        "peak_memory_bytes": models.peak_memory_bytes(device),
        "peak_memory_bytes_by_stage": clock.peaks,
        "data_sha256": examples.fingerprint,
        "state_sha256": start,
    }
    if not config.save_steps:
        (folder / CHECKPOINTS).rmdir()  # Trainer made it, and put nothing there
    write_json(folder / CONFIG, asdict(config))  # of a resumed run: its new length
    write_json(folder / METRICS, metrics)
    _write_samples(folder / SAMPLES, eval_rows, before, after)
    return Run(folder, model, delta, metrics, before, after)


def _check_folder(folder: Path, config: RunConfig, resume: bool) -> None:
    checkpoints = any((folder / CHECKPOINTS).glob("checkpoint-*"))
    if not resume:
        if folder.exists():
            way_out = "choose another name, or resume it" if checkpoints else "choose another name, or remove it"
            raise ValueError(f"{folder} exists already; {way_out}")
        return
    if not checkpoints:
        raise ValueError(f"{folder} is no run to resume: it has no checkpoints (it needs save_steps)")
    before, now = json.loads((folder / CONFIG).read_text()), json.loads(json.dumps(asdict(config)))
    changed = [key for key in now if key not in _FREE_ON_RESUME and now[key] != before.get(key)]
    if changed:
        told = ", ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed)
        raise ValueError(f"{folder}: a run is resumed with its own settings; {told}")


# what says how long a run is and how it is watched, not what it learns
_FREE_ON_RESUME = ("epochs", "steps", "save_steps", "evals", "max_new_tokens", "device")


def rehearsal(
    model: nn.Module, encoder: Encoder, questions: Sequence[Row], max_new_tokens: int, progress: Progress | None = None
) -> list[dict[str, list[int]]]:
    """Training examples whose answers are the model's own, as it gives them now."""
    prompts = [encoder.question(row) for row in questions]
    answers = continuations(model, encoder.tokenizer, prompts, max_new_tokens, progress=progress)
    return [{"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer}
            for prompt, answer in zip(prompts, answers, strict=True)]  # fmt: skip


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def trainer_for(
    config: RunConfig, model, tokenizer, examples: Examples, folder: Path, display: Display
) -> SparseTrainer:
    """A trainer as `config` says, that puts its history and checkpoints into `folder`."""
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True} if config.gradient_checkpointing else {}
    arguments = SparseTrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup,
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        seed=config.seed,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=1,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
        **checkpointing,  # named only where it is wanted: newer versions warn about that name
    )
    callback = _Follow(display, folder / HISTORY)
    trainer = SparseTrainer(model, arguments, sparse=config.sparse, train_dataset=examples, callbacks=[callback],
                            processing_class=tokenizer, data_collator=Collator.of(tokenizer))  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Follow(TrainerCallback):
    """Shows each step, and writes what the Trainer logs to the history file."""

    def __init__(self, display: Display, history: Path):
        self.display, self.history = display, history

    def on_step_end(self, args, state, control, **kwargs):
        self.display.progress("steps", state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        with self.history.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def _evaluate_all(model, encoder, eval_rows: dict[str, list[Row]], config, display, clock, when) -> dict[str, Result]:
    results = {}
    for name, rows in eval_rows.items():
        display.stage(f"Evaluate on {name}, {when} training")
        with clock(f"evaluate_{when}"):
            results[name] = evaluate(model, encoder, rows, max_new_tokens=config.max_new_tokens,
                                     progress=display.progress)  # fmt: skip
        display.note(", ".join(f"{key} {value:.3f}" for key, value in results[name].metrics().items()))
    return results


def _write_samples(path: Path, eval_rows: dict[str, list[Row]], before: dict[str, Result], after) -> None:
    with path.open("w") as file:
        for name, rows in eval_rows.items():
            questions = [row for row in rows if "choices" not in row]
            for row, old, new in zip(questions, before[name].answers, after[name].answers, strict=True):
                sample = {"set": name, **row, "reference": reference(row), "before": old, "after": new}
                file.write(json.dumps(sample) + "\n")


def samples(folder: Path) -> list[dict[str, Any]]:
    """The sample answers of a run: the row's fields, `set`, `reference`, and the answers `before` and `after`."""
    return [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]


def apply_to_folder(
    delta_file: Path, model_name: str, output: Path, *, revert: bool = False, dtype: str = "auto"
) -> None:
    """Write the model with the delta applied (or taken back) to the folder `output`, whole or not at all.

    Args:
        model_name: as in `models.load`. `output` may be the same folder: it is replaced at the end.
        dtype: "auto" is the delta's.

    Raises:
        ValueError: the delta does not fit the model, or it is (not) applied already; nothing was written.
    """
    delta = Delta.load(delta_file)
    kinds = {change.dtype for change in delta.changes.values()}
    short = {str(kind).removeprefix("torch."): name for name, kind in models.DTYPES.items()}
    if dtype == "auto" and len(kinds) == 1:
        dtype = short.get(kinds.pop(), "auto")
    model, tokenizer = models.load(model_name, dtype=dtype)
    delta.revert_(model) if revert else delta.apply_(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    with models.new_folder(output) as made:
        if Path(model_name).is_dir():  # further files of the folder go along
            weights = shutil.ignore_patterns("model*.safetensors*", "pytorch_model*.bin*")
            shutil.copytree(model_name, made, dirs_exist_ok=True, ignore=weights)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)


class _Clock:
    """Seconds per stage, and the peak memory of the process at the end of each."""

    def __init__(self, device: torch.device):
        self.stages: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._device = device
        self._start = time.perf_counter()

    @property
    def total(self) -> float:
        return time.perf_counter() - self._start

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - start
        self.peaks[stage] = models.peak_memory_bytes(self._device)
