"""Lean RMSNorms: the plain norm's bits forward, exact gradients, nothing kept but the input and 1/rms."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sparseft import Pattern, densify, reselect, sparsify
from sparseft.layers import selected
from sparseft.norms import LeanRMSNorm, RMSNorm, lean_norms
from sparseft.recompute import source

from . import tiny


class OtherRMSNorm(LlamaRMSNorm):
    """Gemma's formula."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return (1 + self.weight) * (super().forward(hidden_states) / self.weight)


class OlmoRMSNorm(LlamaRMSNorm):
    """Rounds after the weight: differs from Llama's only where x is narrower than the weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * normed).to(hidden_states.dtype)


class ChoosyRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        raise AssertionError("no such shape here")


def pair(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    plain = LlamaRMSNorm(37, eps=1e-5).to(dtype)
    nn.init.normal_(plain.weight)
    lean = copy.deepcopy(plain)
    lean_norms(lean)
    assert isinstance(lean, LeanRMSNorm) and isinstance(lean, LlamaRMSNorm)
    return plain, lean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_forward_and_exact_gradients(dtype):
    plain, lean = pair(dtype)
    x = torch.randn(3, 5, 37).to(dtype).requires_grad_()
    up = torch.randn(3, 5, 37).to(dtype)
    assert torch.equal(plain(x), lean(x))
    found = torch.autograd.grad(lean(x), (x, lean.weight), up)
    wide, weight = x.detach().double().requires_grad_(), plain.weight.detach().double().requires_grad_()
    oracle = weight * wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = torch.autograd.grad(oracle, (wide, weight), up.double())
    # fp32 inside: sums of 37 and of 15 terms, each within eps; then one rounding to the dtype
    rounding = torch.finfo(dtype).eps + 40 * torch.finfo(torch.float32).eps
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=rounding, atol=rounding * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 5, 64, 65, 131])
@pytest.mark.parametrize("width", [1, 15, 16, 37, 576])
def test_the_compiled_gradients_are_exact(rows, width, dtype):
    torch.manual_seed(0)
    x, up = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    rstd = (x.float().square().mean(-1) + 1e-5).rsqrt()
    grads = torch.ops.sparseft_cpu.rms_norm_backward(up, x, rstd, weight.float())
    wide, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    oracle = wide_weight * wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = torch.autograd.grad(oracle, (wide, wide_weight), up.double())
    # sums in fp32 of 1/16 of a row, or of all rows, each term within eps of the largest; rstd is rounded; then once to
    # the dtype
    eps = torch.finfo(torch.float32).eps
    for got, want, terms, out in zip(grads, expected, (width // 16 + 20, rows), (dtype, torch.float32), strict=True):
        rounding = torch.finfo(out).eps + (terms + 8) * eps
        atol = rounding * float(want.abs().max()) if want.numel() else 0.0
        if width == 1:  # x / |x| is constant but for epsilon: the gradient is a difference of almost equal numbers
            atol = max(atol, 8 * eps * float((up * weight * rstd[:, None]).abs().max() if rows else 0.0))
        torch.testing.assert_close(got.double(), want, rtol=rounding, atol=atol)
    if rows == 131:  # the same whoever adds up
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            again = torch.ops.sparseft_cpu.rms_norm_backward(up, x, rstd, weight.float())
        finally:
            torch.set_num_threads(threads)
        assert all(map(torch.equal, grads, again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 33, 515])
@pytest.mark.parametrize("strided", [False, True])
def test_the_compiled_columns_of_a_norm_have_its_bits(tokens, strided, dtype):
    x = torch.randn(tokens, 45).to(dtype)[:, : 37 if strided else 45]
    weight = torch.randn(x.shape[1]).to(dtype)
    out = RMSNorm.apply(x, weight, (weight, 1e-5))
    rstd = (x.float().square().mean(-1) + 1e-5).rsqrt()
    for chosen in (torch.randperm(37)[:20], torch.tensor([], dtype=torch.int64)):
        got = torch.ops.sparseft_cpu.norm_columns(x, rstd, weight, chosen.to(torch.int32))
        assert torch.equal(got, out.T[chosen])


def test_columns_of_a_norm_that_do_not_fit_are_refused():
    x, rstd, weight, cols = torch.zeros(3, 5), torch.zeros(3), torch.zeros(5), torch.tensor([4], dtype=torch.int32)
    columns = torch.ops.sparseft_cpu.norm_columns
    for args, message in (
        ((x, rstd, weight, cols + 1), "outside the matrix"),
        ((x, rstd, weight, cols - 5), "outside the matrix"),
        ((x, rstd[:2], weight, cols), r"rstd must be \[3\]"),
        ((x, rstd, weight[:4], cols), r"weight must be \[5\]"),
        ((x, rstd, weight.bfloat16(), cols), "weight must be Float"),
        ((x.double(), rstd, weight.double(), cols), "expected float32 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            columns(*args)


@pytest.mark.parametrize("weight", [torch.ones(16)[::2], torch.ones(1).expand(8), torch.ones(1)], ids=str)
def test_a_frozen_norm_may_have_any_weight_that_multiplies(weight):
    norm = LlamaRMSNorm(8)
    norm.weight = nn.Parameter(weight)
    plain = nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8))
    model = copy.deepcopy(plain)
    patterns = {f"{i}.weight": Pattern.from_mask(torch.rand(8, 8) < 0.5) for i in (0, 2)}
    sparsify(model, patterns)
    x = torch.randn(5, 8)
    for each in (model, plain):
        each(x).square().sum().backward()
    for name, pattern in patterns.items():
        dense = plain.get_parameter(name).grad
        torch.testing.assert_close(
            selected(model)[name].values.grad, pattern.gather(dense), rtol=1e-5, atol=1e-5 * float(dense.abs().max())
        )


def test_a_patched_norm_computes_what_the_patch_says(monkeypatch):
    norm = LlamaRMSNorm(8)
    model = nn.Sequential(nn.Linear(8, 8), norm)
    sparsify(model, {"0.weight": Pattern.from_mask(torch.rand(8, 8) < 0.5)})
    assert isinstance(norm, LeanRMSNorm)
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: 0 * x)
    assert not norm(torch.randn(2, 8)).any()


def test_a_norm_takes_its_argument_by_name():
    plain, lean = pair(torch.float32)
    x = torch.randn(3, 37)
    assert torch.equal(lean(hidden_states=x), plain(x))
    with pytest.raises(TypeError, match="hidden_states"):
        lean()


def test_what_does_not_fit_is_refused():
    x, rstd, weight = torch.zeros(4, 6), torch.zeros(4), torch.zeros(6)
    backward = torch.ops.sparseft_cpu.rms_norm_backward
    for args, message in (
        ((x, x.T, rstd, weight), "input must be .T, K. and contiguous"),
        ((x[:3], x, rstd, weight), "grad_out must be of the input's shape"),
        ((x.bfloat16(), x, rstd, weight), "grad_out must be Float"),
        ((x, x, rstd[:3], weight), r"rstd must be \[4\]"),
        ((x, x, rstd, weight.double()), "weight must be Float"),
        ((x.double(), x.double(), rstd, weight), "expected float32 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(*args)


@pytest.mark.parametrize(
    "norm",
    [OtherRMSNorm(8), OlmoRMSNorm(8), ChoosyRMSNorm(8), nn.RMSNorm(8), nn.LayerNorm(8), LlamaRMSNorm(8).double()],
    ids=["gemma", "olmo", "choosy", "torch", "layer", "fp64"],
)
def test_norms_of_another_formula_stay(norm):
    if isinstance(norm, nn.RMSNorm):
        norm = norm.to(torch.bfloat16)  # it multiplies before it rounds
    before = type(norm)
    lean_norms(norm)
    assert type(norm) is before


def sparse_llama() -> tuple[nn.Module, nn.Module]:
    """Equal models, norms trained: sparse, and plain."""
    plain = tiny.llama()
    model = copy.deepcopy(plain)
    masks = {name: torch.rand(p.shape) < (1.1 if p.dim() == 1 else 0.2)
             for name, p in model.named_parameters() if ".layers." in name}  # fmt: skip
    return sparsify(model, {name: Pattern.from_mask(mask, tile=(8, 8)) for name, mask in masks.items()}), plain


def kept(loss: Tensor, model: nn.Module) -> dict[int, int]:
    """Address -> bytes of what a graph keeps, without the model's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    todo, nodes, found = [loss.grad_fn], set(), {}
    while todo:
        node = todo.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        todo += [following for following, _ in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for tensor in (*saved, *getattr(node, "saved_tensors", ())):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return {address: size for address, size in found.items() if address not in own}


def test_a_sparse_model_keeps_less_than_a_frozen_one():
    model, plain = sparse_llama()
    ids = torch.randint(4, 50, (2, 16))
    plain.requires_grad_(False)
    plain.get_input_embeddings().register_forward_hook(lambda *io: io[2].requires_grad_())
    model.get_input_embeddings().register_forward_hook(lambda *io: io[2].requires_grad_())
    floor = kept(plain(input_ids=ids, labels=ids).loss, plain)
    found = kept(model(input_ids=ids, labels=ids).loss, model)
    config = plain.config
    activations = config.num_hidden_layers * ids.numel() * config.intermediate_size * 4  # bytes of act(gate(x))
    loss = ids.numel() * 4 - 4  # the loss keeps a sum for each token, torch's the number of labels
    assert sum(found.values()) == sum(floor.values()) - activations + loss


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_from_saved_columns(autocast):
    model, _ = sparse_llama()
    ids = torch.randint(4, 50, (2, 16))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # nothing is asked: columns are saved
        expected = gradients()
    found = gradients()
    assert len(found) == len(expected) > 10 and all(map(torch.equal, found, expected))


def test_who_is_asked():
    _, lean = pair(torch.float32)
    x, other = torch.randn(5, 37, requires_grad=True), torch.randn(5, 37, requires_grad=True)
    assert source(lean(x)) is not None and source(x * other) is not None
    assert source(x * other[:1]) is None and source(2 * x) is None and source(x) is None and source(x + other) is None
    with torch.autograd.graph.save_on_cpu():
        assert source(x * other) is None


def test_a_freed_graph_and_a_changed_input_are_not_asked():
    _, lean = pair(torch.float32)
    x = torch.randn(5, 37, requires_grad=True)
    h = lean(x)
    h.sum().backward()
    assert source(h) is None
    h = lean(x)
    with torch.no_grad():
        h[:, 3] = 7
    assert source(h) is None


class Block(nn.Module):
    """A norm, three layers that read it, and a gated product with one that reads that."""

    def __init__(self):
        super().__init__()
        self.norm = LlamaRMSNorm(24, 1e-5)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(24, 16), nn.Linear(24, 16), nn.Linear(24, 16)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(24, 32), nn.Linear(24, 32), nn.Linear(32, 24)


def attention(block: Block, h: Tensor) -> Tensor:
    return block.q_proj(h).sin().sum() + block.k_proj(h).cos().sum() + block.v_proj(h).square().sum()


def norm_changed(block: Block, x: Tensor) -> Tensor:
    h = block.norm(x)
    with torch.no_grad():
        h[:, 3:9] *= 3
    return attention(block, h)


def product_changed(block: Block, x: Tensor) -> Tensor:
    h = block.norm(x)
    gated = block.gate_proj(h).sigmoid() * block.up_proj(h)
    with torch.no_grad():
        gated.mul_(3)
    return block.down_proj(gated).square().sum()


def one_checkpointed(block: Block, x: Tensor) -> Tensor:
    h = block.norm(x)
    k = checkpoint(block.k_proj, h, use_reentrant=False)
    return block.q_proj(h).sin().sum() + k.cos().sum() + block.v_proj(h).square().sum()


def second_checkpointed(block: Block, x: Tensor) -> Tensor:
    h = block.norm(x)
    q = block.q_proj(h).sin().sum()
    return q + checkpoint(block.k_proj, h, use_reentrant=False).cos().sum() + block.v_proj(h).square().sum()


@pytest.mark.parametrize("loss", [norm_changed, product_changed, one_checkpointed, second_checkpointed])
def test_gradients_are_the_plain_ones_entries(loss):
    plain = Block()
    nn.init.normal_(plain.norm.weight)
    model = copy.deepcopy(plain)
    masks = {name: torch.rand(p.shape) < (2 if p.dim() == 1 else 0.3) for name, p in model.named_parameters()
             if not name.endswith("bias")}  # fmt: skip
    sparsify(model, {name: Pattern.from_mask(mask, tile=(8, 8)) for name, mask in masks.items()})
    x = torch.randn(5, 24)
    loss(plain, x).backward()
    loss(model, x).backward()
    for name, chosen in selected(model).items():
        dense = plain.get_parameter(name).grad
        if dense is not None:
            # fp32 sums of 5 and of 24 terms, in another order
            expected = chosen.pattern.gather(dense)
            torch.testing.assert_close(
                chosen.values.grad, expected, rtol=1e-5, atol=40 * 2**-24 * float(dense.abs().max())
            )


def test_a_meta_default_device_is_no_hindrance():
    plain = LlamaRMSNorm(8)
    with torch.device("meta"):
        lean_norms(plain)
    assert isinstance(plain, LeanRMSNorm)


def test_back_and_copies():
    model, plain = sparse_llama()
    ids = torch.randint(4, 50, (2, 16))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert any(isinstance(module, LeanRMSNorm) for module in other.modules())
        assert torch.equal(other(input_ids=ids).logits, plain(input_ids=ids).logits)
    densify(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


def test_a_whole_norm_trains_through_its_leaf():
    model, _ = sparse_llama()
    ids = torch.randint(4, 50, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    norms = {name: chosen for name, chosen in selected(model).items() if "norm" in name}
    assert len(norms) == 4
    for chosen in norms.values():
        assert not chosen.weight.requires_grad and chosen.values.grad.dtype == torch.float32


@pytest.mark.parametrize("order", ["some", "all, reversed"])
def test_a_norm_that_does_not_train_whole_or_not_in_order_gathers(order):
    plain = nn.Sequential(LlamaRMSNorm(12))
    model = copy.deepcopy(plain)
    number = {"some": 5, "all, reversed": 12}[order]
    mass = torch.arange(12.0) if order != "some" else None  # the heaviest column comes first
    sparsify(model, {"0.weight": Pattern.from_mask(torch.arange(12) < number, tile=(4, 4), mass=mass)})
    x, up = torch.randn(7, 12), torch.randn(7, 12)
    for each in (model, plain):
        each(x).backward(up)
    chosen = selected(model)["0.weight"]
    # sums of 7 terms in another order
    dense = plain[0].weight.grad
    tolerance = 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        chosen.values.grad, chosen.pattern.gather(dense), rtol=tolerance, atol=tolerance * float(dense.abs().max())
    )


@pytest.mark.parametrize(("number", "flag"), [(12, True), (12, False), (5, False)])
def test_a_norms_leaf_does_not_go_by_its_weights_flag(number, flag):
    plain = nn.Sequential(LlamaRMSNorm(12))
    model = copy.deepcopy(plain)
    sparsify(model, {"0.weight": Pattern.from_mask(torch.arange(12) < number)})
    chosen = selected(model)["0.weight"]
    chosen.weight.requires_grad_(flag)
    x = torch.randn(7, 12, requires_grad=True)
    model(x).sum().backward()
    if number == 12:
        plain(x).sum().backward()
        torch.testing.assert_close(chosen.values.grad, plain[0].weight.grad)
        assert chosen.weight.grad is None
    else:  # what is frozen by hand does not train
        assert chosen.values.grad is None


def test_a_whole_norm_may_lose_entries():
    plain = nn.Sequential(LlamaRMSNorm(12), nn.Linear(12, 3))
    model = copy.deepcopy(plain)
    whole = Pattern.from_mask(torch.ones(12, dtype=torch.bool))
    sparsify(model, {"0.weight": whole, "1.weight": Pattern.from_mask(torch.rand(3, 12) < 0.5)})
    fewer = Pattern.from_mask(torch.arange(12) % 2 == 0)
    reselect(model, None, {"0.weight": fewer})
    model = copy.deepcopy(model)
    x, up = torch.randn(7, 12), torch.randn(7, 3)
    for each in (model, plain):
        each(x).backward(up)
    found = selected(model)["0.weight"]
    assert found.pattern == fewer
    torch.testing.assert_close(found.values.grad, fewer.gather(plain[0].weight.grad))


def test_compiles():
    _, lean = pair(torch.float32)
    x = torch.randn(4, 37, requires_grad=True)
    lean(x).sum().backward()
    expected, x.grad = x.grad, None
    torch.compile(lean, backend="aot_eager", fullgraph=True)(x).sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_a_norm_with_a_leaf_compiles():
    model = nn.Sequential(LlamaRMSNorm(37))
    sparsify(model, {"0.weight": Pattern.from_mask(torch.ones(37, dtype=torch.bool))})
    x = torch.randn(4, 37)
    leaf = selected(model)["0.weight"].values
    model(x).sum().backward()
    expected, leaf.grad = leaf.grad, None
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()
    torch.testing.assert_close(leaf.grad, expected)
