"""Learning rates by density: the more of a row trains, the smaller the steps of its entries."""

from typing import Any

from torch import Tensor, nn

from sparseft.layers import selected

NOMINAL = 0.01  # density at which a rate is meant as it is given
DENSITY_POWER = 0.75  # from the best rates at densities 0.01 and 1 (docs/quality.md, H11)


def param_groups(model: nn.Module, lr: float | Tensor, density_power: float = DENSITY_POWER) -> list[dict[str, Any]]:
    """The leaves of a sparsified model as param groups of named parameters, for SparseAdamW or another optimizer.

    A step of Adam moves every entry about as far as any other, and an output adds up the changes of its row: with more
    of them the same rate changes more. So the rate is `lr * (0.01 / density) ** density_power`, where the density is
    that of all weights that train in scattered entries together, and 1 for those of which whole rows train (norms,
    biases, the output embedding's rows of target tokens): 0.03 lr.

    Args:
        model: after `sparsify`.
        lr: rate for one per cent of the entries.
        density_power: 0 gives all leaves the same rate.

    Returns:
        One group for each of the two kinds that the model has, the scattered entries first.

    Raises:
        ValueError: the model has no selected entries, or `lr` or `density_power` is no number >= 0.
    """
    check_rate(lr)
    if not density_power >= 0:
        raise ValueError(f"density_power must be >= 0, got {density_power}")
    chosen = selected(model)
    if not chosen:
        raise ValueError("params: this model has no selected entries; sparsify it first, or give density=")
    scattered = {name: one for name, one in chosen.items() if not one.pattern.whole_rows}
    whole = {name: one for name, one in chosen.items() if one.pattern.whole_rows}
    entries = sum(len(one.pattern) for one in scattered.values())
    density = entries / sum(one.weight.numel() for one in scattered.values()) if entries else NOMINAL
    groups = []
    for leaves, d in ((scattered, density), (whole, 1.0)):
        factor = (NOMINAL / d) ** density_power
        named = [(name, one.values) for name, one in leaves.items()]
        groups.append({"params": named, "lr": lr if factor == 1 else factor * lr})
    return [group for group in groups if group["params"]]


def check_rate(lr: float | Tensor) -> None:
    """Raises ValueError unless it is one number >= 0."""
    if (isinstance(lr, Tensor) and lr.numel() != 1) or not float(lr) >= 0:
        raise ValueError(f"lr must be one number >= 0, got {lr}")
