"""The four operations as torch custom ops: schemas, checks, fake kernels, autograd. What they mean: `reference.py`.

`torch.ops.sparseft.*` take the tensors of a `Layout`; the functions at the end of this page take a `Pattern`,
check their arguments and keep autograd's version counters right. `backend.py` chooses who computes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparseft import backend
from sparseft.pattern import Layout, Pattern, matrix_shape
from sparseft.reference import COL0, ENTRY0, ENTRY1, ROW0

# (an argument named "mode" would collide with one inside torch.compile: hence write_mode)
_ENTRIES = "Tensor rows, Tensor cols, Tensor tiles, Tensor local, SymInt[2] tile"
_OPERAND = "Tensor grad_out, Tensor input, Tensor? rows, Tensor? cols, Tensor tiles, Tensor local, SymInt[2] tile"
SCHEMAS = {
    "masked_grad_": f"(Tensor(a!) out, {_OPERAND}, bool accumulate) -> ()",
    "scatter_delta_": f"(Tensor(a!)[] weights, Tensor(b!) values, {_ENTRIES}, str write_mode, float alpha) -> ()",
    "sparse_adamw_": "(Tensor(a!)[] weights, Tensor(b!) values, Tensor grad, Tensor(c!) exp_avg, "
    f"Tensor(d!) exp_avg_sq, Tensor? base, Tensor step, Tensor? born, {_ENTRIES}, Tensor lr, float beta1, "
    "float beta2, float eps, float weight_decay, bool maximize, Tensor? grad_scale, Tensor? found_inf, "
    "SymInt? seed=None) -> ()",
    "select_topk": "(Tensor[] scores, Tensor[] others, SymInt k, str score) -> Tensor",
}
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

_lib = torch.library.Library("sparseft", "DEF")
_compiled = [torch.library.Library(f"sparseft_{name}", "DEF") for name in ("cpu", "cuda")]


def _serve(name: str):
    """The kernel of `torch.ops.sparseft.<name>`: hands the call to the implementation chosen now.

    Weights of any rank are seen as matrices: the compiled kernels would do that themselves, the others do not.
    """

    def call(first, *rest):
        if name in ("scatter_delta_", "sparse_adamw_"):
            first = [_matrix(w) for w in first]
        device = first[0].device if isinstance(first, list) else first.device
        return backend.kernel(name, device.type)(first, *rest)

    return call


def _matrix(weight: Tensor) -> Tensor:
    _expect_contiguous("weight", weight)
    return weight if weight.dim() == 2 else weight.view(matrix_shape(weight.shape))


for _name, _schema in SCHEMAS.items():
    _lib.define(_name + _schema, tags=_TAGS)
    _lib.impl(_name, _serve(_name), "CompositeExplicitAutograd")
    for _library in _compiled:  # csrc/ registers its kernels here, under the same schemas
        _library.define(_name + _schema.replace("SymInt", "int"))

for _library, _integer in ((_lib, "SymInt"), (_compiled[0], "int")):
    _library.define(f"masked_grad({_OPERAND.replace('SymInt', _integer)}) -> Tensor", tags=_TAGS)
for _name in (*SCHEMAS, "masked_grad"):  # their callers need no gradient: past autograd without a stop
    _compiled[0].impl(_name, torch.library.fallthrough_kernel, "AutogradCPU")


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def eager_masked_grad(grad_out, input, rows, cols, tiles, local, tile):
    """What `torch.ops.sparseft.masked_grad` computes, without its way through Python and without autograd."""
    if backend.runs_on_cpu_library(grad_out):
        return torch.ops.sparseft_cpu.masked_grad.default(grad_out, input, rows, cols, tiles, local, tile)
    out = grad_out.new_zeros(local.shape, dtype=_accumulator(grad_out.dtype))
    kernel = backend.kernel("masked_grad_", grad_out.device.type)
    kernel(out, grad_out, input, rows, cols, tiles, local, tile, False)
    return out


_lib.impl("masked_grad", eager_masked_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("sparseft::masked_grad")
def _(grad_out, input, rows, cols, tiles, local, tile):
    torch._check(grad_out.dim() == 2 and input.dim() == 2, lambda: "grad_out and input must be [T, N] and [T, K]")
    torch._check(grad_out.shape[0] == input.shape[0], lambda: "grad_out and input must share their first dimension")
    return grad_out.new_empty(local.shape, dtype=_accumulator(grad_out.dtype))


@torch.library.register_fake("sparseft::masked_grad_")
def _(out, grad_out, input, rows, cols, tiles, local, tile, accumulate):
    torch._check(out.shape == local.shape, lambda: "out must be [k], one value per entry")


@torch.library.register_fake("sparseft::scatter_delta_")
def _(weights, values, rows, cols, tiles, local, tile, write_mode, alpha):
    torch._check(values.shape == local.shape, lambda: "values must be [k], one value per entry")


@torch.library.register_fake("sparseft::sparse_adamw_")
def _(weights, values, grad, exp_avg, exp_avg_sq, base, step, born, rows, cols, tiles, local, tile,
      lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf, seed=None):  # fmt: skip
    for state in (values, grad, exp_avg, exp_avg_sq):
        torch._check(state.shape == local.shape, lambda: "values, grad and both moments must be [k]")


@torch.library.register_fake("sparseft::select_topk")
def _(scores, others, k, score):
    return scores[0].new_empty([k], dtype=torch.int64)


def _masked_grad_setup(ctx, inputs, output):
    grad_out, input, rows, cols, tiles, local, tile = inputs
    ctx.save_for_backward(grad_out, input, rows, cols, tiles, local)
    ctx.tile = tile


def _masked_grad_backward(ctx, grad):
    """With the sparse matrix S[row(s), col(s)] = grad[s]: d grad_out = input S^T, d input = grad_out S."""
    grad_out, input, rows, cols, tiles, local = ctx.saved_tensors
    row, col, listed = _places(rows, cols, tiles, local, ctx.tile)
    dense = grad.new_zeros(grad_out.shape[1], input.shape[1])
    dense = dense.index_put((row, col), grad * listed, accumulate=True).to(grad_out.dtype)
    d_grad_out = input @ dense.T if ctx.needs_input_grad[0] else None
    d_input = grad_out @ dense if ctx.needs_input_grad[1] else None
    return d_grad_out, d_input, None, None, None, None, None


def _places(rows, cols, tiles, local, tile):
    """Row and column of all k entries and whether an (ascending) worklist has them, in shapes that are known."""
    entry = torch.arange(local.shape[0], device=local.device)
    tiles = torch.cat([tiles, tiles.new_zeros(1, tiles.shape[1])])  # for the entries behind the last tile
    owner = torch.searchsorted(tiles[:-1, ENTRY1].contiguous(), entry, right=True)
    mine = tiles[owner]
    listed = (entry >= mine[:, ENTRY0]) & (entry < mine[:, ENTRY1])
    position = local.long() & 0xFFFF
    row = torch.where(listed, mine[:, ROW0] + position // tile[1], 0)
    col = torch.where(listed, mine[:, COL0] + position % tile[1], 0)
    return row if rows is None else rows[row].long(), col if cols is None else cols[col].long(), listed


torch.library.register_autograd("sparseft::masked_grad", _masked_grad_backward, setup_context=_masked_grad_setup)


# ---- the public functions -------------------------------------------------------------------------------------


def masked_grad(grad_out: Tensor, input: Tensor, pattern: Pattern, out: Tensor | None = None) -> Tensor:
    """The weight gradient of y = x W^T at the selected entries only: sum_t grad_out[t, row] * input[t, col].

    Args:
        grad_out: [..., N], fp32, bf16, fp16 or fp64. `input`: [..., K], same dtype and leading dimensions.
        pattern: the entries of W [N, K].
        out: [k]; the gradient is added to it in place (gradient accumulation). Not differentiable then.

    Returns:
        [k], fp32 (fp64 for fp64 operands), in the pattern's order. Differentiable twice; the double backward
        holds one dense [N, K] matrix.
    """
    out_features, in_features = pattern.shape
    leading = grad_out.shape[:-1]
    if grad_out.shape != (*leading, out_features):
        raise _unfit("grad_out", f"[..., {out_features}]", tuple(grad_out.shape))
    if input.shape != (*leading, in_features):
        fits = input.shape[-1:] == (in_features,)
        expected = f"leading dimensions {tuple(leading)}" if fits else f"[..., {in_features}]"
        raise _unfit("input", expected, tuple(input.shape))

    def check():
        _expect_dtype("input", input, (grad_out.dtype,))
        _expect_dtype("grad_out", grad_out, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
        _expect_device("input", input, grad_out)
        _expect_layout(pattern.layout, grad_out)
        if out is not None:
            _expect_vector("out", out, len(pattern), (_accumulator(grad_out.dtype),), grad_out)

    if len(leading) != 1:
        grad_out, input = grad_out.reshape(-1, out_features), input.reshape(-1, in_features)
    operands = (grad_out, input, *pattern.layout)
    if out is None:
        if torch.is_grad_enabled() and (grad_out.requires_grad or input.requires_grad):
            check()
            return torch.ops.sparseft.masked_grad(*operands)
        return _call("masked_grad", grad_out, operands, check)
    _refuse_autograd("masked_grad(out=)", operands[:2], out)
    _call("masked_grad_", grad_out, (out, *operands, True), check)
    _bump(out)
    return out


def scatter_delta_(
    weight: Tensor | Sequence[Tensor],
    values: Tensor,
    pattern: Pattern | Layout,
    mode: str = "add",
    alpha: float = 1.0,
) -> None:
    """Write values into the selected entries of one weight, or of all weights of a packed layout in one launch.

    `add`: weight += alpha * values in at least fp32, then rounded. `copy`: weight = values, rounded.
    `swap`: weight and values change places, bit for bit; a second swap is the exact undo.

    Args:
        weight: contiguous, or one per layer of the layout; fp32, bf16, fp16 or fp64, one dtype. Any rank: seen as [-1,
            last dimension], 1-D as one row.
        values: contiguous [k]; fp32 or the weights' dtype (`swap`: the weights' dtype).

    Raises:
        ValueError, TypeError: an argument does not fit; nothing was written.
        RuntimeError: autograd would need a gradient through the write (call it under `torch.no_grad()`).
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    if mode not in ("add", "copy", "swap"):
        raise ValueError(f"mode must be 'add', 'copy' or 'swap', got {mode!r}")
    layout = _layout_for(weights, pattern)

    def check():
        _expect_weights(weights)
        _expect_layout(layout, weights[0])
        dtypes = (weights[0].dtype,) if mode == "swap" else (weights[0].dtype, torch.float32)
        _expect_vector("values", values, len(layout.local), dtypes, weights[0])

    _refuse_autograd("scatter_delta_", weights, values)
    _call("scatter_delta_", weights[0], (weights, values, *layout, mode, float(alpha)), check)
    _bump(*weights, *([values] if mode == "swap" else []))


