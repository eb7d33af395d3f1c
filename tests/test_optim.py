"""SparseAdamW against torch's AdamW on the same entries, through both doors, and the torch.optim contract."""

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from sparseft import Pattern, parameters, sparsify
from sparseft.layers import Selected, selected
from sparseft.ops import sparse_adamw_
from sparseft.optim import SparseAdamW
from sparseft.pattern import pack
from sparseft.selection.draw import generator

DOORS = ["lean", "drop-in"]


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).to(dtype)


def pattern_for(weight: Tensor, density: float = 0.3) -> Pattern:
    return Pattern.from_mask(torch.rand(weight.shape) < density, tile=(4, 8))


def patterns_for(model: nn.Module) -> dict[str, Pattern]:
    return {name: pattern_for(p) for name, p in model.named_parameters() if p.dim() > 1}


def open_door(door: str, model: nn.Module, patterns: dict[str, Pattern] | None = None, **kwargs) -> SparseAdamW:
    """An optimizer; in the drop-in door its first backward is still to come."""
    if door == "drop-in":
        return SparseAdamW(model, density=0.3, tile=(4, 8), **kwargs)
    return SparseAdamW(sparsify(model, patterns or patterns_for(model)), **({"density_power": 0.0} | kwargs))


def leaves_of(optimizer: SparseAdamW) -> list[nn.Parameter]:
    return [leaf for group in optimizer.param_groups for leaf in group["params"]]


def selections(optimizer: SparseAdamW) -> list[Selected]:
    return [optimizer._selected(leaf) for leaf in leaves_of(optimizer)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> nn.Module:
    train(model, optimizer, data)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def batches(count: int, dtype: torch.dtype = torch.float32, size: int = 7) -> list[Tensor]:
    return [torch.randn(size, 6).to(dtype) for _ in range(count)]


class Linear(nn.Module):
    """loss = sum(w * g): the dense gradient of every weight is exactly the given g."""

    def __init__(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(shape).to(dtype) for shape in shapes)

    def forward(self, grads: list[Tensor]) -> Tensor:
        return sum((w * g).sum() for w, g in zip(self.weights, grads, strict=True))


SHAPES = ((7, 10), (3, 4, 5), (12, 3))


def random_grads(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Gradients of very different magnitudes."""
    return [(torch.randn(shape) * 10 ** torch.empty(shape).uniform_(-6, 1)).to(dtype) for shape in SHAPES]


def masks_of(optimizer: SparseAdamW, model: Linear) -> list[Tensor]:
    """What is trained of each weight of the model, found by the weights' identity."""
    masks = {id(p): torch.zeros(p.shape, dtype=torch.bool) for p in model.weights}
    for chosen in selections(optimizer):
        masks[id(chosen.weight)] = chosen.pattern.to_mask().view(chosen.weight.shape)
    return [masks[id(p)] for p in model.weights]


class DenseOracle:
    """AdamW on whole tensors, from the paper's formulas; `masks` say which entries move."""

    def __init__(self, model: nn.Module, masks: list[Tensor], lr=1.5e-2, betas=(0.9, 0.999), eps=1e-8,
                 weight_decay=0.01, maximize=False):  # fmt: skip
        self.w = [p.detach().clone() for p in model.parameters()]
        self.start, self.masks = [w.clone() for w in self.w], masks
        self.m, self.v = [torch.zeros_like(w) for w in self.w], [torch.zeros_like(w) for w in self.w]
        self.options, self.t = (lr, betas, eps, weight_decay, maximize), 0

    def step(self, grads: list[Tensor]) -> None:
        lr, (beta1, beta2), eps, decay, maximize = self.options
        self.t += 1
        for i, g in enumerate(grads):
            g = -g if maximize else g
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * g**2
            update = (self.m[i] / (1 - beta1**self.t)) / ((self.v[i] / (1 - beta2**self.t)).sqrt() + eps)
            new = self.w[i] - lr * (decay * (self.w[i] - self.start[i]) + update)
            self.w[i] = torch.where(self.masks[i], new, self.w[i])


def assert_close(got: Tensor, want: Tensor) -> None:
    """fp32 within 1e-6, fp64 within 1e-12, of the largest entry."""
    unit = 1e-12 if got.dtype == torch.float64 else 1e-6
    want = want.detach()
    torch.testing.assert_close(got.detach().to(want.dtype), want, rtol=0, atol=unit * float(want.abs().max()))


def run_steps(door: str, model: Linear, steps: list[list[Tensor]], **kwargs) -> tuple[SparseAdamW, list[Tensor]]:
    """The optimizer after all steps, and which entries it trained."""
    if door == "lean":
        sparsify(model, {name: pattern_for(p.view(-1, p.shape[-1]), 0.4) for name, p in model.named_parameters()})
        optimizer = SparseAdamW(model, density_power=0.0, **kwargs)
    else:
        optimizer = SparseAdamW(model, density=0.4, tile=(4, 8), **kwargs)
    for grads in steps:
        optimizer.zero_grad()
        model(grads).backward()
        optimizer.step()
    return optimizer, masks_of(optimizer, model)


# ---- the update rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [
    {}, {"weight_decay": 0.0, "lr": 0.1},
    {"maximize": True, "betas": (0.8, 0.95)}, {"lr": torch.tensor(0.02), "eps": 1e-3},
    {"betas": (0.0, 0.5), "weight_decay": 0.5},
], ids=["default", "no_decay", "maximize", "tensor_lr", "no_momentum"])  # fmt: skip
def test_fifty_steps_equal_torchs_adamw_restricted_to_the_mask(door, dtype, options):
    """torch's side runs in fp64: in fp32 its factor 1 - lr * decay alone is off by up to 3e-8 in every step."""
    model = Linear(*SHAPES, dtype=dtype)
    dense = copy.deepcopy(model).double()
    start = weights(model)
    steps = [random_grads(dtype) for _ in range(50)]
    _, masks = run_steps(door, model, steps, decay_to="zero", **options)
    options = {"lr": 1.5e-2} | options
    oracle = torch.optim.AdamW(dense.parameters(), **(options | {"lr": float(options["lr"])}))
    for grads in steps:
        oracle.zero_grad()
        dense([g.double() for g in grads]).backward()
        oracle.step()
        with torch.no_grad():
            for w, mask, name in zip(dense.weights, masks, start, strict=True):
                w.copy_(torch.where(mask, w, start[name].double()))
    for got, want, mask, name in zip(model.weights, dense.weights, masks, start, strict=True):
        assert 0 < int(mask.sum()) < mask.numel()
        assert_close(got, want)
        assert torch.equal(got[~mask], start[name][~mask])
        assert bool((got[mask] != start[name][mask]).all())


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{"weight_decay": 0.7}, {"weight_decay": 0.7, "maximize": True, "lr": 0.05}],
                         ids=["default", "maximize"])  # fmt: skip
