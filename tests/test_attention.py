"""Attention's backward pass on the CPU: exact gradients, the plain layer's bits forward, only where it is asked for."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from sparseft import Pattern, attention, backend, densify, sparsify
from sparseft.attention import Attention
from sparseft.layers import selected

from . import tiny

EPS = torch.finfo(torch.float32).eps
needs_library = pytest.mark.skipif(not backend.has_cpu_library(), reason="sparseft._C is not built")


def heads(batch: int, number: int, tokens: int, size: int, dtype: torch.dtype) -> Tensor:
    """As a model has them: [batch, tokens, number, size] in memory."""
    return torch.randn(batch, tokens, number, size).to(dtype).transpose(1, 2)


class Oracle:
    """Attention and its gradients in fp64, and how far a computation in fp32 with inputs of `dtype` may be off."""

    def __init__(self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float):
        group = query.shape[1] // key.shape[1]
        grad, query, key, value = (t.double() for t in (grad, query, key, value))
        key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
        scores = (query @ key.mT * scale).masked_fill(~seen, -torch.inf)
        self.logsumexp = scores.logsumexp(-1)
        p = (scores - self.logsumexp[..., None]).exp().nan_to_num() * seen
        self.out = p @ value
        self._parts = grad, query, key, value, scale, group, p

    def check(self, found: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
        grad, query, key, value, scale, group, p = self._parts
        size, rounding = query.shape[-1], torch.finfo(dtype).eps
        ds = p * (grad @ value.mT - (grad * self.out).sum(-1, keepdim=True)) * scale
        # a score is a sum of `size` products; it, its row's sum of exponentials and e^x are rounded
        in_score = (size + 2) * EPS * scale * (query.abs() @ key.abs().mT)
        known = self.logsumexp.masked_fill(self.logsumexp.isinf(), 0.0).abs()[..., None]
        in_p = p * (in_score + 2 * EPS * known + 4 * EPS) + math.exp(-87)  # what is smaller counts as that
        along = (grad.abs() * self.out.abs()).sum(-1, keepdim=True)
        sizes = grad.abs() @ value.abs().mT + along
        in_ds = in_p * sizes * scale + p * scale * ((size + 4) * EPS * sizes + rounding * along)  # out has been rounded
        products = [(ds, key, in_ds), (ds.mT, query, in_ds.mT), (p.mT, grad, in_p.mT)]
        for index, (got, (left, right, error)) in enumerate(zip(found, products, strict=True)):
            want = left @ right
            bound = error @ right.abs() + (left.shape[-1] + group) * EPS * (left.abs() @ right.abs())
            if index:
                want, bound = (t.unflatten(1, (-1, group)).sum(2) for t in (want, bound))
            bound = bound + rounding * (want.abs() + bound)
            assert got.dtype == dtype
            assert ((got.transpose(1, 2).double() - want).abs() <= bound).all()


def backward(grad, query, key, value, out, logsumexp, mask, causal, scale):
    return torch.ops.sparseft_cpu.attention_backward(grad, query, key, value, out, logsumexp, mask, causal, scale)


@needs_library
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.integers(1, 70),
    st.sampled_from([1, 5, 16, 33, 64, 80]), st.sampled_from(["causal", "mask", "all"]),
    st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31),
)  # fmt: skip
def test_the_gradients_are_exact(batch, key_heads, group, queries, keys, size, which, dtype, seed):
    torch.manual_seed(seed)
    keys = queries if which == "causal" else keys
    query, grad = (heads(batch, key_heads * group, queries, size, dtype) for _ in range(2))
    key, value = (heads(batch, key_heads, keys, size, dtype) for _ in range(2))
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if which == "causal":
        seen = seen.tril()
    if which == "mask":  # some queries see nothing; it broadcasts along any dimensions
        whole = batch, key_heads * group, queries, keys
        seen = torch.rand([n if torch.rand(()) < 0.7 else 1 for n in whole]) < 0.5
    oracle = Oracle(grad, query, key, value, seen, scale := size**-0.5)
    mask = seen.expand(*query.shape[:3], keys) if which == "mask" else None
    out, logsumexp = oracle.out.to(dtype), oracle.logsumexp.float()
    found = backward(grad, query, key, value, out, logsumexp, mask, which == "causal", scale)
    oracle.check(found, dtype)


@needs_library
@pytest.mark.parametrize("scale", [10.0, 1e3])
def test_large_scores(scale):
    query, key, value, grad = (heads(1, 2, 40, 8, torch.float32) for _ in range(4))
    oracle = Oracle(grad, query, key, value, torch.ones(40, 40, dtype=torch.bool).tril(), scale)
    found = backward(grad, query, key, value, oracle.out.float(), oracle.logsumexp.float(), None, True, scale)
    oracle.check(found, torch.float32)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype):
    query, grad = (heads(2, 6, 100, 64, dtype) for _ in range(2))
    key, value = (heads(2, 2, 100, 64, dtype) for _ in range(2))
    oracle = Oracle(grad, query, key, value, torch.ones(100, 100, dtype=torch.bool).tril(), 0.125)
    arguments = grad, query, key, value, oracle.out.to(dtype), oracle.logsumexp.float(), None, True, 0.125
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(backward(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_library
def test_what_a_row_that_sees_nothing_was_given_does_not_matter():
    query, key, value, grad = (heads(1, 2, 40, 8, torch.float32) for _ in range(4))
    mask = torch.ones(1, 2, 40, 40, dtype=torch.bool)
    mask[:, :, 7] = False
    oracle = Oracle(grad, query, key, value, mask, 0.3)
    out, logsumexp = oracle.out.float(), oracle.logsumexp.float()
    out[:, :, 7], logsumexp[:, :, 7] = torch.nan, torch.nan
    found = backward(grad, query, key, value, out, logsumexp, mask, False, 0.3)
    oracle.check(found, torch.float32)
    assert not found[0][:, 7].any()


@needs_library
def test_the_kernel_refuses_what_it_cannot_read():
    q, k = heads(2, 4, 5, 8, torch.float32), heads(2, 2, 5, 8, torch.float32)
    sums, mask = torch.zeros(2, 4, 5), torch.ones(2, 4, 5, 5, dtype=torch.bool)
    good = {"grad": q, "query": q, "key": k, "value": k, "out": q, "logsumexp": sums, "mask": mask, "causal": False,
            "scale": 1.0}  # fmt: skip
    backward(**good)
    refused = [
        ({"query": q[0]}, "query and key must be"),
        ({"query": q[:, :0], "grad": q[:, :0], "out": q[:, :0], "logsumexp": sums[:, :0]}, "0 heads cannot share"),
        ({"key": heads(2, 3, 5, 8, torch.float32)}, "cannot share"),
        ({"value": k[:, :, :4]}, "value must be"),
        ({"grad": q[:1]}, "grad_out must be"),
        ({"out": q.double()}, "out must be"),
        ({"query": q.half(), "grad": q.half(), "out": q.half(), "key": k.half(), "value": k.half()}, "float32"),
        ({"grad": torch.randn(2, 4, 8, 5).mT}, "last dimension of grad_out"),
        ({"logsumexp": sums.double()}, "logsumexp must be"),
        ({"logsumexp": sums[..., :4]}, "logsumexp must be"),
        ({"mask": mask.float()}, "mask must be"),
        ({"mask": mask[:, :1]}, "mask must be"),
        ({"key": k[:, :, :4], "value": k[:, :, :4], "mask": None, "causal": True}, "as many keys as queries"),
    ]
    for wrong, message in refused:
        with pytest.raises(RuntimeError, match=message):
            backward(**(good | wrong))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["causal", "mask", "all"])
def test_forward_is_torchs_bit_for_bit_and_backward_exact(which, dtype):
    torch.manual_seed(0)
    query, grad = (heads(2, 6, 50, 16, dtype) for _ in range(2))
    key, value = (heads(2, 3, 50, 16, dtype) for _ in range(2))
    for tensor in (query, key, value):
        tensor.requires_grad_()
    mask = (torch.rand(2, 1, 50, 50) < 0.7).logical_or_(torch.eye(50).bool()) if which == "mask" else None
    out = Attention.apply(query, key, value, mask, which == "causal", None)
    with torch.no_grad():
        theirs = F.scaled_dot_product_attention(query, key, value, mask, is_causal=which == "causal", enable_gqa=True)
    assert torch.equal(out, theirs)
    found = torch.autograd.grad(out, (query, key, value), grad)
    seen = mask if mask is not None else torch.ones(50, 50, dtype=torch.bool)
    seen = seen.tril() if which == "causal" else seen
    oracle = Oracle(*(t.detach() for t in (grad, query, key, value)), seen, 0.25)
    oracle.check(tuple(g.transpose(1, 2) for g in found), dtype)


@needs_library
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 5, 1), (2, 1, 1, 7)])
def test_gradients_of_any_strides(shape):
    tensors = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    for grad in (torch.ones(()).expand(shape), torch.randn(*shape[:2], shape[3], shape[2]).mT):
        out = Attention.apply(*tensors, None, True, None)
        found = torch.autograd.grad(out, tensors, grad)
        oracle = Oracle(grad, *(t.detach() for t in tensors), torch.ones(shape[2:3] * 2).tril() > 0, shape[3] ** -0.5)
        oracle.check(tuple(g.transpose(1, 2) for g in found), torch.float32)


# ---- in a model -----------------------------------------------------------------------------------------------------


def sparse(plain: nn.Module) -> nn.Module:
    model = copy.deepcopy(plain)
    masks = {name: torch.rand(p.shape) < 0.2 for name, p in plain.named_parameters() if "_proj" in name}
    return sparsify(model, {name: Pattern.from_mask(mask, tile=(8, 8)) for name, mask in masks.items()})


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Grows with every call of the kernel's forward pass."""
    made: list[int] = []
    apply = Attention.apply
    monkeypatch.setattr(Attention, "apply", lambda *arguments: (made.append(1), apply(*arguments))[1])
    return made


