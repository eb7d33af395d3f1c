"""SparseAdamW: AdamW whose parameters are the selected entries, with two doors (see the class)."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparseft.arena import STATE, Arena
from sparseft.dropin import FirstBackward, free_others
from sparseft.layers import Selected, keep_left_, owner, plain, selected
from sparseft.ops import scatter_delta_
from sparseft.pattern import TENSORS, Pattern, matrix_shape
from sparseft.rates import DENSITY_POWER, check_rate, param_groups
from sparseft.selection import eligible


class SparseAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter, 2019) over the selected entries of a model's weights, in one fused step.

    Lean door: `SparseAdamW(model)` (or `sparseft.parameters(model)`, or param groups of them) on a `sparsify`-ed
    model, whose dense weight gradients never exist. Drop-in door: `SparseAdamW(model.parameters(), density=0.01)`
    on an untouched model: the first backward selects; from then on `param_groups` hold one leaf per selected
    weight, and each dense gradient is gathered and freed inside backward. In this door bare parameters are
    eligible from two dimensions on (pass the model to leave embeddings and the output head out); frozen parameters
    are not; `step` clears the gathered gradients; to clip, pass the leaves in `param_groups`.

    Moments and master values are fp32 (fp64 for fp64 weights) whatever the weights' dtype (but see `rounding_seed`);
    bias correction goes by each entry's own age.

    Args:
        params: a model, leaves, named parameters, parameters or param groups.
        lr: learning rate (float or 0-dim tensor), a larger one than for dense fine-tuning. In the lean door, with a
            model as `params`, it is the rate for one per cent of the entries, and `density_power` makes others of it;
            see `sparseft.param_groups`. Otherwise it is the rate of all.
        betas, eps, maximize: as in `torch.optim.AdamW`.
        weight_decay: decoupled decay, of the selected entries only.
        decay_to: "pretrained" pulls towards the values before training, "zero" is the classic decay.
        density: share of the eligible weights to select (drop-in door only).
        criterion: "sampled", "balanced", "grad" or "taylor", as in `sparseft.select`;
            "sampled" draws by the parameters' positions, always the same.
        allocation: "global" or "layer".
        tile: tile shape.
        include, exclude: globs on parameter names, as in `sparseft.select`; only with a model as `params`.
        rounding_seed: for bf16 and fp16 weights, keep no master values: the leaves take the weights' dtype, and updates
            are rounded stochastically, with random bits that depend on this seed, the step and the entry only (all
            ranks and a resumed run round alike). Saves 4 of about 24 bytes per entry (value and gradient); gradients
            are then also summed over micro-batches in 16 bits. None: fp32 masters.
        on_nonfinite: "skip" leaves everything as it is and counts in `skipped_steps`; "raise" raises.

    Raises:
        ValueError, TypeError: an argument out of range; parameters without entries and no density; no leaf at all.
        FloatingPointError: from `step`, with on_nonfinite="raise", on a NaN or Inf gradient; nothing has changed.
    """

    writes_weights = True  # no write-back hook needed after its step
    # GradScaler then calls `step` also after an overflow, with the attributes `grad_scale` and `found_inf`: a skipped
    # step is counted, and the drop-in door's gradients are cleared
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1.5e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        decay_to: str = "pretrained",
        density_power: float = DENSITY_POWER,
        density: float | None = None,
        criterion: str = "sampled",
        allocation: str = "layer",
        tile: tuple[int, int] = (64, 64),
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        maximize: bool = False,
        rounding_seed: int | None = None,
        on_nonfinite: str = "skip",
    ):
        if on_nonfinite not in ("skip", "raise"):
            raise ValueError(f"on_nonfinite must be 'skip' or 'raise', got {on_nonfinite!r}")
        if density is not None and not (hasattr(density, "__float__") and 0 < density <= 1):
            raise ValueError(f"density must lie in (0, 1], got {density!r}")
        self.on_nonfinite = on_nonfinite
        self._skipped = torch.zeros((), dtype=torch.int64)
        self._arenas: list[Arena] = []
        self._chosen: dict[nn.Parameter, Selected] = {}  # drop-in door: leaf -> its weight
        self._waiting: FirstBackward | None = None
        self._drop_in = density is not None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decay_to": decay_to,
                    "maximize": maximize, "rounding_seed": rounding_seed}  # fmt: skip
        if not self._drop_in and not (include is None and exclude is None):
            raise ValueError("include / exclude: what trains was chosen by sparsify; they go with density=")
        super().__init__(_as_params(params, lr, density_power, include, exclude, drop_in=self._drop_in), defaults)
        if not self._drop_in and not any(p.requires_grad for group in self.param_groups for p in group["params"]):
            raise ValueError("params: none requires a gradient: something froze the leaves after sparsify")
        if density is not None:
            weights = [(number, p) for number, group in enumerate(self.param_groups) for p in group["params"]]
            self._waiting = FirstBackward(weights, density, criterion, allocation, tile, self._adopt)
            if isinstance(params, nn.Module):
                free_others(params, [p for _, p in weights])
        self._drop_masters()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch (lean door only); checks this group's options, and that its parameters are leaves."""
        if self._waiting is not None or self._chosen:
            raise ValueError("param_group: in the drop-in door all parameters take part in the selection; pass them to "
                             "the constructor")  # fmt: skip
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        check_rate(group["lr"])
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        for name in ("eps", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"{name} must be >= 0, got {group[name]}")
        if group["decay_to"] not in ("pretrained", "zero"):
            raise ValueError(f"decay_to must be 'pretrained' or 'zero', got {group['decay_to']!r}")
        seed = group["rounding_seed"]
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise ValueError(f"rounding_seed must be an integer or None, got {seed!r}")
        if not self._drop_in:
            for p in group["params"]:
                if self._find(p) is None:
                    raise ValueError(
                        f"params: a parameter of shape {tuple(p.shape)} has no selected entries; sparsify the model "
                        "first and pass the model or sparseft.parameters(model), or give density= (drop-in door)"
                    )

    def selected(self, model: nn.Module) -> dict[str, Selected]:
        """The selected weights that this optimizer trains, by their names in `model`, in its order."""
        mine = [self._find(leaf) for group in self.param_groups for leaf in group["params"]]
        by_weight = {chosen.weight: chosen for chosen in mine if chosen is not None}
        return {name: replace(by_weight[p], name=name) for name, p in plain(model).named_parameters() if p in by_weight}

    @property
    def skipped_steps(self) -> int:
        """Steps left out because a gradient was NaN or Inf."""
        return int(self._skipped)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of the selected entries, and the write into their weights."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._waiting is not None and self._waiting.found_nonfinite():
            self._skip(True, expected=hasattr(self, "found_inf"))
        work = [(arena, tiles) for arena in self._current_arenas() if (tiles := arena.collect()) is not None]
        scale: Tensor | None = getattr(self, "grad_scale", None)
        overflow: Tensor | None = getattr(self, "found_inf", None)
        bad = [arena.nonfinite() for arena, _ in work]
        if bad:
            found = torch.stack([b.to(bad[0].device) for b in bad]).amax()
            if overflow is not None:
                found = torch.maximum(found, overflow.to(found))
            self._skip(found, expected=overflow is not None)
            for arena, tiles in work:
                device = arena.values.device
                factor = None if scale is None else scale.reciprocal().to(device, torch.float32)
                arena.step(tiles, found.to(device), factor)
        self._clear()
        return loss

    @property
    def drop_in(self) -> bool:
        """Whether this optimizer selects for itself (`density=`)."""
        return self._drop_in

    def move_entries_(self, leaf: nn.Parameter, source: Tensor) -> None:
        """Carry a leaf's state over to other entries, after `exchange_entries_`.

        Args:
            leaf: one of this optimizer's.
            source: int64 [k], where each entry stood before; -1 for one that is new: moments 0, age 0.
        """
        state = self.state.get(leaf)
        if state:
            stays = source >= 0
            step = state["step"].clone()  # the arena's slices go with the arena
            born = state["born"] if "born" in state else torch.zeros_like(state[STATE[0]], dtype=torch.int32)
            carried = {name: torch.where(stays, _at(state[name], source), 0) for name in STATE}
            born = torch.where(stays, _at(born, source), step.to(torch.int32))
            self.state[leaf] = {"step": step, **carried, "born": born}
        self._arenas = []

    def group_for(self, pattern: Pattern) -> dict[str, Any] | None:
        """The param group in which a further leaf with this pattern belongs: the only one, or the only one that has
        leaves of its kind (see `sparseft.param_groups`); None if that leaves a choice."""
        if len(self.param_groups) == 1:
            return self.param_groups[0]

        def alike(leaf: nn.Parameter) -> bool:
            return self._selected(leaf).pattern.whole_rows == pattern.whole_rows

        groups = [group for group in self.param_groups if any(map(alike, group["params"]))]
        return groups[0] if len(groups) == 1 else None

    def insert_leaf(self, leaf: nn.Parameter, name: str, before: Collection[nn.Parameter]) -> None:
        """Train a further leaf, in its `group_for`, ahead of the first of the leaves `before`."""
        group = self.group_for(self._selected(leaf).pattern)
        assert group is not None
        leaves = group["params"]
        place = next((i for i, other in enumerate(leaves) if other in before), len(leaves))
        leaves.insert(place, leaf)
        if "param_names" in group:
            group["param_names"].insert(place, name)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a SparseAdamW is bound to its model's tensors and cannot be copied or pickled; use state_dict()"
        )

    def _clear(self) -> None:
        for leaf in self._chosen:  # drop-in door: the model's own zero_grad does not reach these leaves
            leaf.grad = None

    def _skip(self, found: Tensor | bool, expected: bool) -> None:
        """Count a step that is left out, or raise; a GradScaler's overflows are expected."""
        if self.on_nonfinite == "raise" and not expected and bool(found):
            self._clear()
            raise FloatingPointError("a gradient is NaN or Inf; no weight was changed")
        found = torch.as_tensor(found)
        self._skipped = self._skipped.to(found.device) + found.long()  # counted on the device: no synchronisation

    def state_dict(self) -> dict[str, Any]:
        """torch's format, and under "sparse" per leaf what makes a resumed run continue exactly: master and
        base values, ages, the pattern, and what left it with its change kept (see `reselect`)."""
        self._current_arenas()
        state = super().state_dict()
        leaves = [leaf for group in self.param_groups for leaf in group["params"]]
        state["sparse"] = {number: _pack_leaf(self._selected(leaf), self._position(leaf), self.state.get(leaf, {}))
                           for number, leaf in enumerate(leaves) if self._find(leaf) is not None}  # fmt: skip
        state["state"] = {number: {key: value for key, value in per_leaf.items() if key != "born"}
                          for number, per_leaf in state["state"].items()}  # fmt: skip
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`: also its selection (drop-in door), its base values and its masters, which are
        written to the weights.

        Raises:
            ValueError: it is not from a SparseAdamW, or for other patterns than this optimizer's.
        """
        if "sparse" not in state_dict:
            raise ValueError("state_dict has no 'sparse' part: it is not from a SparseAdamW")
        saved: dict[int, dict[str, Any]] = state_dict["sparse"]
        if self._waiting is not None and saved:
            self._restore_selection(
                self._waiting, saved, [len(group["params"]) for group in state_dict["param_groups"]]
            )
        leaves = [leaf for group in self.param_groups for leaf in group["params"]]
        for number, entry in saved.items():
            chosen = self._find(leaves[number]) if number < len(leaves) else None
            if chosen is None or chosen.pattern.digest != entry["digest"]:
                raise ValueError(f"state_dict: leaf {number} was saved for another pattern than this optimizer's")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "sparse"})
        for group in self.param_groups:
            group.setdefault("rounding_seed", self.defaults["rounding_seed"])  # states of sparseft 0.1.0 lack it
        with torch.no_grad():
            for number, entry in saved.items():
                leaf = leaves[number]
                chosen = self._selected(leaf)
                leaf.copy_(entry["values"])
                for name in STATE:  # torch has cast them to the leaf's dtype
                    if name in self.state[leaf]:
                        moment = state_dict["state"][number][name]
                        self.state[leaf][name] = moment.to(leaf.device, moment.dtype, copy=True)
                chosen.base.copy_(entry["base"])
                if not self._drop_in:
                    keep_left_(chosen, entry.get("left"))
                scatter_delta_(chosen.weight, leaf, chosen.pattern, "copy")
                if "step" in self.state[leaf]:
                    self.state[leaf]["step"] = self.state[leaf]["step"].to(leaf.device, torch.int64)
                if entry["born"] is not None:
                    self.state[leaf]["born"] = entry["born"].to(leaf.device, torch.int32)
        self._arenas = []
        self._drop_masters()

    def _drop_masters(self) -> None:
        """With a rounding seed leaves change their dtype: at once, not between the first backward and the next."""
        if any(group["rounding_seed"] is not None for group in self.param_groups):
            self._current_arenas()

    def _find(self, leaf: nn.Parameter) -> Selected | None:
        return self._chosen.get(leaf) or owner(leaf)

    def _selected(self, leaf: nn.Parameter) -> Selected:
        chosen = self._find(leaf)
        if chosen is None:
            raise RuntimeError("a parameter of this optimizer is no longer part of a sparsified model (densify?)")
        return chosen

    def _position(self, leaf: nn.Parameter) -> int | None:
        """Drop-in door: which of the parameters given to the constructor the leaf belongs to."""
        return self._numbers.get(leaf) if self._drop_in else None

    def _current_arenas(self) -> list[Arena]:
        """The arenas, rebuilt where leaves were added, moved or loaded since the last step."""
        if self._waiting is not None:
            return []
        leaves = [leaf for group in self.param_groups for leaf in group["params"]]
        covered = {leaf for arena in self._arenas for leaf in arena.leaves}
        if covered != set(leaves) or not all(arena.attached() for arena in self._arenas):
            self._arenas = self._build_arenas()
        return self._arenas

    def _build_arenas(self) -> list[Arena]:
        arenas = []
        for group in self.param_groups:
            buckets: dict[tuple, list[Selected]] = {}
            for leaf in group["params"]:
                chosen = self._selected(leaf)
                key = (chosen.weight.device, chosen.weight.dtype, chosen.pattern.tile)
                buckets.setdefault(key, []).append(chosen)
            arenas += [Arena(group, chosen, self.state) for chosen in buckets.values()]
        return arenas

    def _adopt(self, chosen: list[tuple[int, int, Selected]]) -> None:
        """The first backward has selected: leaves take the place of the parameters."""
        self._waiting = None
        self._numbers = {}
        for group in self.param_groups:
            group["params"] = []
            group.pop("param_names", None)
        for group_number, number, entry in chosen:
            self.param_groups[group_number]["params"].append(entry.values)
            self._chosen[entry.values] = entry
            self._numbers[entry.values] = number

    def _restore_selection(self, waiting: FirstBackward, saved: dict[int, dict[str, Any]], sizes: list[int]) -> None:
        patterns: dict[int, tuple[Pattern, Tensor]] = {}
        weights = waiting.weights
        for entry in saved.values():
            tensors = entry["pattern"]
            pattern = Pattern(tuple(tensors["shape"]), tuple(tensors["tile"]), *(tensors[name] for name in TENSORS))
            number = entry["number"]
            if number is None or number >= len(weights) or pattern.shape != matrix_shape(weights[number][1].shape):
                raise ValueError(
                    f"state_dict: its parameter {number} of shape {pattern.shape} is none of this optimizer's"
                )
            patterns[number] = pattern.validate(), entry["base"]
        mine = [sum(weights[number][0] == group for number in patterns) for group in range(len(self.param_groups))]
        if sizes != mine:
            raise ValueError(f"state_dict: param groups of {sizes} leaves, for this optimizer expected {mine}")
        waiting.restore(patterns)


def _as_params(
    params: Any, lr: float | Tensor, density_power: float, include: Any, exclude: Any, drop_in: bool
) -> list[Any]:
    """What torch's Optimizer takes: leaves (lean door) or the parameters that may be selected (drop-in door)."""
    if isinstance(params, nn.Module):
        if not drop_in:
            return param_groups(params, lr, density_power)
        if selected(params):
            raise ValueError("density: this model is sparsified already; leave density out, or densify it first")
        return _some([(name, p) for name, p in eligible(params, include, exclude).items() if p.requires_grad])
    if include is not None or exclude is not None:
        raise ValueError("include / exclude go by name: pass the model as params")
    if isinstance(params, Tensor):
        raise TypeError(
            f"params must be a model or an iterable of parameters, got a tensor of shape {tuple(params.shape)}"
        )
    given = list(params)
    if given and isinstance(given[0], dict):
        return [{**group, "params": _trainable(group["params"], drop_in)} for group in given]
    return _trainable(given, drop_in)


def _trainable(given: Any, drop_in: bool) -> list[Any]:
    """Without what is frozen (a sparsified model's other parameters may come along with its leaves)."""
    given = [given] if isinstance(given, Tensor) else list(given)
    dimensions = 2 if drop_in else 0
    bare = [p[1] if isinstance(p, tuple) else p for p in given]  # torch takes (name, parameter) too
    return _some([g for g, p in zip(given, bare, strict=True) if p.requires_grad and p.dim() >= dimensions])


def _some(kept: list[Any]) -> list[Any]:
    if not kept:
        raise ValueError("params: no parameter is left to train")
    return kept


def _pack_leaf(chosen: Selected, number: int | None, state: dict[str, Any]) -> dict[str, Any]:
    pattern = chosen.pattern
    tensors = {"shape": pattern.shape, "tile": pattern.tile, **{name: getattr(pattern, name) for name in TENSORS}}
    return {"number": number, "digest": pattern.digest, "pattern": tensors, "values": chosen.values.detach().clone(),
            "base": chosen.base, "born": state.get("born"), "left": chosen.left}  # fmt: skip


def _at(tensor: Tensor, source: Tensor) -> Tensor:
    """tensor[source], anything where `source` is -1 (also if there is nothing to take)."""
    return tensor[source.clamp(min=0)] if len(tensor) else tensor.new_zeros(len(source))
