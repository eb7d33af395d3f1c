"""Lean gated MLPs: the plain MLP's bits forward, exact gradients, nothing kept but the product's two sources."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from sparseft import Pattern, backend, densify, sparsify
from sparseft.gated import ACTIVATIONS, Gated, LeanMLP, lean_mlps
from sparseft.layers import selected
from sparseft.recompute import source

from . import tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def mlp(act: str = "silu", plain: type[nn.Module] = LlamaMLP) -> nn.Module:
    return plain(LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2, hidden_act=act))


class Swapped(LlamaMLP):
    """The activation on the other factor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Clamped(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(-3, 3))


class Choosy(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("no such shape here")


class WithChild(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.dropout = nn.Dropout(0.5)


class WithDropout(LlamaMLP):
    """As the formula in evaluation only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x), 0.5, self.training))


class Narrowing(LlamaMLP):
    """Differs in fp64 only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x).float()).to(x.dtype) * self.up_proj(x))


class Careful(LlamaMLP):
    """Differs where fp16 overflows."""

    def forward(self, x: Tensor) -> Tensor:
        product = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(product.clamp(-65504, 65504) if product.dtype == torch.float16 else product)


class Open(LlamaMLP):
    def forward(self, *args) -> Tensor:
        return super().forward(*args)


class Recording(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return super().forward(x)


class Logging(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.log: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(float(x.sum()))
        return super().forward(x)


class Registered(LlamaMLP):
    def __init_subclass__(cls, name: str, **kwargs):
        super().__init_subclass__(**kwargs)


class Pickling(LlamaMLP):
    def __reduce__(self):
        return mlp, ()


class Calling(LlamaMLP):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(2 * x)


class Own(LlamaMLP):
    """The formula, with a life of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.plain, self._act = "mine", "mine, too"

    def forward(self, hidden_state: Tensor) -> Tensor:
        return super().forward(hidden_state)

    def chunked(self, x: Tensor) -> Tensor:
        return torch.cat([self(chunk) for chunk in x.split(2)])


def sparse(module: nn.Module) -> nn.Module:
    down = module.get_parameter("down_proj.weight")
    return sparsify(module, {"down_proj.weight": Pattern.from_mask(torch.rand(down.shape) < 0.5)})


@pytest.mark.parametrize(("name", "act"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh")])
def test_mlps_of_the_formula_become_lean_and_come_back(name, act):
    plain = mlp(name)
    lean = sparse(copy.deepcopy(plain))
    assert isinstance(lean, LeanMLP) and isinstance(lean, LlamaMLP) and lean._sparseft_fixed[0] == act
    x = 5 * torch.randn(3, 4, 12)
    for other in (lean, copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
        assert type(other) is type(lean) and torch.equal(other(x), plain(x))
    densify(lean)
    assert type(lean) is LlamaMLP and lean.__dict__.keys() == plain.__dict__.keys() and torch.equal(lean(x), plain(x))


OTHERS = (
    Swapped,
    Clamped,
    Choosy,
    WithChild,
    WithDropout,
    Narrowing,
    Careful,
    Open,
    Recording,
    Logging,
    Registered,
    Pickling,
    Calling,
)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("act, plain", [("relu", LlamaMLP), ("gelu_new", LlamaMLP), *(("silu", p) for p in OTHERS)])
def test_mlps_of_another_formula_stay(act, plain, training):
    module = mlp(act, plain).train(training)
    before, state = type(module), torch.get_rng_state()
    lean_mlps(module)
    assert type(module) is before and torch.equal(torch.get_rng_state(), state) and not getattr(module, "log", [])


def test_a_traced_mlp_stays():
    model = nn.Sequential(nn.Linear(12, 12), torch.jit.trace(mlp(), torch.randn(2, 12)))
    before = [type(module) for module in model.modules()]
    lean_mlps(model)
    assert [type(module) for module in model.modules()] == before


def test_a_lean_mlp_keeps_what_its_class_has():
    plain = mlp(plain=Own)
    lean = sparse(copy.deepcopy(plain))
    x = torch.randn(4, 12)
    assert isinstance(lean, Own) and isinstance(lean, LeanMLP) and type(lean).__name__ == "Own"
    assert torch.equal(lean.chunked(x), plain.chunked(x)) and torch.equal(lean(hidden_state=x), plain(x))
    with pytest.raises(TypeError, match="hidden_state"):
        lean()
    densify(lean)
    assert (lean.plain, lean._act) == ("mine", "mine, too") and type(lean) is Own


def test_another_activation_or_forward_is_called(monkeypatch):
    lean = sparse(mlp())
    assert isinstance(lean, LeanMLP)
    lean.act_fn = nn.ReLU()
    x = torch.randn(4, 12)
    assert torch.equal(lean(x), LlamaMLP.forward(lean, x))
    lean.act_fn = copy.deepcopy(mlp().act_fn)
    lean.act_fn.forward = lambda gate: gate * 0
    assert not lean(x).any()
    patched = sparse(mlp())
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: x)
    assert torch.equal(patched(x), x)


def test_an_mlp_with_a_hook_on_its_activation_calls_it():
    first, later = mlp(), mlp()
    seen: list[tuple[int, ...]] = []
    first.act_fn.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    lean_mlps(first)
    assert type(first) is LlamaMLP and not seen
    lean_mlps(later)
    assert isinstance(later, LeanMLP)
    later.act_fn.register_forward_hook(lambda module, args, output: output * 0)
    assert not later(torch.randn(2, 12)).any()


@pytest.mark.parametrize("name", [None, "reference"])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 7), (1,), (5, 33), (3, 2, 17), (300, 256)], ids=str)
def test_the_plain_products_bits_and_exact_gradients(shape, dtype, act, name):
    torch.manual_seed(0)
    gate, up = ((4 * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(shape).to(dtype)
    with backend.forced(name):
        out = Gated.apply(gate, up, act)
        assert torch.equal(out, ACTIVATIONS[act].forward(gate) * up)
        found = torch.autograd.grad(out, (gate, up), grad)
    wide = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()
    expected = torch.autograd.grad(ACTIVATIONS[act].forward(wide[0]) * wide[1], wide, grad.double())
    # torch's formula rounds three times to the dtype (grad * up, the derivative, act(gate) for up's), each within half
    # of eps, the functions inside are good to a few units of fp32, and the derivative is a difference of numbers of
    # up to 1.5, times grad * up
    eps = 1.5 * torch.finfo(dtype).eps + (8 * torch.finfo(torch.float32).eps if dtype != torch.float64 else 0)
    for got, want, scale in zip(found, expected, ((grad * up).detach().abs(), grad.abs()), strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        assert ((got.double() - want).abs() <= eps * (want.abs() + 1.5 * scale.double())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_gradient_is_lost_far_out(dtype):
    """Where e^x leaves fp32's range, the gradients are the limits; NaN stays NaN."""
    gate = torch.tensor([-1e30, -200.0, 87.0, 88.0, 1e30, 0.0, -86.0, torch.nan], dtype=dtype)
    up = torch.full_like(gate, 2.0)
    grad_gate, grad_up = torch.ops.sparseft_cpu.silu_product_backward(torch.ones_like(gate), gate, up)
    assert grad_gate[:6].tolist() == [0, 0, 2, 2, 2, 1]
    assert grad_up[:6].tolist() == [0, 0, 87, 88, float(gate[4]), 0]
    x = gate[6].double()  # the derivative e^x (1 + x) there, and x e^x
    for got, want in ((grad_gate[6], 2 * x.exp() * (1 + x)), (grad_up[6], x.exp() * x)):
        assert abs(got.double() / want - 1) <= torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps
    assert torch.isnan(grad_gate[7]) and torch.isnan(grad_up[7])


def test_what_does_not_fit_is_refused():
    x = torch.zeros(4)
    product = torch.ops.sparseft_cpu.silu_product_backward
    for args, message in (((x, x, torch.zeros(5)), r"up must be \[4\]"), ((x, x.bfloat16(), x), "up must be BFloat16"),
                          ((x[::2], x[:2], x[:2]), "grad_out must be contiguous"),
                          ((x.double(),) * 3, "expected float32 or bfloat16")):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            product(*args)


def test_only_what_is_asked_for_has_a_gradient():
    up = torch.randn(3, 5)
    gate = torch.randn(3, 5, requires_grad=True)
    Gated.apply(gate, up, "silu").sum().backward()
    assert gate.grad is not None and up.grad is None
    assert Gated.apply(gate, up, "silu").sum().item() == (F.silu(gate) * up).sum().item()


def test_factors_of_two_dtypes_multiply_as_in_the_plain_mlp():
    plain = mlp()
    plain.up_proj.to(torch.bfloat16)
    plain.up_proj.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
    lean = copy.deepcopy(plain)
    lean_mlps(lean)
    x = torch.randn(4, 12)
    assert isinstance(lean, LeanMLP) and torch.equal(lean(x), plain(x)) and lean(x).dtype == torch.float32


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 15, 33, 64])
def test_columns_come_back(tokens, dtype, act):
    gate, up = ((3 * torch.randn(tokens, 75)).to(dtype).requires_grad_() for _ in range(2))
    out = Gated.apply(gate, up, act)
    formula, kept = source(out)
    chosen = torch.randperm(75)[:50].to(torch.int32)
    assert {id(t) for t in kept} == {id(gate), id(up)}
    # an activation at another place in a vector: a few units of what its terms are as large as
    error = (formula(chosen, *kept) - out.T[chosen.long()]).abs()
    assert (error <= 4 * torch.finfo(dtype).eps * (gate * up).abs().T[chosen.long()]).all()


