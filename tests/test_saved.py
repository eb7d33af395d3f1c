"""What sparse layers save of their input: as few columns as suffice, once for all that read it, never wrong ones."""

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from sparseft import Pattern, SparseAdamW, backend, densify, sparsify
from sparseft.layers import selected
from sparseft.saved import columns

from . import tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Attention(nn.Module):
    """Three layers of one input, and one of another."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(width, 16), nn.Linear(width, 8), nn.Linear(width, 16)
        self.o_proj = nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(torch.tanh(self.q_proj(x)) * self.v_proj(x) + self.k_proj(x).repeat(1, 2))


def with_columns(weight: Tensor, wanted: list[int]) -> Pattern:
    """Half of the entries of some columns."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    mask[:, wanted] = torch.rand(len(weight), len(wanted)) < 0.5
    mask[0, wanted] = True
    return Pattern.from_mask(mask, tile=(4, 8))


def sparse_attention() -> tuple[Attention, Attention]:
    """The same weights, plain and sparse."""
    plain = Attention()
    model = copy.deepcopy(plain)
    wanted = {"q_proj": [3, 1, 7], "k_proj": [7, 20], "v_proj": [1, 11], "o_proj": [15, 0]}
    sparsify(model, {f"{n}.weight": with_columns(model.get_submodule(n).weight, w) for n, w in wanted.items()})
    return plain, model


def saved_sizes(model: nn.Module, x: Tensor) -> dict[int, int]:
    """Address -> elements of what a forward saves, without weights and patterns."""
    known = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return {address: tensor.numel() for address, tensor in kept.items()}


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: chosen.values.grad for name, chosen in selected(model).items()}


def assert_dense(grads: dict[str, Tensor], plain: nn.Module, model: nn.Module, x: Tensor) -> None:
    plain.zero_grad()
    plain(x).square().sum().backward()
    for name, chosen in selected(model).items():
        dense = plain.get_parameter(name).grad
        # fp32 sums of tens of products: a few units in the last place of the largest entry
        torch.testing.assert_close(
            grads[name], chosen.pattern.gather(dense), rtol=1e-5, atol=1e-5 * float(dense.abs().max())
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 33, 64, 515])
@pytest.mark.parametrize("strided", [False, True])
def test_columns_are_moved_bit_for_bit(dtype, tokens, strided):
    x = torch.randn(tokens, 75).to(dtype)[:, : 70 if strided else 75]
    one, none, twice = torch.tensor([69]), torch.tensor([], dtype=torch.int64), torch.randint(70, (60,))
    for chosen in (torch.randperm(70)[:50], torch.arange(70), one, none, twice):
        got = columns(x, chosen.to(torch.int32))
        assert got.shape == (len(chosen), tokens) and torch.equal(got, x.T[chosen])


def test_a_column_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match="outside the matrix"):
        torch.ops.sparseft_cpu.columns(torch.zeros(3, 5), torch.tensor([5], dtype=torch.int32))


@pytest.mark.parametrize("name", [None, "reference"])
def test_layers_of_one_input_save_its_needed_columns_once(name):
    plain, model = sparse_attention()
    x = torch.randn(6, 24)
    with backend.forced(name):
        sizes = saved_sizes(model, x)
        needed = len({1, 3, 7, 11, 20}) * len(x)
        assert x.data_ptr() not in sizes and list(sizes.values()).count(needed) == 1
        assert_dense(gradients(model, x), plain, model, x)


def test_what_attention_saves_anyway_is_not_saved_again():
    model = tiny.llama()
    masks = {name: torch.rand(p.shape) < 0.01 for name, p in model.named_parameters() if "o_proj" in name}
    sparsify(model, {name: Pattern.from_mask(mask, tile=(8, 8)) for name, mask in masks.items()})
    for norm in (layer.input_layernorm for layer in model.model.layers):
        norm.weight.requires_grad_()  # the first layer's attention has something to differentiate, too
    inputs: list[int] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0].data_ptr()))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        model(input_ids=torch.randint(4, 50, (2, 16)))
    # once by the attention, once by the layer: the same memory
    assert inputs and all(saved.count(address) == 2 for address in inputs)


def test_a_sibling_with_another_input_saves_its_own():
    _, model = sparse_attention()
    x, y = torch.randn(2, 5, 24).unbind()
    both = [model.q_proj(x), model.k_proj(y), model.v_proj(x)]
    sum(out.square().sum() for out in both).backward()
    for name, x_of in (("q_proj", x), ("k_proj", y), ("v_proj", x)):
        layer = model.get_submodule(name)
        out = nn.functional.linear(x_of, layer.weight, layer.bias)
        dense = 2 * out.T @ x_of
        torch.testing.assert_close(layer.values.grad, selected(model)[f"{name}.weight"].pattern.gather(dense))


def test_an_input_that_changes_in_between_is_saved_again():
    _, model = sparse_attention()
    x = torch.randn(5, 24)
    first = x.clone()
    q = model.q_proj(x)
    x.mul_(2)
    k = model.k_proj(x)
    (q.sum() + k.sum()).backward()
    chosen = selected(model)
    for name, used in (("q_proj", first), ("k_proj", x)):
        pattern = chosen[f"{name}.weight"].pattern
        dense = used.sum(0).expand(pattern.shape)
        torch.testing.assert_close(model.get_submodule(name).values.grad, pattern.gather(dense.contiguous()))