def test_decay_pulls_towards_the_pretrained_values_by_default(door, dtype, options):
    model = Linear(*SHAPES, dtype=dtype)
    start = copy.deepcopy(model).double()
    steps = [random_grads(dtype) for _ in range(30)]
    _, masks = run_steps(door, model, steps, **options)
    oracle = DenseOracle(start, masks, **options)
    for grads in steps:
        oracle.step([g.double() for g in grads])
    for got, want in zip(model.weights, oracle.w, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("door", DOORS)
def test_a_whole_model_trains_as_the_dense_one_restricted_to_the_mask(door):
    model = mlp(torch.float64)
    data, dense, start = batches(20, torch.float64), copy.deepcopy(model), weights(model)
    optimizer = open_door(door, model, decay_to="zero", weight_decay=0.1, lr=0.02)
    train(model, optimizer, data)
    chosen = {id(c.weight): c.pattern.to_mask() for c in selections(optimizer)}
    masks = {name: chosen[id(model.get_parameter(name))] for name in ("0.weight", "2.weight")}
    oracle = torch.optim.AdamW([dense[0].weight, dense[2].weight], lr=0.02, weight_decay=0.1)
    for x in data:
        train(dense, oracle, [x])
        for name, mask in masks.items():
            weight = dense.get_parameter(name)
            weight.data = torch.where(mask, weight, start[name])
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, dense.state_dict()[name], rtol=0, atol=1e-10)
        assert name in masks or torch.equal(weight, start[name])


