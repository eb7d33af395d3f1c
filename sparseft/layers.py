"""Layers whose weight gradient exists only at the selected entries.

`sparsify` swaps the class of the chosen `nn.Linear` (and GPT-2 `Conv1D`) modules in place: same object, same
`weight`, same state_dict. The weight stops requiring a gradient and always holds the current values, so the
forward pass is the plain dense one; a new leaf `values` (fp32, one value per selected entry, not in the
state_dict) takes its place for autograd, the optimizer, clipping and schedulers. Embeddings of which a few rows are
selected, tied output heads included, do the same, and RMSNorms that train whole. Any other selected parameter (3-D
experts, other tied weights, biases) keeps its dense gradient for the moment in which it is gathered.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparseft.attention import install, lean_attention, plain_attention
from sparseft.embeddings import MaskedEmbedding, trains_by_rows
from sparseft.gated import lean_mlps
from sparseft.lean import Lean, restore
from sparseft.loss import lean_loss, plain_loss
from sparseft.norms import LeanRMSNorm, lean_norms
from sparseft.ops import eager_masked_grad, scatter_delta_
from sparseft.pattern import TENSORS, Pattern, matrix_shape
from sparseft.saved import Saved, SharedInput, share_inputs


@dataclass(frozen=True)
class Selected:
    """One sparsified weight of a model.

    Attributes:
        name: the weight's qualified parameter name.
        weight: the full parameter; always holds the current values, rounded to its dtype.
        values: fp32 (fp64 for fp64 weights) leaf [k]: the master values, in the pattern's order.
        base: [k], the pretrained values bit for bit, in the weight's dtype.
        pattern: where the entries are.
        left: entries that do not train any more but keep their change (see `reselect`): their flat positions (int64,
            ascending) and their pretrained values, both on the CPU; None if there are none.
    """

    name: str
    weight: nn.Parameter
    values: nn.Parameter
    base: Tensor
    pattern: Pattern
    left: tuple[Tensor, Tensor] | None = None


class Entries(NamedTuple):
    """Where a layer's values are, as `masked_grad` takes it; `rows` or `cols` may point into saved columns instead."""

    rows: Tensor
    cols: Tensor
    tiles: Tensor
    local: Tensor
    tile: tuple[int, int]


class Fixed(NamedTuple):
    """What a sparse layer computes with and has no gradient of.

    One argument, whatever it holds: a node of autograd's graph takes memory for every tensor argument and every saved
    tensor, and the nodes lie in the holes that activations leave in glibc's heap, which no activation fits into then
    (SmolLM2-135M, 512 tokens, fp32: with seven tensors the peak over the loaded model was 4 % higher).

    Attributes:
        weight: [N, K], or [K, N] if `transposed`. `bias`: [N] or None.
        saved: None, or leads to [U, T]: the columns of the input that `entries` point into.
    """

    weight: Tensor
    bias: Tensor | None
    saved: Saved | None
    entries: Entries
    transposed: bool


class MaskedLinear(torch.autograd.Function):
    """y = x W^T + b with the gradient of W only at `values`' entries; `bias` is given where it trains, else `fixed`'s
    counts."""

    @staticmethod
    def forward(ctx, x, values, bias, fixed):
        weight, saved = fixed.weight, fixed.saved
        ctx.entries, ctx.transposed, ctx.compact = fixed.entries, fixed.transposed, saved is not None
        ctx.recompute = None if saved is None else saved.recompute
        kept = (x if values.requires_grad else None,) if saved is None else saved.tensors
        ctx.save_for_backward(weight, *kept)
        return F.linear(x, weight.T if fixed.transposed else weight, fixed.bias if bias is None else bias)

    @staticmethod
    @once_differentiable  # a second derivative would have to see W as a function of `values`
    def backward(ctx, grad_out):
        weight, *kept = ctx.saved_tensors
        need_x, need_values, need_bias, _ = ctx.needs_input_grad
        grad_x = grad_values = grad_bias = None
        if need_x:
            grad_x = grad_out @ (weight.T if ctx.transposed else weight)
        flat = grad_out.reshape(-1, grad_out.shape[-1])
        if need_values:
            x = kept[0] if ctx.recompute is None else ctx.recompute(*kept)
            operands = flat, x.T if ctx.compact else x.reshape(-1, x.shape[-1])
            left, right = reversed(operands) if ctx.transposed else operands
            traced = torch.compiler.is_compiling() or type(grad_out) is not Tensor
            compute = torch.ops.sparseft.masked_grad if traced else eager_masked_grad
            grad_values = compute(left, right, *ctx.entries)
        if need_bias:
            grad_bias = flat.sum(0)
        return grad_x, grad_values, grad_bias, None