@pytest.mark.parametrize("how", ["checkpointing", "reentrant", "autocast", "compile"])
def test_a_sparse_model_trains_through_lean_mlps(how):
    plain = tiny.llama()
    ids = torch.randint(4, 50, (2, 16))
    masks = {name: torch.rand(p.shape) < 0.2 for name, p in plain.named_parameters() if ".mlp." in name}
    model = copy.deepcopy(plain)
    sparsify(model, {name: Pattern.from_mask(mask, tile=(8, 8)) for name, mask in masks.items()})
    assert sum(isinstance(module, LeanMLP) for module in model.modules()) == plain.config.num_hidden_layers
    for each in (plain, model):
        if how in ("checkpointing", "reentrant"):
            each.train()
            each.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
            each.get_input_embeddings().register_forward_hook(lambda *io: io[2].requires_grad_())
        run = torch.compile(each, backend="aot_eager") if how == "compile" else each
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            run(input_ids=ids, labels=ids).loss.backward()
    # fp32: sums of 32 tokens in another order. bf16: each factor of an activation's gradient is rounded once less
    eps = torch.finfo(torch.bfloat16).eps if how == "autocast" else 32 * torch.finfo(torch.float32).eps
    for name, chosen in selected(model).items():
        dense = plain.get_parameter(name).grad
        torch.testing.assert_close(
            chosen.values.grad, chosen.pattern.gather(dense), rtol=4 * eps, atol=4 * eps * float(dense.abs().max())
        )
