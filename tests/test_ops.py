"""The operations as torch ops: registration, compilation, autograd, version counters, and every error.

What they compute is tested by the table in tests/kernels.
"""

import copy
import re

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sparseft import backend, ops
from sparseft.pattern import Layout, Pattern, matrix_shape, pack

N, K, T = 11, 13, 5
RAW = torch.ops.sparseft


@pytest.fixture(params=["reference", "cpu"])
def served_by(request):
    """Both implementations that every machine has, in turn."""
    with backend.forced(request.param):
        yield request.param


def pattern(shape=(N, K), tile=(4, 8), density=0.3) -> Pattern:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(len(tile) + shape[0])) < density
    return Pattern.from_mask(mask, tile=tile, mass=torch.rand(shape, generator=torch.Generator().manual_seed(1)))


def layers(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Layout]:
    """Two weights and their packed layout."""
    shapes = [(N, K), (6, 20)]
    return [torch.randn(s).to(dtype) for s in shapes], pack([pattern(s) for s in shapes])


# ---- samples: one set of arguments or more for every op; an op without is found below --------------------------


def masked_grad_samples(dtype, **requires):
    p = pattern()
    grad_out, input = torch.randn(T, N).to(dtype), torch.randn(T, K).to(dtype)
    compact = grad_out[:, p.rows.long()], input[:, p.cols.long()]
    rest = (p.tiles, p.local, list(p.tile))
    for g, x, rows, cols in ((grad_out, input, p.rows, p.cols), (*compact, None, None)):
        yield (g.clone().requires_grad_(**requires), x.clone().requires_grad_(**requires), rows, cols, *rest)


def samples(name: str) -> list[tuple]:
    out = []
    for dtype in (torch.float32, torch.bfloat16):
        weights, layout = layers(dtype)
        k = len(layout.local)
        values, step = torch.randn(k), torch.tensor([1, 7])
        if name == "masked_grad":
            out += masked_grad_samples(dtype, requires_grad=dtype == torch.float32)
        elif name == "masked_grad_":
            for g, x, *where in masked_grad_samples(dtype, requires_grad=False):
                out += [(torch.randn(len(where[3])), g, x, *where, accumulate) for accumulate in (False, True)]
        elif name == "scatter_delta_":
            out += [(weights, values, *layout, "add", 0.5), (weights, values, *layout, "copy", 1.0)]
            out += [(weights, values.to(dtype), *layout, "swap", 1.0)]
        elif name == "sparse_adamw_":
            state = (weights, values, torch.randn(k), torch.randn(k), torch.rand(k))
            numbers = (torch.tensor(0.01), 0.9, 0.999, 1e-8, 0.1)
            base, born, one = values.to(dtype), torch.zeros(k, dtype=torch.int32), torch.tensor(1.0)
            out += [(*state, None, step, None, *layout, *numbers, False, None, None)]
            out += [(*state, base, step, born, *layout, *numbers, True, one, torch.tensor(0.0))]
            if dtype == torch.bfloat16:
                masterless = (weights, base.clone(), *state[2:], base, step, None)
                out += [(*masterless, *layout, *numbers, False, None, None, 7)]
        elif name == "select_topk":
            others = [torch.randn_like(w) for w in weights]
            out += [(weights, [], 9, "abs"), (weights, others, 9, "product"), (weights[:1], [], 0, "abs")]
    return out


NAMES = (*ops.SCHEMAS, "masked_grad")