@pytest.mark.parametrize("optimizer_has", ["base", "no base"])
def test_each_entry_corrects_its_bias_by_its_own_age(optimizer_has):
    tensors = [torch.randn(5, 6), torch.randn(4, 7)]
    patterns = [pattern_for(w, 0.5) for w in tensors]
    layout, k = pack(patterns), sum(map(len, patterns))
    values = torch.cat([p.gather(w) for p, w in zip(patterns, tensors, strict=True)])
    base = values.clone() if optimizer_has == "base" else None
    grad, m, v = torch.randn(k), torch.randn(k) * 0.1, torch.rand(k) * 0.1
    step, born = torch.tensor([9, 4]), torch.randint(4, (k,), dtype=torch.int32)
    w = values.double()
    layer = torch.cat([torch.full((len(p),), i) for i, p in enumerate(patterns)])
    age = (step[layer] - born).double()
    new_m, new_v = 0.9 * m.double() + 0.1 * grad.double(), 0.99 * v.double() + 0.01 * grad.double() ** 2
    want = w - 0.02 * (new_m / (1 - 0.9**age)) / ((new_v / (1 - 0.99**age)).sqrt() + 1e-8)
    want -= 0.02 * 0.3 * (w - (w if base is not None else 0))
    versions = [t._version for t in tensors]
    sparse_adamw_(tensors, values, grad, m, v, layout, step=step, born=born, lr=torch.tensor(0.02), betas=(0.9, 0.99),
                  weight_decay=0.3, base=base)  # fmt: skip
    torch.testing.assert_close(values.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m.double(), new_m, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(v.double(), new_v, rtol=1e-6, atol=1e-7)
    assert torch.equal(torch.cat([p.gather(w) for p, w in zip(patterns, tensors, strict=True)]), values)
    assert all(t._version > version for t, version in zip(tensors, versions, strict=True))


def test_ages_of_entries_last_through_steps_and_state_dicts():
    model, x = mlp(), batches(3)
    optimizer = open_door("lean", model)
    train(model, optimizer, x[:1])
    for leaf in leaves_of(optimizer):
        optimizer.state[leaf]["born"] = torch.ones(len(leaf), dtype=torch.int32)
    optimizer._arenas = []
    state = optimizer.state_dict()
    assert all("born" in optimizer.state[leaf] for leaf in leaves_of(optimizer))  # asking changes nothing
    clone = copy.deepcopy(model)
    other = SparseAdamW(clone)
    other.load_state_dict(copy.deepcopy(state))
    train(model, optimizer, x[1:])
    train(clone, other, x[1:])
    assert same(weights(model), weights(clone))
    assert all(torch.equal(other.state[leaf]["born"], torch.ones(len(leaf))) for leaf in leaves_of(other))
    plain = SparseAdamW(clone)
    plain.load_state_dict(state | {"sparse": {n: e | {"born": None} for n, e in state["sparse"].items()}})
    assert not same(weights(model), weights(_trained(clone, plain, x[1:])))  # an age makes a difference


@pytest.mark.parametrize("door", DOORS)
def test_bf16_weights_keep_fp32_masters(door):
    model = Linear((4, 6), dtype=torch.bfloat16)
    model.weights[0].data.fill_(1.0)
    grads = [torch.ones(4, 6, dtype=torch.bfloat16)]
    optimizer, masks = run_steps(door, model, [grads] * 100, lr=1e-3, weight_decay=0.0)
    (leaf,) = leaves_of(optimizer)
    # a constant gradient: every step is -lr, an eighth of bf16's unit below 1; plain bf16 would never move
    torch.testing.assert_close(leaf.detach(), torch.full_like(leaf, 0.9), rtol=1e-5, atol=0)
    assert torch.equal(model.weights[0][masks[0]], torch.full((len(leaf),), 0.9).bfloat16())
    assert bool((model.weights[0][~masks[0]] == 1).all())
    assert all(optimizer.state[leaf][name].dtype == torch.float32 for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("door", DOORS)
def test_without_masters_small_steps_add_up_on_average(door):
    """As above, without fp32 masters; the bound (Azuma-Hoeffding) is that of tests/kernels/test_stochastic_rounding."""
    model = Linear((60, 90), dtype=torch.bfloat16)
    model.weights[0].data.fill_(1.0)
    grads, steps, spacing = [torch.ones(60, 90, dtype=torch.bfloat16)], 100, 2.0**-8
    optimizer, masks = run_steps(door, model, [grads] * steps, lr=1e-3, weight_decay=0.0, rounding_seed=3)
    (leaf,) = leaves_of(optimizer)
    assert leaf.dtype == torch.bfloat16 and torch.equal(leaf, selections(optimizer)[0].pattern.gather(model.weights[0]))
    bound = spacing * math.sqrt(steps * math.log(2 / 1e-12) / (2 * len(leaf)))
    assert abs(leaf.double().mean() - 0.9) <= bound < 0.1 / 10
    assert bool((model.weights[0][~masks[0]] == 1).all())
    assert all(optimizer.state[leaf][name].dtype == torch.float32 for name in ("exp_avg", "exp_avg_sq"))


def test_a_rounding_seed_leaves_wider_weights_alone():
    model, data = mlp(), batches(3)
    patterns, plain = patterns_for(model), copy.deepcopy(model)
    train(model, open_door("lean", model, patterns), data)
    train(plain, open_door("lean", plain, patterns, rounding_seed=1), data)
    assert same(weights(model), weights(plain))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_only_selected_entries_change_and_the_weight_is_the_rounded_master(door, dtype):
    model = mlp(dtype)
    start = weights(model)
    optimizer = open_door(door, model, lr=0.02)
    train(model, optimizer, batches(4, dtype))
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, start[name])}
    assert changed == {"0.weight", "2.weight"}
    for chosen in selections(optimizer):
        name = next(n for n, p in model.named_parameters() if p is chosen.weight)
        mask = chosen.pattern.to_mask()
        assert torch.equal(chosen.weight[~mask].view(torch.uint8), start[name][~mask].view(torch.uint8))
        assert torch.equal(chosen.pattern.gather(chosen.weight), chosen.values.to(dtype))
        assert torch.equal(chosen.base, chosen.pattern.gather(start[name]))


def test_a_step_advances_the_weights_version():
    model, x = mlp(), batches(1)[0]
    optimizer = open_door("lean", model)
    train(model, optimizer, [x])
    loss = model(x).sum()
    train(model, optimizer, [x])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- the contract of torch.optim ---------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
def test_a_closure_is_called_once_with_gradients_enabled(door):
    model, plain_model, data = mlp(), mlp(), batches(4)
    plain_model.load_state_dict(model.state_dict())
    patterns = patterns_for(model)
    optimizer, plain = open_door(door, model, patterns), open_door(door, plain_model, patterns)
    train(plain_model, plain, data)
    for x in data:
        calls: list[Tensor] = []

        def closure(x=x, calls=calls):
            optimizer.zero_grad()
            calls.append(model(x).square().mean())
            calls[-1].backward()
            return calls[-1]

        loss = optimizer.step(closure)
        assert len(calls) == 1 and loss is calls[0]
    assert same(weights(model), weights(plain_model))


def test_param_groups_and_add_param_group():
    model, data = mlp(), batches(3)
    sparsify(model, patterns_for(model))
    first, second = parameters(model)
    start = [leaf.detach().clone() for leaf in (first, second)]
    optimizer = SparseAdamW([{"params": first, "lr": 0.0}, {"params": [second]}], lr=0.01)
    train(model, optimizer, data)
    assert torch.equal(first, start[0]) and not torch.equal(second, start[1])
    late = SparseAdamW([second], lr=0.01)
    train(model, late, data)
    late.add_param_group({"params": [first], "lr": 0.1, "decay_to": "zero"})
    moments = late.state[second]["exp_avg"].clone()
    assert late.param_groups[1]["betas"] == (0.9, 0.999)
    late.zero_grad()
    first.grad = torch.ones_like(first)
    before = first.detach().clone()
    late.step()
    torch.testing.assert_close(before - first, 0.1 + 0.1 * 0.01 * before)  # a first step, with its own lr and decay
    assert torch.equal(late.state[second]["exp_avg"], moments)
    assert int(late.state[second]["step"]) == 3 and int(late.state[first]["step"]) == 1


