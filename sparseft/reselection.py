"""Other entries for a model in training: those that stay carry their state along, newcomers start from nothing."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparseft.layers import (
    Selected,
    check_pattern,
    densify,
    exchange_entries_,
    plain,
    refresh_values,
    selected,
    sparsify,
    sparsify_more,
)
from sparseft.optim import SparseAdamW
from sparseft.pattern import Pattern

LEAVING = ("revert", "keep")


class Moved(NamedTuple):
    """How many entries went on training, began, and ended."""

    stayed: int
    entered: int
    left: int


def patterns(model: nn.Module) -> dict[str, Pattern]:
    """The patterns that a sparsified model trains at now, by parameter name, in the model's order."""
    return {name: chosen.pattern for name, chosen in selected(model).items()}


@torch.no_grad()
def reselect(
    model: nn.Module, optimizer: SparseAdamW | None, patterns: dict[str, Pattern], *, leaving: str = "revert"
) -> Moved:
    """Let a sparsified model train at other entries, in place.

    Entries in both the old and the new patterns keep master value, moments and age. New entries start from what the
    weight holds, with zero moments, and their bias correction from age zero. Leaves and param groups stay the same
    objects. To be called between steps: gradients of leaves whose entries change are dropped.

    Args:
        model: as from `sparsify`.
        optimizer: the SparseAdamW (lean door) that trains it; None if there is none yet.
        patterns: as for `sparsify`. A sparsified weight that is not named trains no entry from now on (its leaf stays,
            with length zero). A weight without a leaf gets one, in the optimizer's only param group.
        leaving: what happens to entries that leave: "revert" to the pretrained value, to the bit, or "keep" the change,
            which `Delta` then still knows. Entries kept by an earlier call stay as they are, and are pulled
            nowhere by weight decay, until they enter again.

    Returns:
        How many entries stayed, entered and left.

    Raises:
        ValueError, TypeError: a pattern does not fit (as in `sparsify`), the model is not sparsified or not trained
            by this optimizer, `leaving` is neither, or a new weight could go to several param groups. Nothing is
            changed then.
    """
    now = selected(model)
    if not now:
        raise ValueError("model must be sparsified (sparseft.sparsify), got one without selected weights")
    if leaving not in LEAVING:
        raise ValueError(f"leaving must be one of {list(LEAVING)}, got {leaving!r}")
    if not isinstance(patterns, dict) or not patterns:
        raise ValueError(f"patterns must be a dict with at least one weight, got {patterns!r}")
    known = dict(plain(model).named_parameters())
    for name, pattern in patterns.items():
        check_pattern(plain(model), name, pattern, known)
    further = {name: pattern for name, pattern in patterns.items() if name not in now}
    if optimizer is not None:
        _check_optimizer(optimizer, now, further)

    stayed = entered = left = 0
    for chosen in now.values():
        wanted = patterns[chosen.name] if chosen.name in patterns else _empty(chosen.pattern)
        kept = _move(chosen, wanted.to(chosen.weight.device), optimizer, leaving)
        stayed, entered, left = stayed + kept, entered + len(wanted) - kept, left + len(chosen.pattern) - kept
    if further:
        sparsify_more(model, further)
        if optimizer is not None:
            _insert(selected(model), further, optimizer)
    if optimizer is not None:
        optimizer._drop_masters()
    return Moved(stayed, entered + sum(map(len, further.values())), left)


def select_late(
    model: nn.Module, choose: Callable[[], dict[str, Pattern]], train: Callable[[], object]
) -> dict[str, Pattern]:
    """Patterns that are chosen after a short training, for a model that then starts from its pretrained weights.

    The first gradients of a fine-tuning are mostly about the answers' format; what matters later shows once that is
    learnt. (Training, ranking and rewinding as in the lottery ticket hypothesis: Frankle & Carbin, 2019.)

    Args:
        model: a plain model; it comes back plain, its weights as they were to the bit.
        choose: such as `lambda: select(model, ...)`; called before and after the training.
        train: trains the model, which is sparsified with the first choice meanwhile.

    Returns:
        The second choice.
    """
    sparsify(model, choose())
    try:
        train()
        return choose()
    finally:
        for chosen in selected(model).values():
            entries, base = all_entries(chosen)
            _write(chosen, entries.indices(), base)
        densify(model)