def test_every_op_has_samples():
    defined = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("sparseft::")}
    assert defined == set(NAMES)
    assert all(samples(name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(served_by, name):
    for args in samples(name):
        torch.library.opcheck(getattr(RAW, name).default, args)


def flat(args) -> list[Tensor]:
    """All tensors of nested arguments."""
    if isinstance(args, Tensor):
        return [args]
    return [t for a in args for t in flat(a)] if isinstance(args, (list, tuple)) else []


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(served_by, name):
    torch._dynamo.reset()  # else the lambda's other compilations count against its recompile limit
    op = getattr(RAW, name).default
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    for args in samples(name):
        eager, traced = copy.deepcopy(args), copy.deepcopy(args)
        expected, got = op(*eager), compiled(*traced)
        for a, b in zip(flat((*eager, expected)), flat((*traced, got)), strict=True):
            assert torch.equal(a, b)


def test_the_functions_compile_without_graph_breaks(served_by):
    """The public functions, with a Pattern closed over: same results, forward and backward."""
    weights, layout = layers()
    p, k = pattern(), len(layout.local)
    g, x = torch.randn(2, T, N, requires_grad=True), torch.randn(2, T, K, requires_grad=True)
    step, lr = torch.tensor([3, 4]), torch.tensor(0.1)

    def gradient(g, x):
        return ops.masked_grad(g, x, p)

    def write(weights, values, m, v):
        ops.scatter_delta_(weights, values, layout, "add", 0.5)
        ops.sparse_adamw_(weights, values, values * 2, m, v, layout, step=step, lr=lr)
        return ops.select_topk(weights, 7)

    for function, args in ((gradient, (g, x)), (write, (weights, torch.randn(k), torch.randn(k), torch.rand(k)))):
        eager, traced = copy.deepcopy(args), copy.deepcopy(args)
        expected = function(*eager)
        got = torch.compile(function, fullgraph=True, backend="aot_eager")(*traced)
        if function is gradient:
            expected.square().sum().backward()
            got.square().sum().backward()
            eager, traced = [a.grad for a in eager], [a.grad for a in traced]
        for a, b in zip(flat((*eager, expected)), flat((*traced, got)), strict=True):
            assert torch.equal(a, b)


# ---- autograd -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", ["neither", "rows", "cols", "both"])
def test_masked_grad_derivatives(served_by, compact):
    p, tokens = pattern((5, 6), tile=(2, 4), density=0.4), 3
    rows = None if compact in ("rows", "both") else p.rows
    cols = None if compact in ("cols", "both") else p.cols
    g = torch.randn(tokens, 5 if rows is not None else len(p.rows), dtype=torch.float64, requires_grad=True)
    x = torch.randn(tokens, 6 if cols is not None else len(p.cols), dtype=torch.float64, requires_grad=True)

    def function(g, x):
        return RAW.masked_grad(g, x, rows, cols, p.tiles, p.local, list(p.tile))

    assert torch.autograd.gradcheck(function, (g, x))
    assert torch.autograd.gradgradcheck(function, (g, x))


def test_masked_grad_is_zero_where_tiles_are_absent(served_by):
    p = pattern()
    some = p.tiles[::2].contiguous()
    out = RAW.masked_grad(torch.randn(T, N), torch.randn(T, K), p.rows, p.cols, some, p.local, list(p.tile))
    present = torch.zeros(len(p), dtype=torch.bool)
    for first, last in some[:, 3:].tolist():
        present[first:last] = True
    assert out[present].all()
    assert not out[~present].any() and not present.all()
    g = torch.randn(3, N, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda g, x: RAW.masked_grad(g, x, p.rows, p.cols, some, p.local, list(p.tile)), (g, x)
    )


def test_masked_grad_in_low_precision_has_gradients_of_the_operands_dtype(served_by):
    g, x = (torch.randn(T, n, dtype=torch.bfloat16, requires_grad=True) for n in (N, K))
    out = ops.masked_grad(g, x, pattern())
    assert out.dtype == torch.float32
    out.sum().backward()
    assert g.grad.dtype == x.grad.dtype == torch.bfloat16


def test_masked_grad_takes_operands_of_any_strides(served_by):
    """Transposed, expanded (as from y.sum().backward()) and sliced operands, with any leading dimensions."""
    p = pattern()
    base = {"g": torch.randn(2, T, N), "x": torch.randn(2, T, K)}
    expected = ops.masked_grad(base["g"], base["x"], p)
    views = {
        "transposed": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
        "sliced": lambda t: torch.stack([t, t * 2], dim=-1)[..., 0],
        "padded": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
    }
    for name, view in views.items():
        got = ops.masked_grad(view(base["g"]), view(base["x"]), p)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=name)
    one = torch.ones(()).expand(2 * T, N)
    got = ops.masked_grad(one, base["x"].view(2 * T, K), p)
    expected = ops.masked_grad(one.contiguous(), base["x"].view(2 * T, K), p)
    assert torch.equal(got, expected)


def test_masked_grad_accumulates_into_out(served_by):
    p, out = pattern(), torch.ones(len(pattern()))
    g, x = torch.randn(T, N), torch.randn(T, K)
    assert ops.masked_grad(g, x, p, out=out) is out
    torch.testing.assert_close(out, 1 + ops.masked_grad(g, x, p))


def test_masked_grad_of_several_at_once(served_by):
    p, g, x = pattern(), torch.randn(3, T, N), torch.randn(3, T, K)
    expected = torch.stack([ops.masked_grad(a, b, p) for a, b in zip(g, x, strict=True)])
    assert torch.equal(torch.vmap(lambda a, b: ops.masked_grad(a, b, p))(g, x), expected)


def test_who_traces_sees_the_public_operations():
    """Not the CPU library's: a graph must run where that is not."""
    p, g, x = pattern(), torch.randn(T, N), torch.randn(T, K)
    graph = make_fx(lambda g, x: ops.masked_grad(g, x, p))(g, x)
    called = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert RAW.masked_grad.default in called and torch.equal(graph(g, x), ops.masked_grad(g, x, p))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert ops.masked_grad(g, x, p).shape == (len(p),)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_position_of_tiles_of_every_width(served_by, dtype):
    """Addresses are computed several at a time where tiles are small: all positions, and tiles that are cut off."""
    for width in range(1, 67):
        for height in (1, 64, 65):
            mask = torch.ones(height + 3, width + 2, dtype=torch.bool)
            p = Pattern.from_mask(mask, tile=(height, width), mass=torch.rand(mask.shape))
            weight, values = torch.zeros(mask.shape, dtype=dtype), torch.randn(len(p)).to(dtype)
            ops.scatter_delta_(weight, values, p, "copy")
            assert torch.equal(p.gather(weight), values)


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 4), (3, 2, 1, 5), (4, 0, 3), (4, 3, 0)], ids=str)
@pytest.mark.parametrize("name", ["scatter_delta_", "sparse_adamw_", "torch.ops.sparseft.scatter_delta_"])
def test_weights_of_any_rank_are_matrices_of_their_last_dimension(served_by, name, shape):
    matrix = matrix_shape(shape)
    mask = torch.rand(matrix) < 0.6
    mask.view(-1)[:1] = True
    layout = pack([pattern(), Pattern.from_mask(mask, tile=(4, 8))])
    weights, values, grad = [torch.randn(N, K), torch.randn(shape)], *torch.randn(2, len(layout.local))
    results = []
    for seen in (weights, [weights[0], weights[1].view(matrix)]):
        written, state = [w.clone() for w in seen], torch.zeros(3, len(values))
        if name == "scatter_delta_":
            ops.scatter_delta_(written, values, layout)
        elif name == "torch.ops.sparseft.scatter_delta_":
            torch.ops.sparseft.scatter_delta_(written, values, *layout, "add", 1.0)
        else:
            ops.sparse_adamw_(written, *state[:1], grad, *state[1:], layout,
                              step=torch.tensor([1, 1]), lr=torch.tensor(0.1))  # fmt: skip
        assert all(
            not torch.equal(now, before) or before.numel() == 0 for now, before in zip(written, seen, strict=True)
        )
        results.append([w.flatten() for w in written])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_weight_and_its_pattern_need_no_list(served_by):
    p = pattern()
    weight, values, grad = torch.zeros(N, K), torch.zeros(len(p)), torch.randn(len(p))
    state = {"step": torch.tensor([1]), "lr": torch.tensor(0.1)}
    ops.sparse_adamw_(weight, values, grad, *torch.zeros(2, len(p)), p, **state)
    assert torch.equal(p.gather(weight), values) and bool((values != 0).all())
    with pytest.raises(ValueError, match=r"weight must be one of shape .*, got \[\(1, 1\)\]"):
        ops.sparse_adamw_(torch.zeros(1, 1), values, grad, *torch.zeros(2, len(p)), p, **state)


