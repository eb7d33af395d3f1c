"""sparse_adamw_ against torch.optim.AdamW in fp64: one step over the whole table, 50 steps on dense weights.

Bounds of one step, u the unit roundoff of the state, G = max(|m|, |g|), d = sqrt(v^) + eps:
    m: two roundings of beta1 and its complement, one of each product, the sum, the scale: |error| <= 6 u G
    v: all terms are positive: |error| <= 8 u v
    w: two subtractions and the decay, u (2 (|w| + |update|) + 4 decay |w - target|); the update itself, with its
       moments, corrections, root, division and rate, 20 u |update|; and m's error through it, lr / c1 / d * 6 u G
"""

import pytest
import torch
from torch import Tensor

from sparseft import reference

from .table import (
    ALL,
    FLOATS,
    ONE_LAYER,
    SEVERAL_LAYERS,
    UNIT,
    Case,
    Entries,
    assert_equal,
    assert_same_bits,
    assert_within,
    by_dtype,
    entries,
    generator,
    huge,
    normal,
    rounded,
    threads_set,
    wide,
)

OPERATION = "sparse_adamw_"
BETAS, EPS = (0.9, 0.999), 1e-8
STATE = ("values", "exp_avg", "exp_avg_sq")


def start(e: Entries, dtype: torch.dtype) -> dict:
    """Random arguments by name, everything on the CPU; options at their plain values."""
    rng, k, state = generator(e.shapes, e.tile, "adamw"), len(e), wide(dtype)
    weights = [normal(rng, shape, dtype) for shape in e.shapes]
    values = torch.zeros(k, dtype=state)
    for layer, weight in enumerate(weights):
        mine = e.layer == layer
        values[mine] = weight[e.row[mine], e.col[mine]].to(state)
    return {
        "weights": weights,
        "values": values,
        "grad": normal(rng, (k,), state),
        "exp_avg": normal(rng, (k,), state) * 0.3,
        "exp_avg_sq": normal(rng, (k,), state) ** 2,
        "base": None,
        "step": torch.from_numpy(rng.integers(1, 60, len(weights))),
        "born": None,
        "layout": e.layout,
        "lr": torch.tensor(0.01),
        "betas": BETAS,
        "eps": EPS,
        "weight_decay": 0.0,
        "maximize": False,
        "grad_scale": None,
        "found_inf": None,
        "seed": None,
    }


def call(function, a: dict) -> None:
    order = ("weights", "values", "grad", "exp_avg", "exp_avg_sq", "base", "step", "born")
    function(*(a[name] for name in order), *a["layout"], a["lr"], *a["betas"], a["eps"], a["weight_decay"],
             a["maximize"], a["grad_scale"], a["found_inf"], a["seed"])  # fmt: skip


def place(a: dict, put) -> dict:
    """The arguments with every float tensor through `put`, the others on its device."""
    device = put.__self__.device

    def move(x):
        if isinstance(x, (list, tuple)):
            return type(x)(move(y) for y in x)
        if not isinstance(x, Tensor):
            return x
        return put(x) if x.is_floating_point() and x.dim() else x.to(device)

    return {name: move(value) for name, value in a.items()}


def copied(a: dict) -> dict:
    def copy(x):
        return x.clone() if isinstance(x, Tensor) else [copy(y) for y in x] if isinstance(x, list) else x

    return {name: copy(value) for name, value in a.items()}