def test_drop_in_param_groups_keep_their_options():
    model, data = mlp(), batches(3)
    groups = [{"params": [model[0].weight], "lr": 0.0}, {"params": model[2].parameters()}]
    start = weights(model)
    optimizer = SparseAdamW(groups, density=0.3)
    train(model, optimizer, data)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    assert torch.equal(model[0].weight, start["0.weight"]) and not torch.equal(model[2].weight, start["2.weight"])
    assert torch.equal(model[2].bias, start["2.bias"])


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_the_leaves(door, set_to_none):
    model, x = mlp(), batches(2)
    optimizer = open_door(door, model)
    train(model, optimizer, x)
    model(x[0]).sum().backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves_of(optimizer))
    optimizer.zero_grad(set_to_none)
    assert all(leaf.grad is None if set_to_none else not leaf.grad.any() for leaf in leaves_of(optimizer))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("kind", ["one_cycle", "lambda"])
def test_lr_schedulers(door, kind, tensor_lr):
    model = mlp()
    optimizer = open_door(door, model, lr=torch.tensor(0.01) if tensor_lr else 0.01)
    data, plain = batches(6), nn.Parameter(torch.zeros(1))
    reference = torch.optim.AdamW([plain], lr=0.01)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(each, max_lr=0.1, total_steps=7) if kind == "one_cycle"
        else torch.optim.lr_scheduler.LambdaLR(each, lambda step: 0.0 if step == 2 else 0.5**step)
        for each in (optimizer, reference)
    ]  # fmt: skip
    for number, x in enumerate(data):
        before = weights(model)
        train(model, optimizer, [x])
        reference.step()
        rate = float(optimizer.param_groups[0]["lr"])
        assert rate == pytest.approx(reference.param_groups[0]["lr"], rel=1e-6)
        assert optimizer.param_groups[0]["betas"] == reference.param_groups[0]["betas"]
        moved = max(float((weights(model)[n] - before[n]).abs().max()) for n in before)
        assert (moved > 0) == (rate > 0)
        if number == 0:  # without history each entry moves by lr, decay aside
            assert moved == pytest.approx(rate, rel=0.05)
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize("door", DOORS)
def test_grad_scaler_with_an_overflow_first(door):
    model, data = mlp(), batches(4)
    plain_model = copy.deepcopy(model)
    patterns = patterns_for(model)
    optimizer, plain = open_door(door, model, patterns), open_door(door, plain_model, patterns)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, backoff_factor=2.0**-90)
    start = weights(model)
    for number, x in enumerate([data[0], *data]):
        optimizer.zero_grad()
        factor = 1.0 if number else 1e30  # the first scaled gradient overflows
        scaler.scale(model(x).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (number == 0) == same(weights(model), start)
    assert scaler.get_scale() == 2.0**10
    train(plain_model, plain, data)
    assert same(weights(model), weights(plain_model))  # a power of two scales without rounding
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("door", DOORS)
def test_clipping_the_leaves_clips_the_norm_over_all_selected_entries(door):
    model, x = mlp(), batches(2)
    optimizer = open_door(door, model)
    train(model, optimizer, x[:1])
    dense = mlp()
    dense.load_state_dict(model.state_dict())
    optimizer.zero_grad()
    dense(x[1]).square().sum().backward()
    model(x[1]).square().sum().backward()
    leaves = leaves_of(optimizer)
    picked = [c.pattern.gather(layer.weight.grad) for c, layer in zip(selections(optimizer), dense[::2], strict=True)]
    norm = torch.nn.utils.clip_grad_norm_(leaves if door == "drop-in" else model.parameters(), 0.1)
    torch.testing.assert_close(norm, torch.cat(picked).norm())
    torch.testing.assert_close(torch.cat([leaf.grad for leaf in leaves]).norm(), torch.tensor(0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("door", DOORS)
def test_accumulated_micro_batches_equal_one_batch(door):
    model, (first, big) = mlp(torch.float64), batches(2, torch.float64, size=12)
    other, patterns = copy.deepcopy(model), patterns_for(model)
    whole, parts = open_door(door, model, patterns), open_door(door, other, patterns)
    for m, optimizer in ((model, whole), (other, parts)):
        train(m, optimizer, [first])
    model(big).square().sum().backward()
    for part in big.split(4):
        other(part).square().sum().backward()
    assert other[0].weight.grad is None and other[2].weight.grad is None
    whole.step()
    parts.step()
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, other.state_dict()[name], rtol=0, atol=1e-10)


def test_accumulation_from_the_first_drop_in_backward_on():
    model, x = mlp(torch.float64), torch.randn(12, 6).double()
    dense = copy.deepcopy(model)
    optimizer = SparseAdamW(model, density=0.4)
    for part in x.split(4):
        model(part).square().sum().backward()
    dense(x).square().sum().backward()
    for chosen in selections(optimizer):
        layer = dense[0] if chosen.weight is model[0].weight else dense[2]
        torch.testing.assert_close(chosen.values.grad, chosen.pattern.gather(layer.weight.grad), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("door", DOORS)
def test_layers_without_a_gradient_are_not_stepped(door):
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)})
    optimizer, x = open_door(door, model), batches(1)[0]
    (model["a"](x) + model["b"](x)).square().sum().backward()
    optimizer.step()
    before = weights(model)
    for _ in range(3):
        optimizer.zero_grad()
        model["b"](x).square().sum().backward()
        optimizer.step()
    after = weights(model)
    assert torch.equal(after["a.weight"], before["a.weight"]) and not torch.equal(after["b.weight"], before["b.weight"])
    steps = {id(c.weight): int(optimizer.state[c.values]["step"]) for c in selections(optimizer)}
    assert steps == {id(model["a"].weight): 1, id(model["b"].weight): 4}
    optimizer.zero_grad()
    optimizer.step()  # no gradient at all
    assert same(weights(model), after) and optimizer.skipped_steps == 0