@pytest.mark.parametrize("weight", [torch.zeros(2, 3, 4).transpose(1, 2), torch.zeros(3, 8).T], ids=["3-D", "2-D"])
def test_the_raw_operations_refuse_weights_that_are_not_contiguous(served_by, weight):
    p = pattern((8, 3))
    with pytest.raises(ValueError, match="weight must be contiguous, got strides"):
        torch.ops.sparseft.scatter_delta_([weight], torch.ones(len(p)), *p.layout, "add", 1.0)
    assert not weight.any()


def test_a_tile_without_entries_may_point_anywhere():
    weights, layout = layers()
    k = len(layout.local)
    empty = layout.tiles[:1].clone()
    empty[0, 1:] = torch.tensor([1 << 40, -(1 << 40), int(layout.tiles[0, 4]), int(layout.tiles[0, 4])])
    wild = layout._replace(tiles=torch.cat([layout.tiles[:1], empty, layout.tiles[1:], empty]))
    expected, values = [w.clone() for w in weights], torch.randn(k)
    with backend.forced("cpu"):
        ops.scatter_delta_(weights, values, wild, "copy")
        ops.scatter_delta_(expected, values, layout, "copy")
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def in_place(name: str):
    """A call of each in-place function and the tensors that it writes."""
    weights, layout = layers()
    k = len(layout.local)
    values, m, v = torch.randn(k), torch.randn(k), torch.rand(k)
    if name == "masked_grad":
        p = pattern()
        out, g, x = torch.zeros(len(p)), torch.randn(T, N), torch.randn(T, K)
        return [out], lambda: ops.masked_grad(g, x, p, out=out)
    if name == "sparse_adamw_":
        step, lr, grad = torch.tensor([1, 1]), torch.tensor(0.1), torch.randn(k)
        return [*weights, values, m, v], lambda: ops.sparse_adamw_(
            weights, values, grad, m, v, layout, step=step, lr=lr
        )
    mode = name.removeprefix("scatter_delta_").strip()
    written = [*weights, values] if mode == "swap" else weights
    return written, lambda: ops.scatter_delta_(weights, values, layout, mode)


