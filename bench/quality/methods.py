"""The methods: each makes a pretrained model trainable and gives its optimizer.

All compute in the model's dtype (bf16 where the machine is fast at it) and keep fp32 master values and moments of what
they train: sparseft by itself, dense fine-tuning and PEFT's tuners through `MasterAdamW`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import sparseft
from bench.quality.training import Batch, Schedule, loss_of, train
from sparseft.pattern import Pattern
from sparseft.rates import DENSITY_POWER
from sparseft.schedules import PLANS, SelectAgain
from sparseft.selection import eligible, select
from sparseft.selection.targets import SHARE, Targets

SELECTION_BATCHES = 8  # of the training data, for the selection
LINEARS = "all-linear"  # PEFT's word for every linear layer but the output head


@dataclass(frozen=True)
class Setting:
    """What a method may look at: the rate, the seed, and batches of the training data."""

    rate: float
    seed: int
    batches: Callable[[int], list[Batch]]  # the first n of the run's training batches
    schedule: Schedule


@dataclass(frozen=True)
class Trainable:
    """A model ready to train: `parameters` get gradients (and are clipped), `optimizer` steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    parameters: list[nn.Parameter]
    after_step: Callable[[Batch], Any] | None = None  # called after every step with the batch it was made of

    @property
    def count(self) -> int:
        return sum(p.numel() for p in self.parameters)


