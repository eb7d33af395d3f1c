"""SparseTrainer: transformers' Trainer that selects, sparsifies and trains only the selected entries."""

import itertools
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from sparseft.delta import Delta
from sparseft.evaluation import loss_positions
from sparseft.layers import selected, sparsify
from sparseft.optim import SparseAdamW
from sparseft.pattern import TENSORS, Pattern, check_tile
from sparseft.selection import ALLOCATIONS, CRITERIA, select

OPTIMIZER_FILE = "optimizer.pt"  # where Trainer puts the optimizer's state inside a checkpoint
DENSE_LEARNING_RATE = 1e-4  # at or below: a rate for dense fine-tuning, which a sparse change hardly feels


@dataclass(frozen=True)
class SparseConfig:
    """What to select, and how the selected entries train. The learning rate and so on are in TrainingArguments.

    Attributes:
        density, criterion, tile, tile_budget, allocation, include, exclude, train_norms, seed: as in
            `sparseft.select`.
        batches: training batches whose gradients are summed for the selection.
        decay_to: what `weight_decay` pulls towards: "pretrained" values or "zero".
        on_nonfinite: "skip" leaves out a step with a NaN or Inf gradient and counts it; "raise" stops.
    """

    density: float = 0.01
    criterion: str = "grad"
    tile: tuple[int, int] = (64, 64)
    tile_budget: float = 0.1
    allocation: str = "global"
    include: str | list[str] | None = None
    exclude: str | list[str] | None = None
    train_norms: bool = False
    batches: int = 8
    decay_to: str = "pretrained"
    on_nonfinite: str = "skip"
    seed: int = 0

    def __post_init__(self):
        """Refuse at once what `sparseft.select` would refuse after the model and the data are loaded."""
        if self.batches < 1:
            raise ValueError(f"batches must be at least 1, got {self.batches}")
        for name, share in (("density", self.density), ("tile_budget", self.tile_budget)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {share}")
        check_tile(self.tile)
        for name, known in (("criterion", CRITERIA), ("allocation", ALLOCATIONS),
                            ("decay_to", ("pretrained", "zero")), ("on_nonfinite", ("skip", "raise"))):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {sorted(known)}, got {getattr(self, name)!r}")

    def selection(self) -> dict[str, Any]:
        """The arguments of `sparseft.select`."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_SELECTION}


_NOT_SELECTION = ("batches", "decay_to", "on_nonfinite")


@dataclass
class SparseTrainingArguments(TrainingArguments):
    """TrainingArguments whose defaults suit a sparse change: it wants a larger learning rate than a dense one."""

    learning_rate: float = 2e-3
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
                          "about 2e-3 (the default of SparseTrainingArguments)", stacklevel=2)  # fmt: skip
        self.sparse = SparseConfig() if sparse is None else sparse
        self.optimizer: torch.optim.Optimizer | None = None
        super().__init__(model, args, **kwargs)

    def select(self) -> dict[str, Pattern]:
        """Patterns chosen on the first training batches, in the order of the first epoch."""
        if self.args.world_size > 1:
            raise ValueError("each process would select for itself; sparsify the model before training it in parallel")
        loader = self.get_train_dataloader()
        loader = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper notes where training stands
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.sparse.seed)
            batches = [self._prepare_inputs(b) for b in itertools.islice(loader, self.sparse.batches)]
        return select(self.model, batches, loss_fn=self.compute_loss, **self.sparse.selection())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Select and sparsify if that is still to do, then SparseAdamW over the selected entries."""
        if not selected(self.model):
            sparsify(self.model, self.select())
        if self.optimizer is None:
            args = self.args
            leaves = [(name, chosen.values) for name, chosen in selected(self.model).items()]
            self.optimizer = SparseAdamW(
                leaves, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
                weight_decay=args.weight_decay, decay_to=self.sparse.decay_to, on_nonfinite=self.sparse.on_nonfinite,
            )  # fmt: skip
        leaves_now = {chosen.values for chosen in selected(self.model).values()}
        if not leaves_now & {p for group in self.optimizer.param_groups for p in group["params"]}:
            raise ValueError("optimizers: the given one trains none of the selected entries; sparsify the model first "
                             "and give it sparseft.parameters(model)")  # fmt: skip
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
        now = selected(self.model)
        if not now:
            now = selected(sparsify(self.model, {name: pattern for name, (pattern, _) in leaves.items()}))
        for name, (pattern, base) in leaves.items():
            if name not in now or now[name].pattern != pattern or not torch.equal(now[name].base.cpu(), base):
                raise ValueError(f"{resume_from_checkpoint}: {name} was trained from other values or at other entries "
                                 "than this model's; resume with the pretrained model of the first run")  # fmt: skip
        super()._load_from_checkpoint(resume_from_checkpoint, model)

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


def _saved_leaves(checkpoint: Path) -> dict[str, tuple[Pattern, Tensor]]:
    """Weight name -> (pattern, base values) of a checkpoint written by SparseTrainer."""
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
        leaves[names[number]] = (pattern.validate(), saved["base"])
    return leaves