IN_PLACE = ("masked_grad", "scatter_delta_ add", "scatter_delta_ copy", "scatter_delta_ swap", "sparse_adamw_")


@pytest.mark.parametrize("name", IN_PLACE)
def test_backward_through_an_overwritten_tensor_raises(served_by, name):
    """The version counter of every written tensor moves: autograd notices that what it saved is gone."""
    count = len(in_place(name)[0])
    for i in range(count):
        written, call = in_place(name)
        leaf = torch.ones_like(written[i], requires_grad=True)
        product = (leaf * written[i]).sum()  # saves written[i]
        call()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_functions_refuse_to_break_autograd(served_by, name):
    count = len(in_place(name)[0])
    for i in range(count):
        written, call = in_place(name)
        written[i].requires_grad_(True)
        before = [t.detach().clone() for t in written]
        with pytest.raises(RuntimeError, match=r"not differentiable; call it under torch\.no_grad"):
            call()
        assert all(torch.equal(a, b) for a, b in zip(written, before, strict=True))
        with torch.no_grad():
            call()


def test_inference_tensors_can_be_written(served_by):
    with torch.inference_mode():
        written, call = in_place("scatter_delta_ swap")
        call()
        assert all(t.is_inference() for t in written)


def test_a_kernel_that_refuses_leaves_version_counters_alone():
    """What only the kernel sees: an index out of bounds. A backward over what was saved before still runs."""
    weights, layout = layers()
    layout.local[-1] = -1
    values = torch.ones(len(layout.local))
    leaf = torch.ones_like(weights[0], requires_grad=True)
    product = (leaf * weights[0]).sum()
    versions = [weights[0]._version, values._version]
    with backend.forced("cpu"), pytest.raises(RuntimeError, match="a local position lies outside the tile"):
        ops.scatter_delta_(weights, values, layout, "swap")
    assert [weights[0]._version, values._version] == versions
    product.backward()


# ---- errors: the argument, what was expected, what came; nothing written ---------------------------------------

p0 = pattern()
two, layout0 = layers()
k0 = len(layout0.local)


def adamw(**change):
    """A call of sparse_adamw_ with some arguments changed."""
    a = {
        "weights": [w.clone() for w in two], "values": torch.zeros(k0), "grad": torch.ones(k0),
        "exp_avg": torch.zeros(k0), "exp_avg_sq": torch.zeros(k0), "layout": layout0,
        "step": torch.tensor([1, 1]), "lr": torch.tensor(0.1),
    } | change  # fmt: skip
    return a, lambda: ops.sparse_adamw_(**a)


def scatter(**change):
    a = {"weight": torch.randn(N, K), "values": torch.ones(len(p0)), "pattern": p0} | change
    return a, lambda: ops.scatter_delta_(**a)


def masked(**change):
    a = {"grad_out": torch.randn(T, N), "input": torch.randn(T, K), "pattern": p0} | change
    return a, lambda: ops.masked_grad(**a)


def topk(**change):
    a = {"scores": [torch.randn(4, 5), torch.randn(6)], "k": 3} | change
    return a, lambda: ops.select_topk(**a)