# ---- state ----------------------------------------------------------------------------------------------------


def _through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("order", ["model first", "optimizer first", "optimizer only"])
@pytest.mark.parametrize(
    ("dtype", "seed"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 5)], ids=str
)
def test_a_resumed_run_continues_bit_for_bit(door, dtype, seed, order):
    model, data = mlp(dtype), batches(7, dtype)
    patterns, pretrained = patterns_for(model), weights(model)
    options = {"lr": 3e-3, "weight_decay": 0.3, "rounding_seed": seed}
    optimizer = open_door(door, model, patterns, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(model, optimizer, data[:3])
    scheduler.step()
    saved = _through_a_file(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "lr": scheduler.state_dict()}
    )
    train(model, optimizer, data[3:])

    fresh = mlp(dtype)
    fresh.load_state_dict(pretrained if order == "optimizer only" else saved["model"])
    resumed = open_door(door, fresh, patterns, lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(resumed, 0.9)
    if order == "model first":
        fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["lr"])
    if order == "optimizer first":
        fresh.load_state_dict(saved["model"])
    assert same(weights(fresh), saved["model"])
    train(fresh, resumed, data[3:])
    assert same(weights(fresh), weights(model))
    for mine, theirs in zip(leaves_of(resumed), leaves_of(optimizer), strict=True):
        assert torch.equal(mine, theirs) and torch.equal(resumed._selected(mine).base, optimizer._selected(theirs).base)
        assert all(torch.equal(resumed.state[mine][key], value) for key, value in optimizer.state[theirs].items())


@pytest.mark.parametrize("door", DOORS)
def test_a_state_dict_does_not_follow_the_optimizer(door):
    model, data = mlp(), batches(4)
    optimizer = open_door(door, model)
    train(model, optimizer, data[:2])
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    kept = copy.deepcopy(state)
    train(model, optimizer, data[2:])
    for number, entry in kept["sparse"].items():
        assert torch.equal(state["sparse"][number]["values"], entry["values"])
        assert torch.equal(state["state"][number]["exp_avg"], kept["state"][number]["exp_avg"])


def test_a_waiting_optimizer_has_a_state_dict():
    model, other, data = mlp(), mlp(), batches(2)
    other.load_state_dict(model.state_dict())
    optimizer, fresh = SparseAdamW(model, density=0.2), SparseAdamW(other, density=0.2)
    fresh.load_state_dict(_through_a_file(optimizer.state_dict()))
    train(model, optimizer, data)
    train(other, fresh, data)
    assert same(weights(model), weights(other))


def _wrong_state(kind: str, door: str) -> dict:
    if kind == "torch":
        return torch.optim.AdamW(mlp().parameters()).state_dict()
    other = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)) if kind == "shape" else mlp()
    if kind == "groups":
        patterns = patterns_for(other)
        if door == "lean":
            sparsify(other, patterns)
            optimizer = SparseAdamW([{"params": [leaf]} for leaf in parameters(other)])
        else:
            optimizer = SparseAdamW([{"params": [other[0].weight]}, {"params": [other[2].weight]}], density=0.3)
    else:
        optimizer = open_door({"lean": "drop-in", "drop-in": "lean"}[door] if kind == "other door" else door, other)
    train(other, optimizer, batches(1))
    return optimizer.state_dict()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["torch", "shape", "groups", "other door"])
def test_a_state_dict_of_another_run_is_refused_and_changes_nothing(door, kind):
    state = _wrong_state(kind, door)
    model, data = mlp(), batches(2)
    twin, patterns = copy.deepcopy(model), patterns_for(model)
    optimizer, expected = open_door(door, model, patterns), open_door(door, twin, patterns)
    if door == "lean" and kind == "groups":  # the same patterns, grouped otherwise
        state["sparse"] = {}
    with pytest.raises(ValueError, match=r"state_dict|parameter group"):
        optimizer.load_state_dict(state)
    train(model, optimizer, data)
    train(twin, expected, data)
    assert same(weights(model), weights(twin))


def test_an_optimizer_of_other_patterns_is_refused():
    model, other = mlp(), mlp()
    optimizer, wrong = open_door("lean", model), open_door("lean", other)
    train(other, wrong, batches(1))
    with pytest.raises(ValueError, match="another pattern"):
        optimizer.load_state_dict(wrong.state_dict())


# ---- bad gradients --------------------------------------------------------------------------------------------


def _everything(model: nn.Module, optimizer: SparseAdamW) -> list[Tensor]:
    states = [t for leaf in leaves_of(optimizer) for t in optimizer.state[leaf].values()]
    return [t.detach().clone() for t in (*model.state_dict().values(), *leaves_of(optimizer), *states)]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_step_with_a_nonfinite_gradient_is_skipped_and_counted(door, bad):
    model, x = mlp(), batches(3)
    optimizer = open_door(door, model)
    train(model, optimizer, x[:1])
    model(x[1]).square().mean().backward()
    before = _everything(model, optimizer)
    leaves_of(optimizer)[1].grad[2] = bad  # one entry of one layer: no layer may move
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, _everything(model, optimizer), strict=True))
    train(model, optimizer, x[2:])
    assert optimizer.skipped_steps == 1
    assert not all(torch.equal(a, b) for a, b in zip(before, _everything(model, optimizer), strict=True))


