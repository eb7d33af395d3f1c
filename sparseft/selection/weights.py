"""Which weights of a model may be selected."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from sparseft.layers import parameters as leaves_of


def eligible(
    model: nn.Module, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """The weights that may be selected, by name, in model order; tied weights once, under their first name.

    By default these are all floating-point parameters with two or more dimensions, frozen or not, except
    embeddings (and what is tied to one), the output head and parameters of normalisation layers.

    `include` and `exclude` are glob patterns (`*`, `?`, `[...]`) for parts of dotted names, matching whole
    components: "mlp", "q_proj" or "layers.1?.self_attn.*" stand anywhere in a name. Any name of a tied weight counts.
    A pattern in `include` keeps the default weights that it matches; one that matches no default weight means the
    others, so include=["embed_tokens", "mlp"] adds the embeddings to the MLPs.

    Raises:
        ValueError: a pattern matches nothing.
    """
    leaves = set(leaves_of(model))  # of a sparsified model: not weights themselves
    parameters = {
        name: p
        for name, p in model.named_parameters()
        if p.is_floating_point() and p.dim() > 0 and p.numel() > 0 and p not in leaves
    }
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)

    def matching(pattern: str) -> set[str]:
        found = {n for n, p in parameters.items() if any(_matches(alias, pattern) for alias in aliases[id(p)])}
        if not found:
            raise ValueError(f"pattern {pattern!r} matches no weight; names look like {list(parameters)[:3]}")
        return found

    left_out = _left_out(model)
    default = {name for name, p in parameters.items() if p.dim() > 1 and id(p) not in left_out}
    chosen = default
    if include is not None:
        chosen = set().union(*((found & default or found) for found in map(matching, _several(include))))
    if exclude is not None:
        chosen = chosen.difference(*map(matching, _several(exclude)))
    return {name: p for name, p in parameters.items() if name in chosen}


def vectors(model: nn.Module, exclude: str | Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The one-dimensional floating-point parameters, norms' scales and shifts and biases, by name, in model order.

    `exclude`: as in `eligible`.
    """
    leaves, left_out = set(leaves_of(model)), [] if exclude is None else _several(exclude)
    return {
        name: p
        for name, p in model.named_parameters()
        if p.is_floating_point()
        and p.dim() == 1
        and p.numel()
        and p not in leaves
        and not any(_matches(name, e) for e in left_out)
    }


def is_meant(model: nn.Module, weight: nn.Parameter, patterns: str | Sequence[str]) -> bool:
    """Whether any name of a weight (tied ones have several) matches one of the patterns of `include` or `exclude`."""
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
    return any(_matches(name, pattern) for name in names for pattern in _several(patterns))


def _left_out(model: nn.Module) -> set[int]:
    """The ids of embeddings, output head and normalisation parameters."""
    modules = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) or _is_norm(m)]
    get_head = getattr(model, "get_output_embeddings", None)  # transformers' models have it
    head = get_head() if callable(get_head) else None
    heads = [m for name, m in model.named_modules() if m is head or name.rpartition(".")[2] == "lm_head"]
    return {id(p) for module in modules + heads for p in module.parameters(recurse=False)}


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def _several(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)