def test_nothing_outlives_the_input():
    _, model = sparse_attention()
    x = torch.randn(5, 24)
    loss = model(x).sum()
    shared = model.q_proj._input
    assert shared is model.v_proj._input and shared is not model.o_proj._input and shared._last is not None
    del x
    gc.collect()
    assert shared._last is None
    loss.backward()
    with torch.no_grad():
        model(torch.randn(5, 24))
    assert shared._last is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same(reentrant):
    _, model = sparse_attention()
    x = torch.randn(6, 24, requires_grad=True)
    expected = gradients(model, x)
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for name, chosen in selected(model).items():
        assert torch.equal(chosen.values.grad, expected[name])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_shares_with_itself_only(copied):
    plain, model = sparse_attention()
    x = torch.randn(6, 24)
    model(x)
    twin = copied(model)
    assert twin.q_proj._input is twin.k_proj._input is not model.q_proj._input
    assert_dense(gradients(twin, x), plain, twin, x)
    assert len(saved_sizes(twin, x)) == len(saved_sizes(model, x))


def test_a_full_pattern_saves_the_input_itself():
    layer = nn.Linear(8, 4)
    sparsify(layer, {"weight": Pattern.from_mask(torch.ones(4, 8, dtype=torch.bool), tile=(4, 4))})
    x = torch.randn(3, 8)
    assert x.data_ptr() in saved_sizes(layer, x)


def test_conv1d_saves_the_rows_it_needs():
    layer = Conv1D(6, 10)
    mask = torch.zeros(10, 6, dtype=torch.bool)
    mask[[2, 7]] = True
    plain = copy.deepcopy(layer)
    sparsify(layer, {"weight": Pattern.from_mask(mask, tile=(4, 4))})
    x = torch.randn(5, 10)
    assert list(saved_sizes(layer, x).values()) == [2 * 5]
    assert_dense(gradients(layer, x), plain, layer, x)


def test_training_and_densify_with_shared_memory():
    """The optimizer's buffers take over base values and positions; what was selected stays readable."""
    _, model = sparse_attention()
    before = {name: (c.base.clone(), c.pattern.digest) for name, c in selected(model).items()}
    optimizer = SparseAdamW(model, lr=0.1)
    for _ in range(2):
        gradients(model, torch.randn(6, 24))
        optimizer.step()
    after = selected(model)
    assert all(torch.equal(after[n].base, base) and after[n].pattern.digest == d for n, (base, d) in before.items())
    assert len({c.base.untyped_storage().data_ptr() for c in after.values()}) == 1
    densify(model)
    assert not any(hasattr(layer, "_input") for layer in model.modules())


def test_a_second_call_does_not_get_the_first_ones_columns():
    """Writes that autograd's version counter does not see: a buffer shared with numpy, and `.data`."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    dense = copy.deepcopy(layer)
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[::2, :4] = True
    pattern = Pattern.from_mask(mask, tile=(8, 8))
    sparsify(layer, {"weight": pattern})
    buffer = torch.randn(5, 16).numpy()
    x = torch.from_numpy(buffer)
    for write in (lambda: None, lambda: buffer.__setitem__(slice(None), 3 * buffer[::-1]),
                  lambda: setattr(x, "data", torch.randn(9, 16))):  # fmt: skip
        write()
        layer.zero_grad()
        dense.zero_grad()
        layer(x).square().sum().backward()
        dense(x).square().sum().backward()
        assert torch.allclose(layer.values.grad, pattern.gather(dense.weight.grad), rtol=1e-5, atol=1e-4)


def test_copies_that_share_attributes_and_the_meta_device():
    layer = nn.Linear(16, 8)
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[:, :4] = True
    sparsify(layer, {"weight": Pattern.from_mask(mask, tile=(8, 8))})
    assert torch.equal(copy.copy(layer)(torch.ones(2, 16)), layer(torch.ones(2, 16)))
    assert layer.to("meta")(torch.empty(3, 16, device="meta")).shape == (3, 8)


def _down_projection() -> nn.Module:
    down = nn.Linear(24, 10)
    return sparsify(nn.Sequential(down), {"0.weight": with_columns(down.weight, [3, 1, 7])})


def _factors() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 24, requires_grad=True), torch.randn(6, 24, requires_grad=True)


def test_a_product_in_a_checkpoint_may_feed_a_layer_outside_of_it():
    model, found = _down_projection(), []
    for product in (torch.mul, lambda a, b: checkpoint(torch.mul, a, b, use_reentrant=False)):
        model.zero_grad()
        a, b = _factors()
        model(product(a, b)).square().sum().backward()
        found.append((a.grad, b.grad, model[0].values.grad))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)


def test_a_leafs_gradient_alone_survives_a_backward_of_its_layers_input():
    model = _down_projection()
    a, b = _factors()
    hidden = a * b
    out = model(hidden)
    hidden.sum().backward()  # frees what the product saved
    (got,) = torch.autograd.grad(out.sum(), model[0].values)
    (expected,) = torch.autograd.grad(model(a.detach() * b.detach()).sum(), model[0].values)
    assert torch.equal(got, expected)