def strided(k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[k], every second element of a larger tensor."""
    return torch.zeros(2 * k, dtype=dtype)[::2]


def layout_errors(function: str, layout: Layout, call) -> dict:
    """Errors in each tensor of a layout; `call` calls the function with a layout."""

    def case(what: str, error: type, expected: str, **change):
        return {f"{function} {what}": (call(layout._replace(**change)), error, expected)}

    wide = {name: getattr(layout, name).repeat_interleave(2)[::2] for name in ("rows", "cols", "local")}
    out = {}
    for name, dtype in (("rows", torch.int32), ("cols", torch.int32), ("local", torch.int16)):
        tensor = getattr(layout, name)
        out |= case(f"{name} dtype", TypeError, f"{name} must be {dtype}, got torch.int64", **{name: tensor.long()})
        out |= case(f"{name} strides", ValueError, f"{name} must be contiguous, got strides (2,)", **{name: wide[name]})
        out |= case(f"{name} device", ValueError, f"{name} must be on cpu, got meta", **{name: tensor.to("meta")})
        out |= case(f"{name} rank", ValueError, f"{name} must be 1-D, got", **{name: tensor[:, None]})
    out |= case("tiles width", ValueError, "tiles must be [n, 5], got", tiles=layout.tiles[:, :4])
    out |= case("tiles dtype", TypeError, "tiles must be torch.int64, got torch.int32", tiles=layout.tiles.int())
    columns = layout.tiles.T.contiguous().T
    out |= case("tiles strides", ValueError, "tiles must be contiguous, got strides", tiles=columns)
    return out


ERRORS = {
    **layout_errors("adamw", layout0, lambda layout: adamw(layout=layout)),
    **layout_errors("scatter", layout0, lambda layout: scatter(weight=two, values=torch.ones(k0), pattern=layout)),
    **layout_errors(
        "masked_grad", p0.layout, lambda layout: masked(pattern=Pattern(p0.shape, layout.tile, *layout[:4]))
    ),
    "input device": (
        masked(input=torch.zeros(T, K, device="meta")),
        ValueError,
        "input must be on cpu, got meta",
    ),
    "out strides": (masked(out=strided(len(p0))), ValueError, "out must be contiguous, got strides (2,)"),
    "values strides": (scatter(values=strided(len(p0))), ValueError, "values must be contiguous, got strides (2,)"),
    **{
        f"adamw {name} strides": (
            adamw(**{name: strided(n, dtype)}),
            ValueError,
            f"{name} must be contiguous, got strides (2,)",
        )
        for name, n, dtype in (
            *((name, k0, torch.float32) for name in ("values", "grad", "exp_avg", "exp_avg_sq", "base")),
            ("born", k0, torch.int32),
            ("step", 2, torch.int64),
        )
    },
    "adamw grad device": (adamw(grad=torch.zeros(k0, device="meta")), ValueError, "grad must be on cpu, got meta"),
    "lr": (adamw(lr=torch.ones(2)), ValueError, "lr must be one number, got shape (2,)"),
    "lr dtype": (adamw(lr=torch.tensor(1)), TypeError, "lr must be torch.float32 or torch.float64, got torch.int64"),
    "found_inf dtype": (
        adamw(found_inf=torch.tensor(True)),
        TypeError,
        "found_inf must be torch.float32, got torch.bool",
    ),
    "grad_scale": (adamw(grad_scale=torch.ones(3)), ValueError, "grad_scale must be one number, got shape (3,)"),
    "seed": (
        adamw(seed=1),
        TypeError,
        "with a seed weights must be torch.bfloat16 or torch.float16, got torch.float32",
    ),
    "seed and masters": (
        adamw(seed=1, weights=[w.bfloat16() for w in two]),
        TypeError,
        "values must be torch.bfloat16, got torch.float32",
    ),
    "grad_out width": (masked(grad_out=torch.randn(T, N + 1)), ValueError, "grad_out must be [..., 11], got (5, 12)"),
    "grad_out scalar": (masked(grad_out=torch.randn(())), ValueError, "grad_out must be [..., 11], got ()"),
    "input width": (masked(input=torch.randn(T, K - 1)), ValueError, "input must be [..., 13], got (5, 12)"),
    "tokens": (masked(input=torch.randn(T + 1, K)), ValueError, "input must be leading dimensions (5,), got (6, 13)"),
    "rank": (masked(input=torch.randn(1, T, K)), ValueError, "input must be leading dimensions (5,), got (1, 5, 13)"),
    "input dtype": (
        masked(input=torch.randn(T, K).half()),
        TypeError,
        "input must be torch.float32, got torch.float16",
    ),
    "integers": (
        masked(grad_out=torch.ones(T, N, dtype=torch.int32), input=torch.ones(T, K, dtype=torch.int32)),
        TypeError,
        "grad_out must be torch.float32 or torch.bfloat16 or torch.float16 or torch.float64, got torch.int32",
    ),
    "out length": (masked(out=torch.zeros(len(p0) + 1)), ValueError, f"out must be [{len(p0)}], got ({len(p0) + 1},)"),
    "out dtype": (
        masked(out=torch.zeros(len(p0), dtype=torch.bfloat16)),
        TypeError,
        "out must be torch.float32, got torch.bfloat16",
    ),
    "mode": (scatter(mode="set"), ValueError, "mode must be 'add', 'copy' or 'swap', got 'set'"),
    "no weights": (scatter(weight=[]), ValueError, "weights must hold at least one tensor, got none"),
    "weight shape": (
        scatter(weight=torch.zeros(K, N)),
        ValueError,
        "weight must be one of shape (11, 13), got [(13, 11)]",
    ),
    "weight strides in 3-D": (
        scatter(weight=torch.zeros(N, 1, 2 * K)[..., ::2]),
        ValueError,
        "weight must be contiguous",
    ),
    "two weights": (scatter(weight=[torch.zeros(N, K)] * 2), ValueError, "weight must be one of shape (11, 13), got"),
    "weight strides": (
        scatter(weight=torch.zeros(K, N).T),
        ValueError,
        "weight must be contiguous, got strides (1, 11)",
    ),
    "weight dtypes": (
        scatter(weight=[torch.zeros(N, K), torch.zeros(6, 20).half()], pattern=layout0, values=torch.ones(k0)),
        TypeError,
        "weight must be torch.float32, got torch.float16",
    ),
    "values length": (scatter(values=torch.ones(3)), ValueError, f"values must be [{len(p0)}], got (3,)"),
    "values dtype": (
        scatter(values=torch.ones(len(p0), dtype=torch.float64)),
        TypeError,
        "values must be torch.float32",
    ),
    "swap dtype": (
        scatter(weight=torch.zeros(N, K).half(), mode="swap"),
        TypeError,
        "values must be torch.float16, got torch.float32",
    ),
    "adamw no weights": (adamw(weights=[]), ValueError, "weights must hold at least one tensor, got none"),
    "adamw strides": (
        adamw(weights=[two[0], torch.zeros(20, 6).T]),
        ValueError,
        "weight must be contiguous, got strides (1, 6)",
    ),
    **{
        f"adamw {name} length": (
            adamw(**{name: torch.zeros(k0 - 1)}),
            ValueError,
            f"{name} must be [{k0}], got ({k0 - 1},)",
        )
        for name in ("values", "grad", "exp_avg", "exp_avg_sq", "base")
    },
    **{
        f"adamw {name} dtype": (
            adamw(**{name: torch.zeros(k0).half()}),
            TypeError,
            f"{name} must be torch.float32, got torch.float16",
        )
        for name in ("values", "grad", "exp_avg", "exp_avg_sq", "base")
    },
    "adamw born length": (adamw(born=torch.zeros(1, dtype=torch.int32)), ValueError, f"born must be [{k0}], got (1,)"),
    "adamw born dtype": (
        adamw(born=torch.zeros(k0, dtype=torch.int64)),
        TypeError,
        "born must be torch.int32, got torch.int64",
    ),
    "adamw step length": (adamw(step=torch.tensor([1])), ValueError, "step must be [2], got (1,)"),
    "adamw step dtype": (adamw(step=torch.ones(2)), TypeError, "step must be torch.int64, got torch.float32"),
    "no scores": (topk(scores=[]), ValueError, "scores must hold at least one tensor, got none"),
    "score": (topk(score="square"), ValueError, "score must be 'abs' or 'product', got 'square'"),
    "k negative": (topk(k=-1), ValueError, "k must lie in [0, 26], got -1"),
    "k large": (topk(k=27), ValueError, "k must lie in [0, 26], got 27"),
    "no others": (topk(score="product"), ValueError, "others must be shapes [(4, 5), (6,)], got []"),
    "others for abs": (topk(others=torch.zeros(4, 5)), ValueError, "others must be shapes [], got [(4, 5)]"),
    "others shape": (
        topk(score="product", others=[torch.zeros(4, 5), torch.zeros(5)]),
        ValueError,
        "others must be shapes [(4, 5), (6,)], got [(4, 5), (5,)]",
    ),
    "others dtype": (
        topk(score="product", others=[torch.zeros(4, 5), torch.zeros(6).double()]),
        TypeError,
        "others must be torch.float32, got torch.float64",
    ),
    "scores device": (
        topk(scores=[torch.zeros(4), torch.zeros(4, device="meta")]),
        ValueError,
        "scores must be on cpu, got meta",
    ),
    "others device": (
        topk(score="product", others=[torch.zeros(4, 5), torch.zeros(6, device="meta")]),
        ValueError,
        "others must be on cpu, got meta",
    ),
    "scores dtypes": (
        topk(scores=[torch.zeros(4), torch.zeros(4).half()]),
        TypeError,
        "scores must be torch.float32, got torch.float16",
    ),
    "scores strides": (topk(scores=torch.zeros(4, 5).T), ValueError, "scores must be contiguous, got strides (1, 5)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    (arguments, call), error, message = ERRORS[case]
    tensors = [t for t in flat([v for v in arguments.values() if not isinstance(v, Pattern)]) if not t.is_meta]
    before, versions = [t.clone() for t in tensors], [t._version for t in tensors]
    with pytest.raises(error, match=re.escape(message)):
        call()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert [t._version for t in tensors] == versions


# ---- the compiled CPU kernels check everything again: they are reachable without the functions above ------------


def raw_arguments(name: str) -> dict:
    """Valid arguments of a kernel, by their names in its schema, as fp32."""
    schema = getattr(torch.ops.sparseft_cpu, name).default._schema
    args = samples(name)[1 if name == "sparse_adamw_" else 0]
    args = (*args, *(a.default_value for a in schema.arguments[len(args) :]))
    return dict(zip((a.name for a in schema.arguments), copy.deepcopy(args), strict=True))


def edited(tensor: Tensor, at, value: int) -> Tensor:
    out = tensor.clone()
    out[at] = value
    return out


ENTRY_FAULTS = {
    "rows dtype": lambda a: {"rows": a["rows"].long()},
    "rows too large": lambda a: {"rows": edited(a["rows"], 0, 10_000)},
    "rows negative": lambda a: {"rows": edited(a["rows"], 0, -1)},
    "cols dtype": lambda a: {"cols": a["cols"].long()},
    "cols too large": lambda a: {"cols": edited(a["cols"], 0, 10_000)},
    "cols negative": lambda a: {"cols": edited(a["cols"], 0, -1)},
    "tiles dtype": lambda a: {"tiles": a["tiles"].int()},
    "tiles width": lambda a: {"tiles": a["tiles"][:, :4].contiguous()},
    "tiles strides": lambda a: {"tiles": a["tiles"].T.contiguous().T},
    "ROW0 too large": lambda a: {"tiles": edited(a["tiles"], (0, 1), 10_000)},
    "ROW0 huge": lambda a: {"tiles": edited(a["tiles"], (0, 1), 2**63 - 1)},
    "ROW0 negative": lambda a: {"tiles": edited(a["tiles"], (0, 1), -1)},
    "COL0 too large": lambda a: {"tiles": edited(a["tiles"], (0, 2), 10_000)},
    "COL0 negative": lambda a: {"tiles": edited(a["tiles"], (0, 2), -(2**62))},
    "ENTRY0 negative": lambda a: {"tiles": edited(a["tiles"], (0, 3), -1)},
    "ENTRY1 too large": lambda a: {"tiles": edited(a["tiles"], (-1, 4), 10_000)},
    "ENTRY1 before ENTRY0": lambda a: {"tiles": edited(a["tiles"], (-1, 4), 0)},
    "local dtype": lambda a: {"local": a["local"].int()},
    "local beyond the tile": lambda a: {"local": edited(a["local"], -1, -1)},  # 65535
    "local shorter": lambda a: {"local": a["local"][:-1].clone()},
    "tile zero": lambda a: {"tile": [0, 8]},
    "tile negative": lambda a: {"tile": [-4, -8]},
    "tile too large": lambda a: {"tile": [257, 256]},
    "tile overflow": lambda a: {"tile": [2**32, 2**32]},
}
LAYER_FAULTS = {
    "LAYER too large": lambda a: {"tiles": edited(a["tiles"], (0, 0), 2)},
    "LAYER negative": lambda a: {"tiles": edited(a["tiles"], (0, 0), -1)},
    "weights none": lambda a: {"weights": []},
    "weights too few": lambda a: {"weights": a["weights"][:1]},
    "weights dtype": lambda a: {"weights": [w.int() for w in a["weights"]]},
    "weights dtypes": lambda a: {"weights": [a["weights"][0], a["weights"][1].half()]},
    "weights strides": lambda a: {"weights": [w.T.contiguous().T for w in a["weights"]]},
    "weights flattened": lambda a: {"weights": [w.view(-1) for w in a["weights"]]},
    "weights smaller": lambda a: {"weights": [w[:-3, :-3].contiguous() for w in a["weights"]]},
    "values length": lambda a: {"values": a["values"][:-1].clone()},
    "values dtype": lambda a: {"values": a["values"].int()},
    "values strides": lambda a: {"values": a["values"].repeat_interleave(2)[::2]},
}


def vector_faults(name: str) -> dict:
    return {
        f"{name} length": lambda a: {name: a[name][:-1].clone()},
        f"{name} dtype": lambda a: {name: a[name].to(torch.float16)},
        f"{name} strides": lambda a: {name: a[name].repeat_interleave(2)[::2]},
    }


FAULTS = {
    "masked_grad_": ENTRY_FAULTS
    | vector_faults("out")
    | {
        "grad_out dims": lambda a: {"grad_out": a["grad_out"][0]},
        "grad_out tokens": lambda a: {"grad_out": a["grad_out"][:-1]},
        "grad_out narrow": lambda a: {"grad_out": a["grad_out"][:, :2]},
        "grad_out narrow, compact": lambda a: {"grad_out": a["grad_out"][:, :2], "rows": None},
        "grad_out dtype": lambda a: {"grad_out": a["grad_out"].int(), "input": a["input"].int()},
        "input dtype": lambda a: {"input": a["input"].double()},
        "input narrow": lambda a: {"input": a["input"][:, :2]},
        "input narrow, compact": lambda a: {"input": a["input"][:, :2], "cols": None},
    },
    "scatter_delta_": ENTRY_FAULTS
    | LAYER_FAULTS
    | {
        "mode": lambda a: {"write_mode": "set"},
        "swap dtype": lambda a: {"write_mode": "swap", "values": a["values"].half()},
    },
    "sparse_adamw_": ENTRY_FAULTS
    | LAYER_FAULTS
    | {
        k: f
        for name in ("grad", "exp_avg", "exp_avg_sq", "base", "born", "step")
        for k, f in vector_faults(name).items()
    }
    | {
        "lr two": lambda a: {"lr": torch.ones(2)},
        "lr dtype": lambda a: {"lr": torch.tensor(1)},
        "grad_scale two": lambda a: {"grad_scale": torch.ones(2)},
        "grad_scale dtype": lambda a: {"grad_scale": torch.tensor(1.0, dtype=torch.float64)},
        "found_inf two": lambda a: {"found_inf": torch.ones(2)},
        "found_inf dtype": lambda a: {"found_inf": torch.tensor(True)},
        "seed with fp32 weights": lambda a: {"seed": 1},
        "seed with masters": lambda a: {"seed": 1, "weights": [w.bfloat16() for w in a["weights"]], "base": None},
    },
    "select_topk": {
        "no scores": lambda a: {"scores": []},
        "scores dtype": lambda a: {"scores": [s.int() for s in a["scores"]]},
        "scores dtypes": lambda a: {"scores": [a["scores"][0], a["scores"][1].half()]},
        "scores strides": lambda a: {"scores": [s.T for s in a["scores"]]},
        "score": lambda a: {"score": "square"},
        "k negative": lambda a: {"k": -1},
        "k too large": lambda a: {"k": 10_000},
        "others missing": lambda a: {"score": "product"},
        "others too many": lambda a: {"others": a["scores"]},
        "others sizes": lambda a: {"score": "product", "others": [s[1:].clone() for s in a["scores"]]},
        "others dtype": lambda a: {"score": "product", "others": [s.double() for s in a["scores"]]},
    },
}


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, faults in FAULTS.items() for fault in faults])
def test_cpu_kernels_check_their_arguments(name, fault):
    """A clear RuntimeError, and no tensor has changed."""
    arguments = raw_arguments(name)
    getattr(torch.ops.sparseft_cpu, name)(*arguments.values())  # valid so far
    arguments |= FAULTS[name][fault](arguments)
    tensors = flat(list(arguments.values()))
    before = [t.clone() for t in tensors]
    with pytest.raises(RuntimeError, match=name):
        getattr(torch.ops.sparseft_cpu, name)(*arguments.values())
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