@pytest.mark.parametrize("door", DOORS)
def test_raise_mode_raises_changes_nothing_and_recovers(door):
    model, x = mlp(), batches(3)
    optimizer = open_door(door, model, on_nonfinite="raise")
    train(model, optimizer, x[:1])
    before = _everything(model, optimizer)
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        train(model, optimizer, [x[1] * math.inf])
    assert all(torch.equal(a, b) for a, b in zip(before, _everything(model, optimizer), strict=True))
    model.zero_grad()
    model(x[2]).square().mean().backward()
    optimizer.step()
    assert not all(torch.equal(a, b) for a, b in zip(before, _everything(model, optimizer), strict=True))


@pytest.mark.parametrize("criterion", ["sampled", "balanced", "grad", "taylor"])
@pytest.mark.parametrize("allocation", ["global", "layer"])
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_nonfinite_first_backward_does_not_select(criterion, allocation, bad):
    model, twin = Linear(*SHAPES), Linear(*SHAPES)
    twin.load_state_dict(model.state_dict())
    options = {"density": 0.2, "criterion": criterion, "allocation": allocation}
    optimizer, expected = SparseAdamW(model, **options), SparseAdamW(twin, **options)
    start, broken, good = weights(model), random_grads(), random_grads()
    broken[1].view(-1)[7] = bad
    model(broken).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1 and same(weights(model), start)
    for m, each in ((model, optimizer), (twin, expected)):
        each.zero_grad()
        m(good).backward()
        each.step()
    assert same(weights(model), weights(twin)) and not same(weights(model), start)
    assert optimizer.skipped_steps == 1 and expected.skipped_steps == 0
    strict = SparseAdamW(Linear(*SHAPES), on_nonfinite="raise", **options)
    torch.autograd.backward([(p * g).sum() for p, g in zip(leaves_of(strict), broken, strict=True)])
    with pytest.raises(FloatingPointError):
        strict.step()


# ---- the drop-in door -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("criterion", "ties"), [  # a quotient of tied gradients is tied but for its rounding
    ("grad", False), ("grad", True), ("taylor", False), ("taylor", True), ("balanced", False),
    ("sampled", False)])  # fmt: skip
@pytest.mark.parametrize("allocation", ["global", "layer"])
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_the_first_backward_selects_the_exact_top_entries(criterion, allocation, ties, density):
    model = Linear((9, 11), (4, 30), (2, 3, 8))
    grads = [torch.randint(-3, 4, w.shape).float() if ties else torch.randn(w.shape) for w in model.weights]
    if ties:
        for w in model.weights:
            w.data = torch.randint(-2, 3, w.shape).float()
    score = {"grad": lambda g, w: g, "taylor": lambda g, w: g * w.detach(), "balanced": lambda g, w: balanced(g)}
    pairs = zip(grads, model.weights, strict=True)
    if criterion == "sampled":
        scores = [(balanced(g) / times(g.shape, i)).abs().flatten() for i, (g, _) in enumerate(pairs)]
    else:
        scores = [score[criterion](g, w).abs().flatten() for g, w in pairs]
    if allocation == "global":
        joined = torch.cat(scores)
        best = torch.sort(joined, descending=True, stable=True).indices[: round(density * len(joined))]
        flat = torch.zeros(len(joined), dtype=torch.bool).index_fill(0, best, True).split([len(s) for s in scores])
    else:
        flat = []
        for s in scores:
            best = torch.sort(s, descending=True, stable=True).indices[: round(density * len(s))]
            flat.append(torch.zeros(len(s), dtype=torch.bool).index_fill(0, best, True))
    optimizer = SparseAdamW(model, density=density, criterion=criterion, allocation=allocation)
    model(grads).backward()
    expected = {i: mask for i, mask in enumerate(flat) if bool(mask.any())}
    chosen = {i: c for i, w in enumerate(model.weights) for c in selections(optimizer) if c.weight is w}
    assert list(chosen) == list(expected)
    for i, mask in expected.items():
        assert torch.equal(chosen[i].pattern.to_mask().flatten(), mask)
        assert torch.equal(chosen[i].values.grad, chosen[i].pattern.gather(grads[i]))  # and it is a step's gradient too


def balanced(g: Tensor) -> Tensor:
    """In fp64, over the square root of the gradient's rank-one second moment."""
    matrix = g.double().reshape(-1, g.shape[-1])
    second = torch.outer((matrix**2).sum(1), (matrix**2).sum(0)) / (matrix**2).sum()
    return matrix / second.sqrt()


def times(shape: torch.Size, position: int) -> Tensor:
    """The waiting times that the parameter at this position has in the draw, [-1, last dimension]."""
    uniform = torch.rand(shape, generator=generator(str(position), 0))
    return (-torch.log1p(-uniform.double())).clamp(min=2.0**-25).reshape(-1, shape[-1])


def test_never_two_dense_gradients_alive():
    model = nn.Sequential(*[m for _ in range(5) for m in (nn.Linear(12, 12, bias=False), nn.Tanh())])
    optimizer = SparseAdamW(model, density=0.1)
    alive: list[StorageWeakRef] = []
    most: list[int] = []

    def watch(grad: Tensor) -> None:
        alive.append(StorageWeakRef(grad.untyped_storage()))
        most.append(sum(not ref.expired() for ref in alive))

    for layer in model[::2]:
        layer.weight.register_hook(watch)
    for _ in range(3):  # the selecting backward, and later ones
        model(torch.randn(3, 12)).square().sum().backward()
        assert all(layer.weight.grad is None for layer in model[::2])
        optimizer.step()
    assert len(most) == 15 and max(most) == 1


