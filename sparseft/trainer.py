"""SparseTrainer: transformers' Trainer that selects, sparsifies and trains only the selected entries."""

import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import LengthGroupedSampler

from sparseft.delta import Delta
from sparseft.evaluation import loss_positions
from sparseft.layers import keep_left_, parameters, selected, sparsify
from sparseft.optim import SparseAdamW
from sparseft.pattern import TENSORS, Pattern, check_tile
from sparseft.rates import DENSITY_POWER
from sparseft.reselection import reselect, select_late
from sparseft.schedules import DropAndGrow, Schedule, SelectAgain
from sparseft.selection import ALLOCATIONS, CRITERIA, STRUCTURES, select
from sparseft.selection.gradients import seeded

OPTIMIZER_FILE = "optimizer.pt"  # where Trainer puts the optimizer's state inside a checkpoint
DENSE_LEARNING_RATE = 1e-4  # at or below: a rate for dense fine-tuning, which a sparse change hardly feels


@dataclass(frozen=True)
class SparseConfig:
    """What to select, and how the selected entries train. The learning rate and so on are in TrainingArguments.

    Attributes:
        density, criterion, tile, tile_budget, allocation, structure, include, exclude, train_norms, train_targets,
            seed: as in `sparseft.select`.
        batches: training batches whose gradients are summed for the selection.
        score_after: train so many steps with a first selection, of one batch each and with the learning rate's schedule
            in short, select on what came out, and start again from the pretrained weights (see `select_late`).
        refresh: let the selected entries move while training, as a DropAndGrow or a SelectAgain says; None: they stay.
        density_power: as in SparseAdamW.
        decay_to: what `weight_decay` pulls towards: "pretrained" values or "zero".
        on_nonfinite: "skip" leaves out a step with a NaN or Inf gradient and counts it; "raise" stops.
    """

    density: float = 0.01
    criterion: str = "sampled"
    tile: tuple[int, int] = (64, 64)
    tile_budget: float = 0.1
    allocation: str = "layer"
    structure: str | None = None
    include: str | list[str] | None = None
    exclude: str | list[str] | None = None
    train_norms: bool = True
    train_targets: bool | None = None
    batches: int = 8
    score_after: int = 0
    refresh: DropAndGrow | SelectAgain | None = None
    density_power: float = DENSITY_POWER
    decay_to: str = "pretrained"
    on_nonfinite: str = "skip"
    seed: int = 0

    def __post_init__(self):
        """Refuse at once what `sparseft.select` would refuse after the model and the data are loaded."""
        if not isinstance(self.refresh, DropAndGrow | SelectAgain | None):
            raise TypeError("refresh must be a DropAndGrow or a SelectAgain, such as sparseft.schedules.PLANS['rigl'], "
                            f"got {self.refresh!r}")  # fmt: skip
        if self.batches < 1:
            raise ValueError(f"batches must be at least 1, got {self.batches}")
        for name, share in (("density", self.density), ("tile_budget", self.tile_budget)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {share}")
        check_tile(self.tile)
        if self.score_after < 0:
            raise ValueError(f"score_after must not be negative, got {self.score_after}")
        if self.structure not in (None, "entries") and isinstance(self.refresh, DropAndGrow):
            raise ValueError(f"refresh: DropAndGrow moves single entries, and structure is {self.structure!r}")
        if self.structure is not None and self.structure not in STRUCTURES:
            raise ValueError(f"structure must be one of {sorted(STRUCTURES)}, got {self.structure!r}")
        for name, known in (("criterion", CRITERIA), ("allocation", ALLOCATIONS),
                            ("decay_to", ("pretrained", "zero")), ("on_nonfinite", ("skip", "raise"))):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {sorted(known)}, got {getattr(self, name)!r}")

    def selection(self) -> dict[str, Any]:
        """The arguments of `sparseft.select`."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_SELECTION}


_NOT_SELECTION = ("batches", "score_after", "refresh", "density_power", "decay_to", "on_nonfinite")


@dataclass
class SparseTrainingArguments(TrainingArguments):
    """TrainingArguments whose defaults suit a sparse change: it wants a larger learning rate than a dense one."""

    learning_rate: float = 1.5e-2
    weight_decay: float = 0.01
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    per_device_train_batch_size: int = 16
    train_sampling_strategy: str = "group_by_length"
    report_to: str | list[str] = "none"


class SparseTrainer(Trainer):
    """A `transformers.Trainer` for sparse fine-tuning; everything that is not named here is the Trainer's.

    Unless the model is sparsified already, `train` first selects on the first training batches and sparsifies it
    in place. Checkpoints are plain models (loadable without sparseft) beside the optimizer's state, from which
    `train(resume_from_checkpoint=...)` continues exactly; it starts from the pretrained model, as the first run.
    Logits are computed only where there is a loss, for models that can.

    Args:
        model: as in Trainer. `args`: default SparseTrainingArguments().
        sparse: what to select.
        kwargs: as in Trainer.
    """

    def __init__(self, model: nn.Module | None = None, args: TrainingArguments | None = None, *,
                 sparse: SparseConfig | None = None, **kwargs):  # fmt: skip
        args = SparseTrainingArguments() if args is None else args
        if args.learning_rate <= DENSE_LEARNING_RATE:
            warnings.warn(f"learning_rate={args.learning_rate:g} suits dense fine-tuning; a sparse change of 1 % wants "
                          "about 1.5e-2 (the default of SparseTrainingArguments)", stacklevel=2)  # fmt: skip
        if getattr(args, "use_liger_kernel", False):
            raise ValueError("use_liger_kernel: its fused loss reads the output head's weight itself and does not call "
                             "the layer: the selected rows would get no gradient")  # fmt: skip
        self.sparse = SparseConfig() if sparse is None else sparse
        self.optimizer: torch.optim.Optimizer | None = None
        self._scoring_loader: Iterable[Any] | None = None
        super().__init__(model, args, **kwargs)
        if self.sparse.refresh is not None:
            if self.args.load_best_model_at_end and self.args.save_only_model:
                raise ValueError("save_only_model: with refresh, the best model's entries are in its optimizer's state")
            self.add_callback(_Refresh(self))

    def select(self) -> dict[str, Pattern]:
        """Patterns chosen on the first training batches, in the order of the first epoch."""
        self._expect_one_process()
        if self.sparse.score_after:
            return select_late(self.model, self._select, self._train_shortly)
        return self._select()

    def _select(self) -> dict[str, Pattern]:
        batches = self.scoring_batches(self.sparse.batches)
        return select(self.model, batches, loss_fn=self.compute_loss, **self.sparse.selection())

    def _train_shortly(self) -> None:
        """`score_after` steps with the selection that the model has now."""
        args, steps, mode = self.args, self.sparse.score_after, self.model.training
        leaves = parameters(self.model)
        optimizer = self._new_optimizer()
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps,
                                  scheduler_specific_kwargs=args.lr_scheduler_kwargs)  # fmt: skip
        try:
            self.model.train()
            with seeded(self.model, self.sparse.seed):
                for batch in itertools.islice(self._endless_batches(steps), steps):
                    with self.compute_loss_context_manager():
                        loss = self.compute_loss(self.model, batch)
                    loss.backward()
                    if args.max_grad_norm:
                        nn.utils.clip_grad_norm_(leaves, args.max_grad_norm)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
        finally:
            self.model.train(mode)

    def scoring_batches(self, count: int, order: int = 0) -> list[Any]:
        """Training batches to score entries on, on the model's device: the first `count` of the epoch with number
        `order`, or all that it has; the same whenever they are asked for."""
        with torch.random.fork_rng(devices=[]):
            if self._scoring_loader is None:
                torch.manual_seed(self.args.seed)  # a shuffling sampler notes the seed at its birth
                loader = self.get_train_dataloader()
                # accelerate's wrapper notes where training stands
                self._scoring_loader = getattr(loader, "base_dataloader", loader)
            sampler: Any = getattr(getattr(self._scoring_loader, "batch_sampler", None), "sampler", None)
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(order)
            torch.manual_seed(self.sparse.seed + order)
            return [self._prepare_inputs(batch) for batch in itertools.islice(self._scoring_loader, count)]

    def _endless_batches(self, count: int) -> Iterator[Any]:
        """At most `count` batches of one epoch after the other."""
        for order in itertools.count():
            batches = self.scoring_batches(count, order)
            if not batches:
                raise ValueError("train_dataset holds no batch")
            yield from batches

    def _expect_one_process(self) -> None:
        if self.args.world_size > 1:
            raise ValueError("each process would select for itself; sparsify the model before training it in parallel")

    def _new_optimizer(self) -> SparseAdamW:
        args, sparse = self.args, self.sparse
        return SparseAdamW(self.model, lr=args.learning_rate, density_power=sparse.density_power,
                           betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
                           weight_decay=args.weight_decay, decay_to=sparse.decay_to,
                           on_nonfinite=sparse.on_nonfinite)  # fmt: skip

    def schedule(self, step: int, steps: int) -> Schedule:
        """The schedule of `sparse.refresh`, after `step` of `steps` steps."""
        self._expect_one_process()
        plan = self.sparse.refresh
        assert plan is not None
        selection = self.sparse.selection() if isinstance(plan, SelectAgain) else {}
        made = Schedule(self.model, _bare(self.optimizer), plan, steps, loss_fn=self.compute_loss,
                        **{"seed": self.sparse.seed, **selection})  # fmt: skip
        made.load_state_dict({"step_count": step})
        return made

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Select and sparsify if that is still to do, then SparseAdamW over the selected entries."""
        if not selected(self.model):
            sparsify(self.model, self.select())
        if self.optimizer is None:
            self.optimizer = self._new_optimizer()
        leaves_now = {chosen.values for chosen in selected(self.model).values()}
        if not leaves_now & {p for group in self.optimizer.param_groups for p in group["params"]}:
            raise ValueError("optimizers: the given one trains none of the selected entries; sparsify the model first "
                             "and give it sparseft.parameters(model)")  # fmt: skip
        if self.sparse.refresh is not None and not isinstance(_bare(self.optimizer), SparseAdamW):
            raise TypeError(f"optimizers: refresh needs a SparseAdamW, got {type(_bare(self.optimizer)).__name__}")
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss, from logits at the labelled positions only, unless all logits are asked for."""
        own_loss = self.label_smoother is None and self.compute_loss_func is None and self.args.n_gpu <= 1
        causal = getattr(self.model, "loss_type", None) == "ForCausalLM" and self.model_accepts_loss_kwargs
        if own_loss and causal and not return_outputs and "labels" in inputs and "shift_labels" not in inputs:
            inputs = {**inputs, **loss_positions(self.model, inputs["labels"])}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As in Trainer; where only the loss is wanted, without the other logits."""
        if not prediction_loss_only or "labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        count = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=count)
        return loss.detach().mean(), None, None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Sparsify as the checkpoint was, then let Trainer load its weights; the optimizer brings the masters."""
        leaves = _saved_leaves(Path(resume_from_checkpoint))
        patterns = {name: leaf.pattern for name, leaf in leaves.items()}
        if not selected(self.model):
            sparsify(self.model, patterns)
        elif self.sparse.refresh is not None:  # they may have moved since
            reselect(self.model, _bare(self.optimizer), patterns)
        now = selected(self.model)
        for name, (pattern, base, _) in leaves.items():
            if name not in now or now[name].pattern != pattern or not torch.equal(now[name].base.cpu(), base):
                raise ValueError(f"{resume_from_checkpoint}: {name} was trained from other values or at other entries "
                                 "than this model's; resume with the pretrained model of the first run")  # fmt: skip
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """As in Trainer; entries that moved since go back to where they were."""
        if self.sparse.refresh is None:
            super()._load_best_model()
            return
        assert self.state.best_model_checkpoint is not None
        leaves = _saved_leaves(Path(self.state.best_model_checkpoint))
        reselect(self.model, _bare(self.optimizer), {name: leaf.pattern for name, leaf in leaves.items()})
        super()._load_best_model()
        for name, chosen in selected(self.model).items():
            keep_left_(chosen, leaves[name].left if name in leaves else None)

    def _get_train_sampler(self, train_dataset=None):
        """Trainer's, but the grouping by length depends on nothing but the seed and the epoch: runs can be resumed."""
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) is not LengthGroupedSampler:
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _EpochLengthSampler(sampler.batch_size, lengths=sampler.lengths, seed=seed)

    def delta(self, metadata: dict[str, Any] | None = None) -> Delta:
        """The change so far, with what is known about its making; `metadata` is added to that."""
        about = {
            "model": getattr(self.model, "name_or_path", ""),
            "data": getattr(self.train_dataset, "fingerprint", None),
            "sparse": asdict(self.sparse),
            "training": {name: getattr(self.args, name) for name in _REPORTED_ARGUMENTS},
            "steps": self.state.global_step,
            "skipped_steps": getattr(_bare(self.optimizer), "skipped_steps", 0),
        }
        return Delta.from_model(self.model, metadata={**about, **(metadata or {})})