class MasterAdamW(torch.optim.AdamW):
    """AdamW on fp32 masters of parameters that compute in another dtype (Micikevicius et al., 2018)."""

    def __init__(self, parameters: Sequence[nn.Parameter], **settings: Any):
        self.targets = list(parameters)
        super().__init__([nn.Parameter(p.detach().float().clone()) for p in self.targets], **settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        masters = self.param_groups[0]["params"]
        for master, target in zip(masters, self.targets, strict=True):
            master.grad = None if target.grad is None else target.grad.float()
        super().step()
        for master, target in zip(masters, self.targets, strict=True):
            master.grad = None
            target.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for target in self.targets:
            target.grad = None


def untrained(model: nn.Module, setting: Setting) -> Trainable:
    """The pretrained model as it is."""
    return Trainable(model.requires_grad_(False), None, [])


def dense(model: nn.Module, setting: Setting, *, weight_decay: float = 0.01) -> Trainable:
    """Every weight."""
    return _masters(model, setting, weight_decay)


def lora(
    model: nn.Module, setting: Setting, *, r: int = 8, alpha: float | None = None, train_targets: bool = False
) -> Trainable:
    """LoRA (Hu et al., 2022) on all linear layers, alpha = 2 r unless given, no dropout.

    `train_targets`: also the embeddings of the tokens that sparseft would take (PEFT's trainable tokens).
    """
    from peft import LoraConfig

    tokens: dict[str, list[int]] | None = None
    if train_targets:
        entries = r * sum(n + m for n, m in (weight.shape for weight in eligible(model).values()))
        targets = Targets(setting.batches(SELECTION_BATCHES), model.get_output_embeddings().weight)
        targets.read()
        tokens = {"embed_tokens": targets.rows(int(SHARE * entries)).tolist()}
    config = LoraConfig(
        r=r, lora_alpha=2 * r if alpha is None else alpha, target_modules=LINEARS, task_type="CAUSAL_LM",
        trainable_token_indices=tokens,
    )  # fmt: skip
    return _peft(model, config, setting)


def shira(model: nn.Module, setting: Setting, *, r: int = 8) -> Trainable:
    """SHiRA (Bhardwaj et al., 2024): r (m + n) random entries of every linear layer, as many values as LoRA has."""
    from peft import ShiraConfig

    return _peft(model, ShiraConfig(r=r, target_modules=LINEARS, random_seed=setting.seed), setting)


def supertuning(model: nn.Module, setting: Setting, *, density: float = 0.01, top: bool = True) -> Trainable:
    """Super-Tuning: the entries of the largest magnitude (or smallest, `top` False) of every linear layer."""
    from peft import SupertuningConfig

    config = SupertuningConfig(target_modules=LINEARS, sparsity=1 - density, select_top=top)
    return _peft(model, config, setting)


def sparse(
    model: nn.Module, setting: Setting, *,
    density: float = 0.01, as_lora: int = 0, batches: int = SELECTION_BATCHES, score_after: int = 0,
    weight_decay: float = 0.01, betas: tuple[float, float] = (0.9, 0.999), density_power: float = DENSITY_POWER,
    refresh: str = "", every: int = 20, allocation: str = "global", criterion: Any = "grad", train_norms: bool = False,
    train_targets: bool | None = False, **selection: Any,
) -> Trainable:  # fmt: skip
    """sparseft.

    Args:
        as_lora: r > 0: as many entries as LoRA of rank r has values, in place of `density`.
        batches: of the training data, for the selection.
        score_after: first train so many steps with a first selection, select on what came out, and start again
            from the pretrained weights at the new entries.
        refresh: a name in `sparseft.schedules.PLANS`: let the entries move so, every `every` steps, by the gradients
            of the step's batch.
        density_power: as in `SparseAdamW`.
        allocation, criterion, train_norms, train_targets, selection: as in `sparseft.select`.
    """
    if as_lora:
        density = rank_density(model, as_lora)

    def choose() -> dict[str, Pattern]:
        return select(
            model, setting.batches(batches), density=density, seed=setting.seed, loss_fn=loss_of,
            allocation=allocation, criterion=criterion, train_norms=train_norms, train_targets=train_targets,
            **selection,
        )  # fmt: skip

    def warm_up() -> None:
        warm = Trainable(model, sparseft.SparseAdamW(model, lr=setting.rate), sparseft.parameters(model))
        train(warm, setting.batches(score_after), replace(setting.schedule, steps=score_after))

    patterns = sparseft.select_late(model, choose, warm_up) if score_after else choose()
    sparseft.sparsify(model, patterns)
    optimizer = sparseft.SparseAdamW(
        model, lr=setting.rate, betas=betas, weight_decay=weight_decay, density_power=density_power
    )
    if not refresh:
        return Trainable(model, optimizer, sparseft.parameters(model))
    plan = replace(PLANS[refresh], every=every)
    again = (
        {"density": density, "allocation": allocation, "criterion": criterion, **selection}
        if isinstance(plan, SelectAgain)
        else {}
    )
    schedule = sparseft.Schedule(
        model, optimizer, plan, setting.schedule.steps, loss_fn=loss_of, seed=setting.seed, **again
    )
    return Trainable(model, optimizer, sparseft.parameters(model), lambda batch: schedule.step([batch]))


METHODS: dict[str, Callable[..., Trainable]] = {
    "none": untrained, "dense": dense, "lora": lora, "shira": shira, "supertuning": supertuning, "sparse": sparse,
}  # fmt: skip


def rank_density(model: nn.Module, rank: int) -> float:
    """The density at which sparseft trains as many values as LoRA of this rank on all linear layers."""
    shapes = [tuple(weight.shape) for weight in eligible(model).values()]
    return rank * sum(n + m for n, m in shapes) / sum(n * m for n, m in shapes)


def _masters(model: nn.Module, setting: Setting, weight_decay: float = 0.01) -> Trainable:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = MasterAdamW(parameters, lr=setting.rate, weight_decay=weight_decay, fused=True)
    return Trainable(model, optimizer, parameters)


def _peft(model: nn.Module, config: Any, setting: Setting) -> Trainable:
    """A PEFT tuner with adapters in the model's dtype: PEFT's default is fp32, which is slower behind a bf16 model."""
    from peft import get_peft_model

    torch.manual_seed(setting.seed)  # of the adapters' first values
    dtype = next(model.parameters()).dtype
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return _masters(wrapped, setting)