def padded(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, 11:] = 0
    return mask


@needs_library
@pytest.mark.parametrize("how", ["plainly", "padded", "checkpointing", "reentrant", "autocast", "compile"])
def test_a_sparse_model_trains_through_it(how, calls):
    plain = tiny.llama()
    model = sparse(plain)
    ids = torch.randint(4, 50, (2, 16))
    data = {"input_ids": ids, "labels": ids} | ({"attention_mask": padded(ids)} if how == "padded" else {})
    losses = []
    for each in (plain, model):
        if how in ("checkpointing", "reentrant"):
            each.train()
            each.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
            each.get_input_embeddings().register_forward_hook(lambda *io: io[2].requires_grad_())
        run = torch.compile(each, backend="aot_eager") if how == "compile" else each
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            losses.append(run(**data).loss)
        losses[-1].backward()
        if each is plain:
            assert not calls
    layers = plain.config.num_hidden_layers
    again = {"compile": 0, "checkpointing": 2, "reentrant": 1}  # reentrant: the first time without gradients
    assert len(calls) == layers * again.get(how, 1)
    torch.testing.assert_close(*losses, rtol=16 * EPS, atol=0.0)  # the lean loss adds up in another order
    # fp32: sums of some 32 terms in another order. bf16: torch rounds probabilities and their gradients once more each
    eps = torch.finfo(torch.bfloat16).eps if how == "autocast" else 32 * EPS
    for name, chosen in selected(model).items():
        dense = plain.get_parameter(name).grad
        torch.testing.assert_close(
            chosen.values.grad, chosen.pattern.gather(dense), rtol=4 * eps, atol=4 * eps * float(dense.abs().max())
        )


