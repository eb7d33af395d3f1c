"""Which weights share a budget, how many entries it has, and what kind of budget it is."""

from collections.abc import Hashable, Iterable, Mapping

from torch import Tensor

from sparseft.selection.budget import LINES, Allocation, Budget, LineBudget
from sparseft.selection.rows import RowBudget
from sparseft.selection.scoring import AnyBudget
from sparseft.selection.structured import BlockBudget, ChannelBudget, Couple, SubnetBudget


def groups_of(weights: Iterable[str], allocation: Allocation, pairs: list[Couple]) -> list[list[str]]:
    """The weights that share a budget, in model order; of a couple the consumer's budget is the producer's too."""
    partner = {pair.producer: pair.consumer for pair in pairs}
    groups: dict[Hashable, list[str]] = {}
    for name in weights:
        groups.setdefault(allocation.budget(partner.get(name, name)), []).append(name)
    return list(groups.values())


def shares_of(weights: Mapping[str, Tensor], groups: list[list[str]], density: float, k: int | None) -> list[int]:
    """How many entries each group gets: its density, or of k a share by its size, together exactly k.

    Raises:
        ValueError: that is no entry, or there are fewer than k.
    """
    sizes = [sum(weights[name].numel() for name in names) for names in groups]
    if k is None:
        shares = [round(density * size) for size in sizes]
        if not any(shares):
            raise ValueError(f"density {density} selects no entry: the largest budget has {max(sizes)} entries")
        return shares
    if k > sum(sizes):
        raise ValueError(f"k must be at most {sum(sizes)}, the number of eligible entries, got {k}")
    shares = [k * size // sum(sizes) for size in sizes]
    lost = sorted(range(len(sizes)), key=lambda i: -(k * sizes[i] % sum(sizes)))  # stable: ties to the earlier
    for i in lost[: k - sum(shares)]:
        shares[i] += 1
    return shares


def budget_of(
    kind: type[Budget], structure: str, members: dict[str, tuple[int, ...]], k: int, tile: tuple[int, int],
    tile_budget: float, allocation: Allocation, pairs: list[Couple],
) -> AnyBudget:  # fmt: skip
    """The budget of one group for a structure; `kind` is the one for single entries that wait for each other."""
    if structure == "entries" and allocation.rows:
        name = _only(list(members))
        return RowBudget(name, members[name], k, tile, tile_budget)
    if structure == "entries":
        waits = tile_budget < 1 and len(members) > 1
        return (kind if waits else Budget)(members, k, tile, tile_budget, allocation.floor)
    if structure == "blocks":
        return BlockBudget(members, k, tile)
    if structure == "subnet":
        return SubnetBudget(members, k, tile)
    if structure == "channels":
        return ChannelBudget(members, k, tile, [pair for pair in pairs if pair.producer in members])
    return LineBudget(members, k, tile, LINES[structure])


def _only(names: list[str]) -> str:
    if len(names) > 1:
        raise ValueError(f"allocation: with rows every weight has its own budget, {names[0]} and {names[1]} share one")
    return names[0]