def test_reentrant_checkpointing_is_refused_and_the_other_kind_works():
    model, x = nn.Sequential(mlp(), nn.Linear(5, 3)), torch.randn(4, 6, requires_grad=True)
    plain = copy.deepcopy(model)
    optimizer, expected = SparseAdamW(model, density=0.3), SparseAdamW(plain, density=0.3)
    start = weights(model)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model[1](checkpoint(model[0], x, use_reentrant=True)).square().sum().backward()
    optimizer.step()
    assert same(weights(model), start)
    optimizer.zero_grad()
    model[1](checkpoint(model[0], x, use_reentrant=False)).square().sum().backward()
    plain[1](plain[0](x)).square().sum().backward()
    optimizer.step()
    expected.step()
    assert same(weights(model), weights(plain)) and not same(weights(model), start)


def test_a_first_backward_that_failed_half_way_leaves_nothing_behind():
    model, (bad, good) = mlp(), batches(2)
    twin = copy.deepcopy(model)
    optimizer, expected = SparseAdamW(model, density=0.3), SparseAdamW(twin, density=0.3)
    handle = model[0].weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # the second layer's gradient had been taken by then
        model(bad * 100).square().sum().backward()
    handle.remove()
    train(model, optimizer, [good])
    train(twin, expected, [good])
    assert same(weights(model), weights(twin)) and len(optimizer.state) == 2


def test_models_named_parameters_and_bare_parameters():
    model = nn.Sequential(nn.Embedding(8, 6), mlp(), nn.LayerNorm(5))
    model[1][0].weight.requires_grad_(False)
    named = SparseAdamW(model.named_parameters(), density=0.2)
    assert named.param_groups[0]["param_names"] == ["0.weight", "1.2.weight"]
    model = nn.Sequential(nn.Embedding(8, 6), mlp(), nn.LayerNorm(5))
    assert [tuple(p.shape) for p in leaves_of(SparseAdamW(model.parameters(), density=0.2))] == [(8, 6), (9, 6), (5, 9)]
    model = nn.Sequential(nn.Embedding(8, 6), mlp(), nn.LayerNorm(5))
    model[1][0].weight.requires_grad_(False)
    assert [tuple(p.shape) for p in leaves_of(SparseAdamW(model, density=0.2))] == [(5, 9)]
    model = nn.Sequential(nn.Embedding(8, 6), mlp(), nn.LayerNorm(5))
    picked = SparseAdamW(model, density=0.2, include="1.0", exclude="1.2")
    assert [tuple(p.shape) for p in leaves_of(picked)] == [(9, 6)]


def test_unselected_parameters_never_keep_a_dense_gradient():
    model = Linear((5, 5), (5, 5))
    optimizer = SparseAdamW(model, density=0.2, allocation="global")
    for _ in range(2):
        model([torch.ones(5, 5), torch.zeros(5, 5)]).backward()
        assert all(w.grad is None for w in model.weights)
        optimizer.step()
    assert len(leaves_of(optimizer)) == 1


def test_training_goes_on_after_the_model_moved_to_another_dtype():
    model, data = mlp(), batches(4)
    optimizer = open_door("lean", model)
    train(model, optimizer, data[:2])
    moments = [optimizer.state[leaf]["exp_avg"].clone() for leaf in parameters(model)]
    model.double()
    train(model, optimizer, [data[2].double()])
    model.bfloat16()
    assert all(torch.isfinite(m).all() and m.abs().sum() > 0 for m in moments)
    train(model, optimizer, [data[3].bfloat16()])
    for chosen in selected(model).values():
        assert chosen.weight.dtype == torch.bfloat16 and chosen.values.dtype == torch.float32
        assert torch.equal(chosen.pattern.gather(chosen.weight), chosen.values.bfloat16())
        assert int(optimizer.state[chosen.values]["step"]) == 4
        assert optimizer.state[chosen.values]["exp_avg"].dtype == torch.float32


def test_moved_storage_is_followed():
    model, twin, data = mlp(), mlp(), batches(4)
    twin.load_state_dict(model.state_dict())
    patterns = patterns_for(model)
    optimizer, expected = open_door("lean", model, patterns), open_door("lean", twin, patterns)
    train(twin, expected, data)
    train(model, optimizer, data[:2])
    for p in model.parameters():  # as model.to(device) does
        p.data = p.data.clone()
    train(model, optimizer, data[2:])
    assert same(weights(model), weights(twin))
    assert all(torch.equal(c.values, c.pattern.gather(c.weight)) for c in selected(model).values())


# ---- bad arguments --------------------------------------------------------------------------------------------