@needs_library
def test_it_is_left_alone_where_somebody_wants_something_else(calls):
    plain = tiny.llama()
    model = sparse(plain)
    ids = torch.randint(4, 50, (2, 16))

    def loss_of(each: nn.Module = model) -> Tensor:
        return each(input_ids=ids, labels=ids).loss

    loss_of(plain), loss_of(tiny.llama(seed=1))
    with torch.no_grad():
        loss_of()
    with sdpa_kernel(SDPBackend.MATH):
        loss_of()
    loss_of(copy.deepcopy(model).double())
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    loss_of(eager)
    dropping = copy.deepcopy(model).train()
    for layer in dropping.model.layers:
        layer.self_attn.attention_dropout = 0.1
    loss_of(dropping)
    with backend.forced("reference"):
        loss_of()
    assert not calls


@needs_library
def test_a_gradient_of_gradients_raises_as_torchs():
    tensors = [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3)]
    for compute in (lambda *t: Attention.apply(*t, None, True, None), lambda *t: F.scaled_dot_product_attention(*t)):
        found = torch.autograd.grad(compute(*tensors).square().sum(), tensors, create_graph=True)
        with pytest.raises(RuntimeError, match="derivative"):
            sum(g.square().sum() for g in found).backward()


@needs_library
def test_somebody_elses_function_stays(monkeypatch, calls):
    def doubled(*arguments, **kwargs):
        out, weights = sdpa_attention_forward(*arguments, **kwargs)
        return 2 * out, weights

    plain = tiny.llama()
    ids = torch.randint(4, 50, (1, 8))
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", doubled)
    want = plain(input_ids=ids).logits
    assert torch.equal(sparse(plain)(input_ids=ids).logits, want)
    assert not calls
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is doubled


@needs_library
def test_it_compiles_whole():
    model = sparse(tiny.llama())
    ids = torch.randint(4, 50, (1, 8))
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss, rtol=16 * EPS, atol=0.0)


@needs_library
def test_a_model_that_was_saved_has_it_in_a_new_process(tmp_path):
    torch.save(sparse(tiny.llama()), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "from sparseft.attention import Attention\n"
        "ids, apply, made = torch.arange(4, 12)[None], Attention.apply, []\n"
        "Attention.apply = lambda *arguments: (made.append(1), apply(*arguments))[1]\n"
        "model(input_ids=ids, labels=ids).loss.backward()\n"
        "print(len(made))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.pt"], capture_output=True, text=True, check=True
    )
    assert run.stdout.split()[-1] == "2"


@needs_library
def test_copies_and_pickles_have_it_and_densify_undoes_it(calls):
    model = sparse(tiny.llama())
    ids = torch.randint(4, 50, (1, 8))
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        each(input_ids=ids, labels=ids).loss.backward()
        assert len(calls) == 2
    calls.clear()
    densify(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert not calls
    assert not any(attention.MARK in module.__dict__ for module in model.modules())
