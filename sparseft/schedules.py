"""Masks that move while training: when entries are exchanged, how many, and by which rule."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from sparseft.layers import selected
from sparseft.optim import SparseAdamW
from sparseft.reselection import LEAVING, Moved, patterns, reselect
from sparseft.selection import eligible, select
from sparseft.selection.growth import TILES, drop_and_grow
from sparseft.selection.together import together

logger = logging.getLogger(__name__)

DECAYS: dict[str, Callable[[float], float]] = {  # share of the moving time that is over -> factor
    "cosine": lambda over: 0.5 * (1 + math.cos(math.pi * over)),
    "linear": lambda over: 1 - over,
    "constant": lambda over: 1.0,
}


def _check(plan: "DropAndGrow | SelectAgain") -> None:
    for name in ("every", "batches"):
        if getattr(plan, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(plan, name)}")
    if not 0 < plan.until <= 1:
        raise ValueError(f"until must lie in (0, 1], got {plan.until}")
    if plan.leaving not in LEAVING:
        raise ValueError(f"leaving must be one of {list(LEAVING)}, got {plan.leaving!r}")


@dataclass(frozen=True)
class DropAndGrow:
    """In every weight, the entries that changed least make room for those with the largest gradients.

    The defaults are RigL's (Evci et al., 2020); SPIEL and SPIEL_MA below have those of SpIEL-AG and, with SparseAdamW's
    moments in place of SM3's, SpIEL-MA (Ansell et al., 2024). Newcomers' moments start from zero at age zero, where
    SpIEL-AG starts them from the gradients that chose them.

    Attributes:
        every: steps from one exchange to the next.
        until: share of all steps after which the entries stay.
        fraction: share of each weight's entries that is exchanged at first; it falls to zero at `until` as `decay`
            says: "cosine", "linear", or "constant" (it does not fall).
        batches: how many batches the gradients are summed over.
        grow: "gradient"; or "moments", by the optimizer's second moments, which needs no batch (see `drop_and_grow`).
        tiles, leaving: as in `drop_and_grow` and `reselect`.
    """

    every: int = 100
    until: float = 0.75
    fraction: float = 0.3
    decay: str = "cosine"
    batches: int = 1
    grow: str = "gradient"
    tiles: str = "same"
    leaving: str = "revert"

    def __post_init__(self):
        _check(self)
        for name, known in (("decay", DECAYS), ("grow", ("gradient", "moments")), ("tiles", TILES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {self.fraction}")

    def share(self, step: int, steps: int) -> float:
        """Share of each weight's entries that is exchanged after `step` of `steps` steps."""
        return self.fraction * DECAYS[self.decay](min(step / (self.until * steps), 1.0))


@dataclass(frozen=True)
class SelectAgain:
    """The whole selection once more, on the model as it is then; what stays goes on as before.

    LIFT (Liu et al., 2025) refreshes its mask so, every 400 steps, and what leaves keeps its change.

    Attributes:
        every, until, leaving: as in `DropAndGrow`.
        batches: how many batches the selection looks at.
    """

    every: int = 400
    until: float = 1.0
    batches: int = 8
    leaving: str = "keep"

    def __post_init__(self):
        _check(self)


SPIEL = DropAndGrow(every=20, until=1.0, fraction=0.2, decay="linear", batches=5)
SPIEL_MA = replace(SPIEL, grow="moments")
PLANS: dict[str, DropAndGrow | SelectAgain] = {
    "rigl": DropAndGrow(), "spiel": SPIEL, "spiel-ma": SPIEL_MA, "select": SelectAgain(),
}  # fmt: skip


class Schedule:
    """Exchanges the entries that a model trains at, as a plan says; one `step` after every optimizer step.

        schedule = Schedule(model, optimizer, DropAndGrow(every=50), steps=1000)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step([batch])

    To resume, `sparsify` the pretrained model with `patterns(model)` of the interrupted run, then load the state
    dicts of the model, the optimizer and the schedule.

    Args:
        model, optimizer: as in `reselect`.
        plan: a DropAndGrow or a SelectAgain.
        steps: optimizer steps of the whole training.
        loss_fn: as in `select`. `seed`: likewise; for a DropAndGrow the number of the step is added to it.
        group: processes that train copies of the model together, as in `select`: all move alike.
        selection: further arguments of `select`, for SelectAgain. Weights that these do not make eligible, such as
            norm vectors and rows of target tokens, keep their entries.

    Attributes:
        step_count: optimizer steps so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SparseAdamW,
        plan: DropAndGrow | SelectAgain,
        steps: int,
        *,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
        **selection: Any,
    ):
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if selection and not isinstance(plan, SelectAgain):
            raise TypeError(f"{', '.join(selection)}: arguments of select go with SelectAgain, got {plan}")
        self.model, self.optimizer, self.plan, self.steps = model, optimizer, plan, steps
        self.step_count = 0
        self._loss_fn, self._seed, self._group = loss_fn, seed, group
        self._selection = selection | {"train_norms": False, "train_targets": False}  # what trains whole stays

    @property
    def due(self) -> bool:
        """Whether entries are exchanged after the step that was counted last. Never after the very last one: what
        enters then would not train."""
        end = min(self.plan.until * self.steps, self.steps)
        return self.step_count > 0 and self.step_count % self.plan.every == 0 and self.step_count < end

    def step(self, batches: Iterable[Any] | Callable[[], Iterable[Any]]) -> Moved | None:
        """Count an optimizer step, and exchange entries if it is time.

        Args:
            batches: what to score on, as in `select`: such as the batch just trained on, in a list; or a function that
                gives them, which is called only if it is time.

        Returns:
            How many entries stayed, entered and left; None if it is not time.
        """
        self.step_count += 1
        if not self.due:
            return None
        with together(self._group, self.model):
            data = batches() if callable(batches) else batches
            by_moments = isinstance(self.plan, DropAndGrow) and self.plan.grow == "moments"
            moments = self._second_moments() if by_moments else None
        common: dict[str, Any] = {
            "loss_fn": self._loss_fn, "seed": self._seed + self.step_count, "group": self._group,
        }  # fmt: skip
        if isinstance(self.plan, DropAndGrow):
            share = self.plan.share(self.step_count, self.steps)
            chosen = drop_and_grow(self.model, data, share, tiles=self.plan.tiles, second_moments=moments, **common)
        else:
            same = common | {"seed": self._seed}  # what is drawn meets the same random numbers: only new scores move it
            chosen = self._others() | select(self.model, data, **same, **self._selection)
        moved = reselect(self.model, self.optimizer, chosen, leaving=self.plan.leaving)
        logger.info("step %d: %d entries stay, %d enter, %d leave", self.step_count, *moved)
        return moved

    def _second_moments(self) -> dict[str, Tensor]:
        states = {name: self.optimizer.state.get(chosen.values, {}) for name, chosen in selected(self.model).items()}
        return {name: state["exp_avg_sq"] for name, state in states.items() if "exp_avg_sq" in state}

    def _others(self) -> dict:
        names = eligible(self.model, self._selection.get("include"), self._selection.get("exclude"))
        return {name: pattern for name, pattern in patterns(self.model).items() if name not in names}

    def state_dict(self) -> dict[str, int]:
        """The number of steps: all else follows from it."""
        return {"step_count": self.step_count}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.step_count = state_dict["step_count"]