BAD = {
    "lr": ({"lr": -1.0}, "lr must be one number >= 0, got -1.0"),
    "lr nan": ({"lr": math.nan}, "lr must be one number >= 0"),
    "beta1": ({"betas": (1.0, 0.9)}, r"betas must be two numbers in \[0, 1\), got \(1.0, 0.9\)"),
    "beta2": ({"betas": (0.9, -0.1)}, r"betas must be two numbers in \[0, 1\), got \(0.9, -0.1\)"),
    "eps": ({"eps": -1e-8}, "eps must be >= 0"),
    "weight_decay": ({"weight_decay": -0.1}, "weight_decay must be >= 0"),
    "decay_to": ({"decay_to": "mean"}, "decay_to must be 'pretrained' or 'zero', got 'mean'"),
    "rounding_seed": ({"rounding_seed": 0.5}, "rounding_seed must be an integer or None, got 0.5"),
    "on_nonfinite": ({"on_nonfinite": "ignore"}, "on_nonfinite must be 'skip' or 'raise', got 'ignore'"),
}
BAD_DROP_IN = {
    "density 0": ({"density": 0.0}, r"density must lie in \(0, 1\], got 0.0"),
    "density 2": ({"density": 2}, r"density must lie in \(0, 1\], got 2"),
    "density nan": ({"density": math.nan}, r"density must lie in \(0, 1\]"),
    "density text": ({"density": "1%"}, r"density must lie in \(0, 1\], got .1%."),
    "density none": ({"density": 1e-6}, "selects no entry"),
    "criterion": ({"criterion": "magic"}, "criterion must be one of .*, got 'magic'"),
    "allocation": ({"allocation": "row"}, "allocation must be 'global' or 'layer', got 'row'"),
    "include": ({"include": "nothing"}, "matches nothing|matches no weight"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(door, case):
    kwargs, message = BAD[case]
    model = mlp() if door == "drop-in" else sparsify(mlp(), patterns_for(mlp()))
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        SparseAdamW(model, **({"density": 0.3} if door == "drop-in" else {}), **kwargs)
    SparseAdamW(model, **({"density": 0.3} if door == "drop-in" else {}))  # the refused one left no hooks behind
    assert same(weights(model), before)


@pytest.mark.parametrize("case", BAD_DROP_IN)
def test_bad_drop_in_arguments_are_named(case):
    kwargs, message = BAD_DROP_IN[case]
    model = mlp()
    with pytest.raises(ValueError, match=message):
        SparseAdamW(model, **({"density": 0.3} | kwargs))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    SparseAdamW(model, density=0.3)


def test_parameters_that_do_not_fit_are_refused():
    plain, sparse = mlp(), sparsify(mlp(), patterns_for(mlp()))
    for params, kwargs, error, message in (
        (plain, {}, ValueError, "no selected entries; sparsify it first, or give density="),
        (plain.parameters(), {}, ValueError, "no selected entries"),
        (sparse, {"density": 0.1}, ValueError, "sparsified already"),
        (plain[0].weight, {}, TypeError, "must be a model or an iterable"),
        ([], {}, ValueError, "no parameter is left"),
        ([p for p in plain.parameters() if p.dim() == 1], {"density": 0.1}, ValueError, "no parameter is left"),
        (plain.parameters(), {"density": 0.1, "include": "0"}, ValueError, "pass the model"),
    ):
        with pytest.raises(error, match=message):
            SparseAdamW(params, **kwargs)
    assert leaves_of(SparseAdamW(sparse.parameters())) == parameters(sparse)  # frozen ones may come along


def test_a_group_that_does_not_fit_is_not_added():
    model, other = sparsify(mlp(), patterns_for(mlp())), mlp()
    first, second = parameters(model)
    optimizer = SparseAdamW([first])
    for group in ({"params": [other[0].weight]}, {"params": [second], "lr": -1.0}):
        with pytest.raises(ValueError, match=r"no selected entries|lr must be"):
            optimizer.add_param_group(group)
        assert leaves_of(optimizer) == [first]
    drop_in = SparseAdamW(other, density=0.3)
    with pytest.raises(ValueError, match="constructor"):
        drop_in.add_param_group({"params": [nn.Linear(2, 2).weight]})
    train(other, drop_in, batches(1))
    with pytest.raises(ValueError, match="constructor"):
        drop_in.add_param_group({"params": [nn.Linear(2, 2).weight]})


def test_one_model_takes_one_drop_in_optimizer():
    model = mlp()
    optimizer = SparseAdamW(model, density=0.3)
    for _ in range(2):
        with pytest.raises(ValueError, match="another sparseft optimizer"):
            SparseAdamW(model, density=0.3)
        train(model, optimizer, batches(1))


@pytest.mark.parametrize("door", DOORS)
def test_training_goes_on_after_an_overflow_when_only_the_model_is_zeroed(door):
    """As transformers' Trainer does: what an overflow left in the leaves must not stay there."""
    model, data = mlp(), batches(6)
    optimizer = open_door(door, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    moved = []
    for number, x in enumerate(data):
        before = weights(model)
        model.zero_grad()
        scaler.scale(model(x).square().mean() * (1e38 if number == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not same(weights(model), before))
    assert moved == [True, True, False, True, True, True]
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_goes_on_from_weights_that_somebody_else_wrote(door, dtype):
    model, data = mlp(dtype), batches(3, dtype)
    optimizer = open_door(door, model, weight_decay=0.0)
    train(model, optimizer, data[:2])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, data[2:])
    assert all(not parameter.any() for name, parameter in model.named_parameters() if not name.endswith("values"))


def test_the_drop_in_door_checks_its_parameters_at_once():
    with pytest.raises(ValueError, match="contiguous"):
        SparseAdamW([nn.Parameter(torch.randn(6, 4).T)], density=0.5)
    with pytest.raises(ValueError, match="tile"):
        SparseAdamW([nn.Parameter(torch.randn(6, 4))], density=0.5, tile=(1000, 1000))
    embedding = nn.Embedding(5, 4, sparse=True)
    SparseAdamW(embedding.parameters(), density=0.5)
    with pytest.raises(TypeError, match="sparse=False"):
        embedding(torch.tensor([1, 2])).sum().backward()