_REPORTED_ARGUMENTS = ("learning_rate", "weight_decay", "num_train_epochs", "max_steps", "per_device_train_batch_size",
                       "gradient_accumulation_steps", "max_grad_norm", "warmup_steps", "seed")  # fmt: skip


class _Refresh(TrainerCallback):
    """Moves the selected entries as `SparseConfig.refresh` says; before a checkpoint of the same step is written."""

    def __init__(self, trainer: SparseTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.schedule = self.trainer.schedule(state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        plan, step = self.schedule.plan, state.global_step
        self.schedule.step(lambda: self.trainer.scoring_batches(plan.batches, order=step))


class _EpochLengthSampler(LengthGroupedSampler):
    """LengthGroupedSampler whose order is a function of (seed, epoch)."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


def _bare(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


class _SavedLeaf(NamedTuple):
    """One weight's entries in a checkpoint: the pattern, base values, and what left (as in `layers.Selected`)."""

    pattern: Pattern
    base: Tensor
    left: tuple[Tensor, Tensor] | None


def _saved_leaves(checkpoint: Path) -> dict[str, _SavedLeaf]:
    """What a checkpoint written by SparseTrainer trains, by weight name."""
    file = checkpoint / OPTIMIZER_FILE
    if not file.is_file():
        raise ValueError(f"{checkpoint} has no {OPTIMIZER_FILE}: it was saved without the optimizer, or not by Trainer")
    state = torch.load(file, map_location="cpu", weights_only=True)
    names = [name for group in state["param_groups"] for name in group.get("param_names", ())]
    if "sparse" not in state or len(names) != len(state["sparse"]):
        raise ValueError(f"{file} is not the state of a SparseTrainer's optimizer")
    leaves = {}
    for number, saved in state["sparse"].items():
        tensors = saved["pattern"]
        pattern = Pattern(tuple(tensors["shape"]), tuple(tensors["tile"]), *(tensors[name] for name in TENSORS))
        leaves[names[number]] = _SavedLeaf(pattern.validate(), saved["base"], saved.get("left"))
    return leaves