def all_entries(chosen: Selected) -> tuple[Pattern, Tensor]:
    """All entries of a sparsified weight that may differ from the pretrained ones, with their pretrained values:
    those that train and those that left with their change."""
    if chosen.left is None:
        return chosen.pattern, chosen.base
    device = chosen.weight.device
    positions, base = (part.to(device) for part in chosen.left)
    positions = torch.cat([chosen.pattern.indices(), positions])
    pattern = Pattern.from_indices(positions, chosen.pattern.shape, tile=chosen.pattern.tile)
    source = _find(pattern.indices(), positions)
    return pattern, torch.cat([chosen.base, base.to(chosen.base.dtype)])[source]


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: equality that tells -0 from 0 and takes NaN for itself."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _check_optimizer(optimizer: SparseAdamW, now: dict[str, Selected], further: dict[str, Pattern]) -> None:
    if not isinstance(optimizer, SparseAdamW):
        raise TypeError(f"optimizer must be a SparseAdamW or None, got {type(optimizer).__name__}")
    if optimizer.drop_in:
        raise ValueError("optimizer: the drop-in door (density=) keeps its selection; sparsify the model instead")
    leaves = {leaf for group in optimizer.param_groups for leaf in group["params"]}
    if not leaves & {chosen.values for chosen in now.values()}:
        raise ValueError("optimizer trains none of this model's selected entries")
    for name, pattern in further.items():
        if optimizer.group_for(pattern) is None:
            raise ValueError(f"patterns: {name!r} has no leaf yet, and with {len(optimizer.param_groups)} param groups "
                             "it is not known which it belongs to; sparsify it from the start, if need be with an "
                             "empty pattern")  # fmt: skip


def _move(chosen: Selected, pattern: Pattern, optimizer: SparseAdamW | None, leaving: str) -> int:
    """Exchange one weight's entries; how many stayed."""
    if pattern == chosen.pattern:
        return len(pattern)
    refresh_values(chosen)
    old, new = chosen.pattern.indices(), pattern.indices()
    source = _find(new, old)
    stays, leaves = source >= 0, _find(old, new) < 0
    now = chosen.weight.detach().reshape(-1)[new]
    values, base = now.to(torch.promote_types(now.dtype, torch.float32), copy=True), now.clone()
    values[stays] = chosen.values.detach()[source[stays]].to(values.dtype)
    base[stays] = chosen.base[source[stays]]

    left, left_base = _left(chosen)
    again = _find(new, left)
    base[again >= 0] = left_base[again[again >= 0]]
    outside = _find(left, new) < 0
    left, left_base = left[outside], left_base[outside]
    gone, gone_base = old[leaves], chosen.base[leaves]
    if leaving == "revert":
        _write(chosen, gone, gone_base)
    else:
        changed = bits(chosen.weight.detach().reshape(-1)[gone]) != bits(gone_base)
        left, left_base = torch.cat([left, gone[changed]]), torch.cat([left_base, gone_base[changed]])
    order = left.argsort()
    remembered = (left[order].cpu(), left_base[order].cpu()) if len(left) else None

    exchange_entries_(chosen, pattern, values, base, remembered)
    if optimizer is not None:
        optimizer.move_entries_(chosen.values, source)
    return int(stays.sum())


def _left(chosen: Selected) -> tuple[Tensor, Tensor]:
    """`chosen.left` beside the weight, possibly empty."""
    if chosen.left is None:
        return torch.zeros(0, dtype=torch.int64, device=chosen.base.device), chosen.base[:0]
    return chosen.left[0].to(chosen.base.device), chosen.left[1].to(chosen.base)


def _write(chosen: Selected, positions: Tensor, values: Tensor) -> None:
    """weight[positions] = values, in the same dtype, which moves bits."""
    with torch.no_grad():
        chosen.weight.view(-1)[positions] = values


def _find(wanted: Tensor, among: Tensor) -> Tensor:
    """int64: where each of `wanted` stands in `among` (both int64, without repetitions), -1 if it does not."""
    if len(among) == 0:
        return torch.full_like(wanted, -1)
    ascending, order = among.sort()
    place = torch.searchsorted(ascending, wanted).clamp(max=len(among) - 1)
    return torch.where(ascending[place] == wanted, order[place], -1)


def _empty(like: Pattern) -> Pattern:
    return Pattern.from_indices(like.tiles.new_zeros(0), like.shape, tile=like.tile)


def _insert(now: dict[str, Selected], further: dict[str, Pattern], optimizer: SparseAdamW) -> None:
    """Give the optimizer the new leaves, where the model's order has them: a resumed run numbers them so."""
    names = list(now)
    for name in further:
        after = {now[other].values for other in names[names.index(name) + 1 :]}
        optimizer.insert_leaf(now[name].values, name, after)