def oracle(e: Entries, a: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """values, exp_avg and exp_avg_sq after the step, in fp64, and the bounds of their errors."""
    w, g, m, v = (a[name].double() for name in ("values", "grad", "exp_avg", "exp_avg_sq"))
    g = g if a["grad_scale"] is None else g * a["grad_scale"].double()
    target = torch.zeros_like(w) if a["base"] is None else a["base"].double()
    lr, (beta1, beta2) = float(a["lr"]), a["betas"]
    decay = lr * a["weight_decay"]
    age = a["step"][e.layer] - (0 if a["born"] is None else a["born"].long())
    after = {"values": w - decay * (w - target), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    for years in age.unique().tolist():
        mine = age == years
        param = torch.nn.Parameter(after["values"][mine].clone())
        dense = torch.optim.AdamW([param], lr, a["betas"], a["eps"], weight_decay=0.0, maximize=a["maximize"])
        dense.state[param] = {"step": torch.tensor(years - 1.0), "exp_avg": m[mine], "exp_avg_sq": v[mine]}
        param.grad = g[mine]
        dense.step()
        after["values"][mine] = param.detach()
        for name in ("exp_avg", "exp_avg_sq"):
            after[name][mine] = dense.state[param][name]
    unit, age = UNIT[a["values"].dtype], age.double()
    largest = torch.maximum(m.abs(), g.abs())
    rate = lr / (1 - beta1**age) / ((after["exp_avg_sq"] / (1 - beta2**age)).sqrt() + a["eps"])
    update = rate * after["exp_avg"].abs()
    bounds = {
        "values": unit * (2 * (w.abs() + update) + 4 * decay * (w - target).abs() + 20 * update + 6 * rate * largest),
        "exp_avg": 6 * unit * largest,
        "exp_avg_sq": 8 * unit * after["exp_avg_sq"],
    }
    slack = 2 if unit == UNIT[torch.float64] else 1  # then the oracle rounds as much
    return after, {name: slack * bound for name, bound in bounds.items()}


def check(implementation, memory, e: Entries, a: dict) -> None:
    """One step: state within its bounds, weights exactly the rounded values, everything else as it was."""
    placed = place(a, memory.put)
    call(implementation, placed)
    memory.check()
    exact, bounds = oracle(e, a)
    plain = copied(a)
    call(reference.sparse_adamw_, plain)
    for name in STATE:
        got = placed[name].cpu()
        assert_within(got[e.present], exact[name][e.present], bounds[name][e.present], name)
        assert_within(got[e.present], plain[name][e.present], 2 * bounds[name][e.present], f"{name} of the reference")
        assert_same_bits(got[~e.present], a[name][~e.present], f"{name} of an absent tile")
    for layer, (got, before) in enumerate(zip(placed["weights"], a["weights"], strict=True)):
        mine, want = (e.layer == layer) & e.present, before.clone()
        want[e.row[mine], e.col[mine]] = rounded(placed["values"].cpu()[mine], want.dtype)
        assert_equal(got, want, f"weight {layer}")
    for name in ("grad", "step"):
        assert torch.equal(placed[name].cpu(), a[name]), f"{name} was written"


@pytest.mark.parametrize(("case", "dtype"), by_dtype(ALL))
def test_entries(implementation, memory, case, dtype):
    e = entries(case)
    check(implementation, memory, e, start(e, dtype))


def options(e: Entries, dtype: torch.dtype) -> dict[str, dict]:
    rng, k = generator("options"), len(e)
    base = normal(rng, (k,), dtype)
    step = torch.full((len(e.shapes),), 1000)
    return {
        "decay_to_zero": {"weight_decay": 0.1},
        "decay_to_base": {"weight_decay": 0.1, "base": base},
        "born": {"step": step, "born": torch.from_numpy(rng.integers(0, 8, k)).int() * 125},
        "first_step": {"step": torch.ones_like(step), "exp_avg": 0.0, "exp_avg_sq": 0.0},
        "late": {"step": torch.full_like(step, 10**9)},
        "maximize": {"maximize": True, "weight_decay": 0.01},
        "grad_scale": {"grad_scale": torch.tensor(2.0**-13 * 1.1)},
        "nothing_found": {"found_inf": torch.tensor(0.0)},
        "lr_double": {"lr": torch.tensor(0.0123, dtype=torch.float64)},
        "lr_zero": {"lr": torch.tensor(0.0), "weight_decay": 0.1},
        "no_momentum": {"betas": (0.0, 0.99)},
        "large_eps": {"eps": 0.1},
        "everything": {
            "weight_decay": 0.05, "base": base, "step": step, "maximize": True, "grad_scale": torch.tensor(3.0),
            "born": torch.from_numpy(rng.integers(0, 8, k)).int() * 125, "found_inf": torch.tensor(0.0),
        },
    }  # fmt: skip


OPTIONS = list(options(entries(ONE_LAYER[0]), torch.float32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(implementation, memory, option, dtype):
    e = entries(SEVERAL_LAYERS[2])
    a = start(e, dtype)
    for name, value in options(e, dtype)[option].items():
        a[name] = torch.full_like(a[name], value) if isinstance(a[name], Tensor) and isinstance(value, float) else value
    check(implementation, memory, e, a)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_update_alone(implementation, memory, dtype):
    """From values of zero the new value is the update: its relative error shows a correction computed too narrowly."""
    e = entries(SEVERAL_LAYERS[0])
    a = start(e, dtype)
    a["values"].zero_()
    a["exp_avg"] = a["grad"] * a["exp_avg"].abs()  # no cancellation: m has the sign of g
    for age in (1, 2, 10, 1000):
        a["step"] = torch.full_like(a["step"], age)
        check(implementation, memory, e, a)


@pytest.mark.parametrize("found", [1.0, float("inf"), -2.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_found_inf_changes_nothing(implementation, memory, dtype, found):
    e = entries(SEVERAL_LAYERS[0])
    a = start(e, dtype) | {"found_inf": torch.tensor(found), "weight_decay": 0.1}
    a["grad"][0] = float("inf")
    placed = place(a, memory.put)
    call(implementation, placed)
    memory.check()
    for name in STATE:
        assert_same_bits(placed[name], a[name], name)
    for got, before in zip(placed["weights"], a["weights"], strict=True):
        assert_same_bits(got, before, "weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_fifty_steps_equal_dense_adamw(implementation, dtype, weight_decay):
    """50 steps of torch.optim.AdamW on dense fp64 weights, compared at the entries.

    Each step rounds a value twice, by at most u |w| each: worst case 100 u |w|. Random roundings add up to
    sqrt(100 / 3) u |w| = 3.5e-7 |w| in fp32 (root mean square), under 1e-6; the update's own relative error, some
    ten u of lr = 1e-3 a step, stays below that. In fp64 the oracle rounds as much, and its factor 1 - lr * decay is
    off by up to u / 2 in the same direction at every step: 1e-14 instead of 2e-15.
    """
    e, steps, lr = entries(SEVERAL_LAYERS[0]), 50, 1e-3
    a = start(e, dtype)
    rng, state = generator("fifty"), wide(dtype)
    dense = [torch.nn.Parameter(w.double()) for w in a["weights"]]
    optimizer = torch.optim.AdamW(dense, lr, BETAS, EPS, weight_decay=weight_decay)
    a |= {"exp_avg": torch.zeros(len(e), dtype=state), "exp_avg_sq": torch.zeros(len(e), dtype=state),
          "lr": torch.tensor(lr), "weight_decay": weight_decay}  # fmt: skip
    lr_used = float(a["lr"])  # as rounded to fp32
    optimizer.param_groups[0]["lr"] = lr_used
    before = [w.clone() for w in a["weights"]]
    held = Held(implementation.device)
    placed = place(a, held.put)
    for step in range(1, steps + 1):
        for param in dense:
            param.grad = normal(rng, param.shape, torch.float64).to(state).double()
        picked = torch.cat([p.grad[e.row[e.layer == i], e.col[e.layer == i]] for i, p in enumerate(dense)])
        placed["grad"].copy_(picked)
        placed["step"].fill_(step)
        call(implementation, placed)
        optimizer.step()
    want = torch.cat([p.detach()[e.row[e.layer == i], e.col[e.layer == i]] for i, p in enumerate(dense)])
    got = placed["values"].cpu().double()
    unit = UNIT[state]
    assert_within(got, want, 110 * unit * want.abs() + 1000 * steps * unit * lr_used, "values after 50 steps")
    assert (got - want).norm() <= {torch.float32: 1e-6, torch.float64: 1e-14}[state] * want.norm()
    for i, (weight, was) in enumerate(zip(placed["weights"], before, strict=True)):
        mine = e.layer == i
        was[e.row[mine], e.col[mine]] = rounded(placed["values"].cpu()[mine], dtype)
        assert_same_bits(weight, was, f"weight {i}")


class Held:
    """Tensors on a device, without guards."""

    def __init__(self, device: str):
        self.device = device

    def put(self, data: Tensor) -> Tensor:
        return data.to(self.device, copy=True)


def test_same_bits_on_every_run(implementation):
    e = entries(Case("large", ((300, 290), (200, 310)), (64, 64), 0.4))
    runs = []
    for threads in (1, 2, 2, 5):
        placed = place(start(e, torch.bfloat16) | {"weight_decay": 0.1}, Held(implementation.device).put)
        with threads_set(threads):
            call(implementation, placed)
        runs.append(placed)
    for later in runs[1:]:
        for name in STATE:
            assert_same_bits(later[name], runs[0][name], name)
        for got, first in zip(later["weights"], runs[0]["weights"], strict=True):
            assert_same_bits(got, first, "weight")


def test_replayed_from_a_cuda_graph(implementation):
    """One captured step, replayed with other numbers in device memory, does what calls of their own do."""
    if implementation.device != "cuda":
        pytest.skip("CUDA graphs need a GPU (tests/triton/test_capture.py does without)")
    e, held = entries(SEVERAL_LAYERS[0]), Held("cuda")
    a = start(e, torch.bfloat16) | {"weight_decay": 0.1, "lr": torch.tensor(0.01, dtype=torch.float64)}
    a |= {"grad_scale": torch.tensor(1.0), "found_inf": torch.tensor(0.0)}
    replayed, called = place(a, held.put), place(a, held.put)
    for placed in (replayed, called):  # what is prepared once per worklist
        call(implementation, placed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(implementation, replayed)
    for step, lr, scale, found in ((61, 0.02, 0.5, 0.0), (62, 0.005, 2.0, 0.0), (62, 0.1, 1.0, 1.0)):
        for placed in (replayed, called):
            placed["step"].fill_(step)
            for name, number in (("lr", lr), ("grad_scale", scale), ("found_inf", found)):
                placed[name].fill_(number)
        graph.replay()
        call(implementation, called)
        for name in STATE:
            assert_same_bits(replayed[name], called[name], name)
        for got, want in zip(replayed["weights"], called["weights"], strict=True):
            assert_same_bits(got, want, "weight")


def test_offsets_beyond_int32(implementation, tmp_path):
    """A weight of more than 2^31 elements (a sparse file): its last row is written where it is."""
    shape = (2**31 // 31000 + 41, 31000)
    weight = huge(shape[0] * shape[1], torch.bfloat16, implementation.device, tmp_path).view(shape)
    e = Entries(
        (shape,), torch.tensor([shape[0] - 1, 0], dtype=torch.int32), torch.tensor([30999], dtype=torch.int32),
        torch.tensor([[0, 0, 0, 0, 2]]), torch.tensor([0, 1], dtype=torch.int16), (2, 1),
        torch.zeros(2, dtype=torch.int64), torch.tensor([shape[0] - 1, 0]), torch.tensor([30999, 30999]),
        torch.ones(2, dtype=torch.bool),
    )  # fmt: skip
    a = start(entries(Case("two", ((2, 1),), (2, 1), "full")), torch.bfloat16)
    a = place(a | {"weights": [], "layout": e.layout}, Held(implementation.device).put) | {"weights": [weight]}
    call(implementation, a)
    got = torch.stack([weight[-1, 30999], weight[0, 30999]]).cpu()
    assert_same_bits(got, rounded(a["values"].cpu(), torch.bfloat16))
    assert got.abs().min() > 0