class _Swapped(nn.Module):
    """What the sparse classes share; each sits in front of the plain class that it replaces."""

    plain: type[nn.Module]
    weight: nn.Parameter
    values: nn.Parameter
    rows: Tensor
    cols: Tensor
    tiles: Tensor
    local: Tensor
    _tile: tuple[int, int]

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if hasattr(self, "_sparseft"):  # a tied layer's leaf belongs to the embedding
            bind(self, "weight")  # a copied or unpickled leaf has lost its attributes
            install()  # in a new process nobody has

    def extra_repr(self) -> str:
        shape = self.weight.shape
        bias = f", bias={self.bias is not None}" if isinstance(self, _Sparse) else ""
        return f"weight={tuple(shape)}{bias}, trained={len(self.local)} of {shape.numel()}"


class _Sparse(_Swapped):
    """Layers that multiply."""

    transposed = False
    bias: nn.Parameter | None
    _input: SharedInput

    def forward(self, input: Tensor) -> Tensor:
        """The plain layer's output; under autocast in autocast's dtype, as the plain layer's."""
        x, weight, bias = input, self.weight, self.bias
        device = input.device.type
        # (there is none for the meta device)
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return self._linear(input, x, weight, bias)
        if input.dtype != torch.float64:  # autocast leaves fp64 alone
            dtype = torch.get_autocast_dtype(device)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return self._linear(input, x, weight, bias)

    def _linear(self, input: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        saved, rows, cols = None, self.rows, self.cols
        trains = torch.is_grad_enabled() and self.values.requires_grad
        if trains and not torch.compiler.is_compiling() and type(x) is Tensor and not x.is_meta:
            saved, order = self._input.save(self, input, x)
            rows, cols = (order, cols) if self.transposed else (rows, order)
        fixed = Fixed(weight, bias, saved, Entries(rows, cols, self.tiles, self.local, self._tile), self.transposed)
        trained_bias = bias if bias is not None and bias.requires_grad else None
        return MaskedLinear.apply(x, self.values, trained_bias, fixed)


class SparseLinear(_Sparse, nn.Linear):
    """`nn.Linear` of which only `values` train."""

    plain = nn.Linear


class SparseEmbedding(_Swapped, nn.Embedding):
    """`nn.Embedding` of which only `values` train."""

    plain = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """The plain embedding's output."""
        entries = self.rows, self.cols, self.tiles, self.local, self._tile
        return MaskedEmbedding.apply(input, self.values, self.weight, self.padding_idx, *entries)


def sparsify(model: nn.Module, patterns: dict[str, Pattern]) -> nn.Module:
    """Make only the entries in `patterns` trainable, in place.

    Args:
        model: any model; everything that is not selected is frozen (`requires_grad` False).
        patterns: qualified parameter name -> Pattern of that parameter's shape (as from `select`).

    Returns:
        The same model. Its `state_dict` has the same keys and shapes as before.

    Raises:
        TypeError: `patterns` is not a dict of Patterns.
        ValueError: no pattern, an unknown name, a shape that does not fit, a weight that is not contiguous or
            not floating point, a module with attributes of the same names as the new ones, or a model that is
            sparsified already. The model is unchanged then.
    """
    wrapped, model = model, plain(model)
    parameters_by_name = dict(model.named_parameters())
    _check(model, patterns, parameters_by_name)
    flags = {name: p.requires_grad for name, p in parameters_by_name.items()}
    prepared = _prepare(parameters_by_name, patterns)  # what can fail comes before the first change
    users = _users(model)
    model.requires_grad_(False)
    model.zero_grad()  # a dense gradient left from before has no further use
    lean_norms(model)
    lean_mlps(model)
    lean_attention(model)
    lean_loss(model)
    _attach_all(model, prepared, users)
    model._sparseft_flags = flags
    return wrapped


def sparsify_more(model: nn.Module, patterns: dict[str, Pattern]) -> None:
    """Make further weights of a sparsified model trainable, as `sparsify` does; `patterns` went through
    `check_pattern` and name weights that have no leaf yet."""
    model = plain(model)
    parameters_by_name = dict(model.named_parameters())
    _attach_all(model, _prepare(parameters_by_name, patterns), _users(model))


Users = dict[nn.Parameter, list[tuple[nn.Module, str]]]  # who holds a parameter, and its name there
Prepared = list[tuple[str, Pattern, nn.Parameter, Tensor]]  # name, pattern on the weight's device, leaf, base


def _prepare(known: dict[str, nn.Parameter], patterns: dict[str, Pattern]) -> Prepared:
    there = {name: pattern.to(known[name].device) for name, pattern in patterns.items()}
    return [(name, pattern, *leaf_of(known[name], pattern)) for name, pattern in there.items()]


def _attach_all(model: nn.Module, prepared: Prepared, users: Users) -> None:
    get_head = getattr(model, "get_output_embeddings", None)  # transformers' models have it
    head = getattr(get_head() if callable(get_head) else None, "weight", None)
    for name, pattern, values, base in prepared:
        module_name, _, leaf = name.rpartition(".")
        own_head = head is not None and head is not model.get_parameter(name)
        _attach(model.get_submodule(module_name), leaf, pattern, values, base, users, own_head)
    share_inputs(model)
    # DistributedDataParallel: patterns are equal on all ranks, and int16 cannot be broadcast
    ours = {id(tensor) for chosen in selected(model).values() for tensor in (*chosen.pattern.layout[:4], chosen.base)}
    ignored = [name for name, buffer in model.named_buffers(remove_duplicate=False) if id(buffer) in ours]
    model._ddp_params_and_buffers_to_ignore = ignored


def exchange_entries_(
    chosen: Selected, pattern: Pattern, values: Tensor, base: Tensor, left: tuple[Tensor, Tensor] | None
) -> None:
    """Other entries for a sparsified weight; its leaf stays the same object, but loses its gradient.

    Args:
        pattern, values, base: of the new entries, on the weight's device, dtypes as in `Selected`; the weight itself
            is not written.
        left: as in `Selected`.
    """
    module, name = chosen.values._sparseft_owner
    for holder in (module, *module._sparseft[name]["tied"]):
        for tensor in TENSORS:
            setattr(holder, _stem(name) + tensor, getattr(pattern, tensor))
        if isinstance(holder, _Swapped) and name == "weight":
            holder._tile = pattern.tile
    setattr(module, _stem(name) + "base", base)
    about = module._sparseft[name]
    about |= {"tile": pattern.tile, "left": left}
    if isinstance(module, LeanRMSNorm) and not about["gathers"] and not _is_all(pattern):
        _let_gather(module, name)
        bind(module, name)
    leaf = chosen.values
    leaf.grad = None
    if leaf.shape != values.shape:
        # a loss that is still referenced keeps autograd's node for the leaf alive, and with it the old shape; data
        # of another dtype make autograd forget it
        other = torch.float32 if leaf.dtype == torch.float64 else torch.float64
        leaf.data = torch.empty(0, dtype=other, device=values.device)
    leaf.data = values


def keep_left_(chosen: Selected, left: tuple[Tensor, Tensor] | None) -> None:
    """Note which entries of a sparsified weight do not train any more but keep their change (as in `Selected`)."""
    module, name = chosen.values._sparseft_owner
    module._sparseft[name]["left"] = left


@contextmanager
def computing_densely(model: nn.Module) -> Iterator[None]:
    """Inside, weights can get dense gradients: sparse layers compute as plain ones, and no gradient is gathered."""
    selected(model)  # mends what a copy lost
    sparse = [(m, type(m)) for m in plain(model).modules() if isinstance(m, _Swapped | Lean)]
    gathers = [hook for p in model.parameters() for hook in (p._post_accumulate_grad_hooks or {}).values()
               if isinstance(hook, _Gather)]  # fmt: skip
    try:
        for module, _ in sparse:
            module.__class__ = module._sparseft_plain if isinstance(module, Lean) else module.plain
        for gather in gathers:
            gather.suspended = True
        yield
    finally:
        for module, own_class in sparse:
            module.__class__ = own_class
        for gather in gathers:
            gather.suspended = False


def densify(model: nn.Module) -> nn.Module:
    """Back to plain layers, in place; weights keep their current values, `requires_grad` is as before `sparsify`."""
    wrapped, model = model, plain(model)
    for module, name, _ in list(_walk(model)):
        chosen = _describe(module, name)
        about = module._sparseft.pop(name)
        for handle in about["handles"]:
            handle.remove()
        for key in _gather_hooks(chosen.weight):
            del chosen.weight._post_accumulate_grad_hooks[key]
        del chosen.values._sparseft_owner  # an optimizer that still holds the leaf has nothing to write to
        stem = _stem(name)
        for attribute in (*TENSORS, "base", "values"):
            delattr(module, stem + attribute)
        if not module._sparseft:
            del module._sparseft
        if isinstance(module, _Swapped):
            _unswap(module)
        for head in about["tied"]:
            for attribute in (*TENSORS, "values"):
                delattr(head, attribute)
            _unswap(head)
    for module in model.modules():
        if isinstance(module, Lean):
            restore(module)
    plain_attention(model)
    plain_loss(model)
    model.__dict__.pop("_ddp_params_and_buffers_to_ignore", None)
    for name, flag in model.__dict__.pop("_sparseft_flags", {}).items():
        model.get_parameter(name).requires_grad_(flag)
    return wrapped


def _unswap(module: _Swapped) -> None:
    module.__class__ = module.plain
    for attribute in ("_tile", "_input"):
        module.__dict__.pop(attribute, None)


def plain(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s wrapper, whose parameters have their own names."""
    return getattr(model, "_orig_mod", model)


def selected(model: nn.Module) -> dict[str, Selected]:
    """Every sparsified weight of the model, by parameter name, in the model's order; empty for a plain model."""
    return {qualified: _describe(module, name, qualified) for module, name, qualified in _walk(model)}


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable leaves, for any torch optimizer: after its step the values are written to the weights."""
    return [chosen.values for chosen in selected(model).values()]


def write_values_(model: nn.Module) -> None:
    """Write every leaf's values into its weight, rounded to the weight's dtype."""
    for module, name, _ in _walk(model):
        _write(module, name)


def bind(module: nn.Module, name: str) -> None:
    """Tie the leaf of `module`'s parameter `name` to its weight (again after a copy: it loses attributes and hooks)."""
    weight, values = getattr(module, name), getattr(module, _stem(name) + "values")
    values._sparseft_owner = (module, name)
    if module._sparseft[name]["gathers"] and not _gather_hooks(weight):
        weight.register_post_accumulate_grad_hook(_Gather(module, name))


def gather_grad_(chosen: Selected) -> None:
    """Move the selected entries of the weight's dense gradient to the leaf's gradient, and free the dense one."""
    if chosen.weight.grad.is_sparse:
        raise TypeError("sparse gradients are not supported: give the embedding sparse=False")
    gathered = chosen.pattern.gather(chosen.weight.grad).to(chosen.values.dtype)
    chosen.weight.grad = None
    chosen.values.grad = gathered if chosen.values.grad is None else chosen.values.grad.add_(gathered)


def refresh_values(chosen: Selected) -> None:
    """Take the values from a weight that was written; a finer master value that rounds to what it holds stays."""
    now, values = chosen.pattern.gather(chosen.weight.detach()), chosen.values.data
    values.copy_(torch.where(values.to(now.dtype) == now, values, now.to(values.dtype)))


def leaf_of(weight: Tensor, pattern: Pattern) -> tuple[nn.Parameter, Tensor]:
    """A new leaf with a weight's selected values, and these values in the weight's dtype."""
    base = pattern.gather(weight.detach())
    return nn.Parameter(base.to(torch.promote_types(base.dtype, torch.float32), copy=True)), base


def owner(leaf: nn.Parameter) -> Selected | None:
    """The weight that a leaf belongs to (without its `name`), None for any other parameter."""
    where = getattr(leaf, "_sparseft_owner", None)
    return None if where is None else _describe(*where)


def _walk(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, parameter name, qualified name) of every sparsified weight; mends what a copy lost."""
    for prefix, module in plain(model).named_modules():
        for name in getattr(module, "_sparseft", ()):
            bind(module, name)
            yield module, name, f"{prefix}.{name}" if prefix else name


def _describe(module: nn.Module, name: str, qualified: str = "") -> Selected:
    stem, weight = _stem(name), getattr(module, name)
    rows, cols, tiles, local = (getattr(module, stem + tensor) for tensor in TENSORS)
    pattern = Pattern(matrix_shape(weight.shape), module._sparseft[name]["tile"], rows, cols, tiles, local)
    values, base = getattr(module, stem + "values"), getattr(module, stem + "base")
    return Selected(qualified, weight, values, base, pattern, module._sparseft[name]["left"])


def _stem(name: str) -> str:
    """Prefix of the attributes that belong to parameter `name` of a module."""
    return "" if name == "weight" else f"{name}_"


def _users(model: nn.Module) -> Users:
    """The modules that hold each parameter, and its name there (tied weights: several)."""
    users: Users = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(parameter, []).append((module, name))
    return users


def _check(model: nn.Module, patterns: dict[str, Pattern], known: dict[str, nn.Parameter]) -> None:
    if not isinstance(patterns, dict):
        raise TypeError(f"patterns must be a dict of parameter name -> Pattern, got {type(patterns).__name__}")
    if not patterns:
        raise ValueError("patterns must name at least one weight, got an empty dict")
    if any(True for _ in _walk(model)):
        raise ValueError("model is sparsified already; call densify(model) first")
    for name, pattern in patterns.items():
        check_pattern(model, name, pattern, known)


def check_pattern(model: nn.Module, name: str, pattern: Pattern, known: dict[str, nn.Parameter]) -> None:
    """Whether the model's parameter `name` can train at these entries, and gets no leaf in the way of another
    attribute. Raises TypeError, ValueError: as `sparsify`."""
    if name not in known:
        raise ValueError(f"patterns: the model has no parameter {name!r} (tied weights go by their first name)")
    if not isinstance(pattern, Pattern):
        raise TypeError(f"patterns[{name!r}] must be a Pattern, got {type(pattern).__name__}")
    weight = known[name]
    try:
        pattern.validate()
    except ValueError as error:
        raise ValueError(f"patterns[{name!r}]: {error}") from error
    if weight.is_meta:
        raise ValueError(f"patterns[{name!r}]: the weight is on the meta device, it has no values yet")
    if not weight.is_floating_point() or not weight.is_contiguous():
        raise ValueError(f"patterns[{name!r}]: the weight must be floating point and contiguous, "
                         f"got {weight.dtype}, strides {weight.stride()}")  # fmt: skip
    if matrix_shape(weight.shape) != pattern.shape:
        raise ValueError(f"patterns[{name!r}] is for shape {pattern.shape}, got a weight of {tuple(weight.shape)}")
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf in getattr(module, "_sparseft", ()):
        return  # it has its leaf already
    for attribute in (*TENSORS, "base", "values"):
        if hasattr(module, _stem(leaf) + attribute):
            raise ValueError(f"patterns[{name!r}]: its module has an attribute {_stem(leaf) + attribute!r} already")


def _attach(
    module: nn.Module, name: str, pattern: Pattern, values: nn.Parameter, base: Tensor, users: Users, own_head: bool
) -> None:
    weight, stem = getattr(module, name), _stem(name)
    for tensor in TENSORS:
        module.register_buffer(stem + tensor, getattr(pattern, tensor), persistent=False)
    module.register_buffer(stem + "base", base, persistent=False)
    module.register_parameter(stem + "values", values)
    if not hasattr(module, "_sparseft"):
        module._sparseft = {}
    others = [user for user in users[weight] if user != (module, name)]
    sparse_class, tied = _sparse_class(module, name, pattern, others, own_head)
    if sparse_class is not None:
        _swap(module, sparse_class, pattern.tile)
    handles = [  # partials of plain functions: a sparsified model can be pickled
        module.register_state_dict_post_hook(partial(_leave_out, stem + "values")),
        module.register_load_state_dict_pre_hook(partial(_not_missing, stem + "values")),
        module.register_load_state_dict_post_hook(partial(_refresh, name)),
    ]
    for head in tied:
        handles += _attach_tied(head, pattern, values)
    about = {"tile": pattern.tile, "left": None, "gathers": False, "handles": handles, "tied": tied}
    module._sparseft[name] = about
    if sparse_class is None and not (isinstance(module, LeanRMSNorm) and not others and _is_all(pattern)):
        _let_gather(module, name)
    bind(module, name)
    _install_write_back()


def _let_gather(module: nn.Module, name: str) -> None:
    """Let a weight have a dense gradient, of which a hook moves the entries to the leaf."""
    about = module._sparseft[name]
    about["gathers"] = True
    # a copy's parameters have lost their hooks, its modules have not
    about["handles"].append(module.register_forward_pre_hook(partial(_bind_again, name)))
    getattr(module, name).requires_grad_(True)


def _attach_tied(head: nn.Module, pattern: Pattern, values: nn.Parameter) -> list[Any]:
    """Let a linear layer that has an embedding's weight share its leaf and pattern; the handles of its hooks."""
    for tensor in TENSORS:
        head.register_buffer(tensor, getattr(pattern, tensor), persistent=False)
    head.register_parameter("values", values)
    _swap(head, SparseLinear, pattern.tile)
    return [
        head.register_state_dict_post_hook(partial(_leave_out, "values")),
        head.register_load_state_dict_pre_hook(partial(_not_missing, "values")),
        head.register_load_state_dict_post_hook(_refresh_owner),  # its name may be the only one in a state_dict
    ]


def _swap(module: nn.Module, sparse_class: type, tile: tuple[int, int]) -> None:
    module.__class__, module._tile = sparse_class, tile
    if issubclass(sparse_class, _Sparse):
        module._input = SharedInput([module])


def _sparse_class(
    module: nn.Module, name: str, pattern: Pattern, others: list[tuple[nn.Module, str]], own_head: bool
) -> tuple[type | None, list[nn.Module]]:
    """The sparse counterpart of exactly this class, None if it has none (subclasses may compute otherwise); and the
    linear layers that share the weight of an embedding. `own_head`: the model's output head has another weight."""
    if name != "weight":
        return None, []
    heads = [other for other, its_name in others if type(other) is nn.Linear and its_name == "weight"]
    # an embedding whose weight is the head's too, but no layer's, would miss that part of its gradient
    known = bool(heads) or own_head
    if known and trains_by_rows(module, pattern) and len(heads) == len(others) and not any(map(_has_attributes, heads)):
        return SparseEmbedding, heads
    if others:
        return None, []
    if type(module) is nn.Linear:
        return SparseLinear, []
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        from sparseft.conv1d import SparseConv1D  # here: `import sparseft` does not need transformers

        return SparseConv1D, []
    return None, []


def _is_all(pattern: Pattern) -> bool:
    """Whether these are all entries of a weight, in its order."""
    number = pattern.shape[0] * pattern.shape[1]
    return len(pattern) == number and torch.equal(pattern.indices(), torch.arange(number, device=pattern.local.device))


def _has_attributes(module: nn.Module) -> bool:
    """Whether attributes of a sparse layer's names are taken."""
    return any(hasattr(module, attribute) for attribute in (*TENSORS, "values"))


class _Gather:
    """Hook on a dense parameter: moves its gradient's selected entries to the leaf and frees the rest."""

    suspended = False  # inside `computing_densely`

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name

    def __call__(self, weight: nn.Parameter) -> None:
        if not self.suspended:
            gather_grad_(_describe(self.module, self.name))


def _gather_hooks(weight: nn.Parameter) -> list[int]:
    """Keys of the gather hooks that are installed on a parameter (a copied parameter has none)."""
    return [key for key, hook in (weight._post_accumulate_grad_hooks or {}).items() if isinstance(hook, _Gather)]


def _leave_out(leaf: str, module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """The leaf is derived from the weight: it has no place in a plain model's state_dict."""
    state_dict.pop(prefix + leaf, None)


def _not_missing(leaf: str, module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """... and a plain model's state_dict lacks nothing."""
    state_dict[prefix + leaf] = getattr(module, leaf)  # itself: with assign=True it stays the optimizer's leaf


def _bind_again(name: str, module: nn.Module, inputs: tuple) -> None:
    if not torch.compiler.is_compiling():
        bind(module, name)


def _refresh(name: str, module: nn.Module, incompatible_keys: object) -> None:
    """Loaded weights become the leaf's values."""
    bind(module, name)  # assign=True brings a new weight, without hooks
    refresh_values(_describe(module, name))


def _refresh_owner(head: nn.Module, incompatible_keys: object) -> None:
    chosen = owner(head.values)
    if chosen is not None and chosen.weight is head.weight:
        refresh_values(chosen)


def _write(module: nn.Module, name: str) -> None:
    chosen = _describe(module, name)
    with torch.no_grad():
        scatter_delta_(chosen.weight, chosen.values, chosen.pattern, "copy")


_write_back = None


def _install_write_back() -> None:
    """From the first `sparsify` on, every torch optimizer's step is followed by the write into the weights."""
    global _write_back
    if _write_back is None:
        _write_back = register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    if getattr(optimizer, "writes_weights", False):
        return
    for group in optimizer.param_groups:
        for leaf in group["params"]:
            where = getattr(leaf, "_sparseft_owner", None)
            if where is not None:
                _write(*where)