def sparse_adamw_(
    weights: Tensor | Sequence[Tensor],
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    layout: Pattern | Layout,
    *,
    step: Tensor,
    lr: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    base: Tensor | None = None,
    born: Tensor | None = None,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """One AdamW step over the selected entries of all layers, and the write into their weights.

    Args:
        weights: contiguous, one dtype, any rank (as in `scatter_delta_`); layer i of the layout is `weights[i]`.
        values, grad, exp_avg, exp_avg_sq: contiguous [k], fp32 (fp64 for fp64 weights); `values` are the masters
            (but see `seed`).
        layout: from `pack` (of one weight, its Pattern); a subset of its tiles updates only those.
        step: int64 [layers], each layer's step count including this one.
        lr: 0-dim fp32 or fp64 tensor, on the weights' device or the CPU (then read by the host).
        base: [k] in the weights' dtype; weight decay pulls towards it. None: towards zero.
        born: int32 [k], the layer's step count before the entry's first step; bias correction uses its own age.
        grad_scale: 0-dim fp32, multiplies the gradient. `found_inf`: 0-dim fp32; nonzero skips everything.
        seed: for bf16 and fp16 weights without masters: `values` have the weights' dtype, and results are rounded
            stochastically, with random bits that depend on (seed, step, entry) only.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing was written.
        RuntimeError: autograd would need a gradient through the write (call it under `torch.no_grad()`).
    """
    weights = [weights] if isinstance(weights, Tensor) else list(weights)
    layout = _layout_for(weights, layout)

    def check():
        _expect_weights(weights)
        _expect_layout(layout, weights[0])
        k, dtype, state = len(layout.local), weights[0].dtype, _accumulator(weights[0].dtype)
        if seed is not None and dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(f"with a seed weights must be torch.bfloat16 or torch.float16, got {dtype}")
        _expect_vector("values", values, k, (state if seed is None else dtype,), weights[0])
        for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            _expect_vector(name, tensor, k, (state,), weights[0])
        if base is not None:
            _expect_vector("base", base, k, (dtype,), weights[0])
        if born is not None:
            _expect_vector("born", born, k, (torch.int32,), weights[0])
        _expect_vector("step", step, len(weights), (torch.int64,), weights[0])
        _expect_number("lr", lr, (torch.float32, torch.float64), None if lr.device.type == "cpu" else weights[0])
        for name, number in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            if number is not None:
                _expect_number(name, number, (torch.float32,), weights[0])

    _refuse_autograd("sparse_adamw_", weights, values, exp_avg, exp_avg_sq)
    _call("sparse_adamw_", weights[0], (
        weights, values, grad, exp_avg, exp_avg_sq, base, step, born, *layout,
        lr, betas[0], betas[1], eps, weight_decay, maximize, grad_scale, found_inf, seed,
    ), check)  # fmt: skip
    _bump(*weights, values, exp_avg, exp_avg_sq)


def select_topk(
    scores: Tensor | Sequence[Tensor], k: int, score: str = "abs", others: Sequence[Tensor] | Tensor = ()
) -> Tensor:
    """The exact k most important of n scores, over one tensor or over several as if they were joined.

    Args:
        scores: any shape, contiguous; fp32, bf16, fp16 or fp64. No NaN (its rank is unspecified).
        k: 0 <= k <= n.
        score: `abs` ranks by |scores| (the order of squares too, without their underflow), `product` by
            |scores * others|, computed in fp32 (fp64 for fp64).
        others: for `product`, one tensor per score tensor, of its shape.

    Returns:
        int64 [k], ascending positions in the joined flat scores; of equal scores the lower positions.
    """
    several = [scores] if isinstance(scores, Tensor) else list(scores)
    second = [others] if isinstance(others, Tensor) else list(others)
    if not several:
        raise ValueError("scores must hold at least one tensor, got none")
    if score not in ("abs", "product"):
        raise ValueError(f"score must be 'abs' or 'product', got {score!r}")
    n = sum(s.numel() for s in several)
    if not 0 <= k <= n:
        raise ValueError(f"k must lie in [0, {n}], got {k}")
    expected = [tuple(s.shape) for s in several] if score == "product" else []
    shapes = [tuple(o.shape) for o in second]
    if shapes != expected:
        raise _unfit("others", f"shapes {expected}", shapes)
    for name, tensors in (("scores", several), ("others", second)):
        for tensor in tensors:
            _expect_dtype(name, tensor, (several[0].dtype,))
            _expect_contiguous(name, tensor)
            _expect_device(name, tensor, several[0])
    return torch.ops.sparseft.select_topk(several, second, k, score)


def _call(name: str, first: Tensor, args: tuple, check: Callable[[], None]):
    """Call an operation with arguments that pass `check`; `first` tells the device. Nothing needs a gradient.

    The compiled CPU kernels check the same themselves: there, `check` only finds the words for what they refuse, and
    the dispatcher is passed once, not twice. Cold, checks and dispatch took as long as a small layer's gradient.
    """
    if not backend.runs_on_cpu_library(first):
        check()
        return getattr(torch.ops.sparseft, name)(*args)
    try:
        return getattr(torch.ops.sparseft_cpu, name).default(*args)
    except RuntimeError as error:
        refusal = error
    check()
    raise refusal


# ---- checks ---------------------------------------------------------------------------------------------------


def _unfit(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{name} must be {expected}, got {got}")


def _expect_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise _unfit(name, "contiguous", f"strides {tensor.stride()}")


def _expect_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")


def _expect_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise _unfit(name, f"on {like.device}", tensor.device)


def _expect_vector(name: str, tensor: Tensor, length: int | None, dtypes: Sequence[torch.dtype], like: Tensor) -> None:
    """Contiguous [length] (None: any length) on the device of `like`."""
    if tensor.dim() != 1 or (length is not None and len(tensor) != length):
        raise _unfit(name, "1-D" if length is None else f"[{length}]", tuple(tensor.shape))
    _expect_dtype(name, tensor, dtypes)
    _expect_contiguous(name, tensor)
    _expect_device(name, tensor, like)


def _expect_number(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], like: Tensor | None) -> None:
    if tensor.numel() != 1:
        raise _unfit(name, "one number", f"shape {tuple(tensor.shape)}")
    _expect_dtype(name, tensor, dtypes)
    if like is not None:
        _expect_device(name, tensor, like)


def _expect_layout(layout: Layout, like: Tensor) -> None:
    """Dtypes, contiguity, device. That indices are in bounds is for `Pattern.validate` (the C++ kernels check it)."""
    for name, tensor, dtype in (
        ("rows", layout.rows, torch.int32),
        ("cols", layout.cols, torch.int32),
        ("local", layout.local, torch.int16),
    ):
        _expect_vector(name, tensor, None, (dtype,), like)
    tiles = layout.tiles
    if tiles.dim() != 2 or tiles.shape[1] != 5:
        raise _unfit("tiles", "[n, 5]", tuple(tiles.shape))
    _expect_dtype("tiles", tiles, (torch.int64,))
    _expect_contiguous("tiles", tiles)
    _expect_device("tiles", tiles, like)


def _layout_for(weights: Sequence[Tensor], pattern: Pattern | Layout) -> Layout:
    """What the kernels read; a pattern must be that of the only weight."""
    if not weights:
        raise ValueError("weights must hold at least one tensor, got none")
    if not isinstance(pattern, Pattern):
        return pattern
    if len(weights) != 1 or matrix_shape(weights[0].shape) != pattern.shape:
        raise _unfit("weight", f"one of shape {pattern.shape}", [tuple(w.shape) for w in weights])
    return pattern.layout


def _expect_weights(weights: Sequence[Tensor]) -> None:
    dtype, device = weights[0].dtype, weights[0].device
    for weight in weights:
        if weight.dtype == dtype and weight.device == device and weight.is_contiguous():
            continue  # hundreds of layers: only a message is worth more time
        _expect_dtype("weight", weight, (dtype,))
        _expect_contiguous("weight", weight)
        _expect_device("weight", weight, weights[0])


def _refuse_autograd(name: str, tensors: Sequence[Tensor], *others: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *others)):
        raise RuntimeError(f"{name} writes in place and is not differentiable; call it under torch.no_grad()")


def _bump(*tensors: Tensor) -> None:
    """Custom in-place ops do not advance the version counter: without this, a later backward would be wrong."""
    if torch.compiler.is_compiling():
        return
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # inference tensors have no counter
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


backend.load()
