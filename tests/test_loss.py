"""The lean loss: transformers' value, exact gradients, nothing kept but the logits, only where it is asked for."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from sparseft import Pattern, backend, densify, parameters, sparsify
from sparseft.loss import CrossEntropy, causal_lm_loss, lean_loss, plain_loss
from sparseft.models import DTYPES

from . import tiny

EPS = torch.finfo(torch.float32).eps
IGNORED = -100
pytestmark = pytest.mark.skipif(not backend.has_cpu_library(), reason="sparseft._C is not built")


def check_gradient(found: Tensor, logits: Tensor, labels: Tensor, grad: Tensor) -> None:
    """Against fp64. e^x is good to two units, its argument, two rounded numbers' difference, to one of the larger."""
    wide = logits.double().requires_grad_()
    losses = F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="none")
    (want,) = torch.autograd.grad(losses, wide, grad.double())
    sums = wide.detach().logsumexp(-1, keepdim=True)
    probability = (wide.detach() - sums).exp()
    in_p = probability * EPS * (8 + 2 * wide.detach().abs().amax(-1, keepdim=True) + 2 * sums.abs())
    bound = (in_p + 2 * EPS) * grad.double().abs()[:, None]  # 2 eps: what is subtracted from 1
    bound = bound + torch.finfo(found.dtype).eps * (want.abs() + bound)
    assert ((found.double() - want).abs() <= bound).all()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 9), st.sampled_from([1, 2, 15, 16, 37, 1024, 1040, 5000]), st.sampled_from([0.01, 1.0, 20.0]),
    st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31),
)  # fmt: skip
def test_the_kernel_is_exact(rows, classes, scale, dtype, seed):
    torch.manual_seed(seed)
    logits = (scale * torch.randn(rows, classes)).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (rows,)).masked_fill_(torch.rand(rows) < 0.3, IGNORED)
    losses = CrossEntropy.apply(logits, labels, IGNORED)
    want = F.cross_entropy(logits.detach().double(), labels, ignore_index=IGNORED, reduction="none")
    sums = logits.detach().double().logsumexp(-1).abs()
    # a part's sums of 64 terms each, the logarithm, the label's logit taken away: absolute errors
    bound = EPS * (64 + 8 + 4 * logits.detach().double().abs().amax(-1) + 2 * sums)
    assert ((losses.detach().double() - want).abs() <= bound).all()
    assert not losses[labels == IGNORED].any()
    grad = torch.randn(rows)
    (found,) = torch.autograd.grad(losses, logits, grad)
    assert found.dtype == dtype
    check_gradient(found, logits.detach(), labels, grad)
    assert not found[labels == IGNORED].any()


def test_infinite_logits_are_classes_that_do_not_occur_and_nan_spreads():
    logits = torch.randn(3, 40)
    logits[0, 5:30], logits[1, 7] = -torch.inf, torch.nan
    logits.requires_grad_()
    labels = torch.tensor([2, 2, 2])
    losses = CrossEntropy.apply(logits, labels, IGNORED)
    want = F.cross_entropy(logits.detach(), labels, reduction="none")
    torch.testing.assert_close(losses.detach(), want, equal_nan=True)
    losses.sum().backward()
    assert logits.grad[0, 5:30].abs().max() < 1e-30
    assert logits.grad[1].isnan().all()
    assert logits.grad[2].isfinite().all()


def test_the_number_of_threads_changes_no_bit():
    logits, labels = torch.randn(7, 3000), torch.randint(0, 3000, (7,))
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(torch.ops.sparseft_cpu.cross_entropy(logits, labels, IGNORED)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_the_kernel_refuses_what_it_cannot_read():
    forward, backward = torch.ops.sparseft_cpu.cross_entropy, torch.ops.sparseft_cpu.cross_entropy_backward
    logits, labels, sums = torch.randn(4, 6), torch.tensor([0, 5, IGNORED, 1]), torch.zeros(4)
    for wrong, message in [
        ((logits[0], labels), "logits must be"),
        ((logits.T, labels), "logits must be"),
        ((logits.double(), labels), "float32"),
        ((logits, labels.int()), "labels must be"),
        ((logits, labels[:3]), "labels must be"),
        ((logits, labels + 1), "labels must be -100 or 0 to 5, got 6"),
        ((logits, labels.masked_fill(labels == 1, -1)), "labels must be -100 or 0 to 5, got -1"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            forward(*wrong, IGNORED)
        with pytest.raises(RuntimeError, match=message):
            backward(sums, *wrong, sums, IGNORED)
    for wrong, message in [((sums[:3], sums), "grad_losses"), ((sums, sums.double()), "logsumexp")]:
        with pytest.raises(RuntimeError, match=message):
            backward(wrong[0], logits, labels, wrong[1], IGNORED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_loss_is_that_of_transformers(shifted, items, dtype):
    torch.manual_seed(0)
    logits = torch.randn(2, 9, 50).to(dtype).requires_grad_()
    labels = torch.randint(0, 50, (2, 9)).masked_fill_(torch.rand(2, 9) < 0.2, IGNORED)
    shift = {"shift_labels": labels.roll(3)} if shifted else {}
    theirs = ForCausalLMLoss(logits, labels, 50, num_items_in_batch=items, **shift)
    ours = causal_lm_loss(logits, labels, 50, num_items_in_batch=items, **shift)
    torch.testing.assert_close(ours, theirs, rtol=16 * EPS, atol=0.0)  # sums of 50 and of 18 terms in another order
    ours.backward()
    counted = shift["shift_labels"] if shifted else F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    number = items if items is not None else (counted != IGNORED).sum()
    grad = torch.full((18,), 1.0) / number
    check_gradient(logits.grad.flatten(0, 1), logits.detach().flatten(0, 1), counted.flatten(), grad)


def test_a_batch_without_labels_has_no_mean():
    logits = torch.randn(1, 4, 5)
    labels = torch.full((1, 4), IGNORED)
    assert causal_lm_loss(logits, labels, 5).isnan() and ForCausalLMLoss(logits, labels, 5).isnan()


def sparse(model: nn.Module) -> nn.Module:
    masks = {name: torch.rand(p.shape) < 0.2 for name, p in model.named_parameters() if ".mlp." in name}
    return sparsify(model, {name: Pattern.from_mask(mask, tile=(8, 8)) for name, mask in masks.items()})


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    made: list[int] = []
    apply = CrossEntropy.apply
    monkeypatch.setattr(CrossEntropy, "apply", lambda *arguments: (made.append(1), apply(*arguments))[1])
    return made


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sparse_models_copies_and_pickles_have_it_and_densify_undoes_it(dtype, calls):
    plain = tiny.llama(dtype=DTYPES[dtype])
    ids = torch.randint(4, 50, (2, 8))
    want = plain(input_ids=ids, labels=ids).loss
    assert not calls
    model = sparse(copy.deepcopy(plain))
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        output = each(input_ids=ids, labels=ids)
        torch.testing.assert_close(output.loss, want, rtol=16 * EPS, atol=0.0)
        assert output.logits.shape == (2, 8, plain.config.vocab_size)
        assert calls == [1]
    calls.clear()
    assert torch.equal(densify(model)(input_ids=ids, labels=ids).loss, want)
    assert not calls
    assert "_loss_function" not in model.__dict__


def test_compiled_forced_and_fp64_models_compute_as_before(calls):
    plain = tiny.llama()
    model = sparse(copy.deepcopy(plain))
    ids = torch.randint(4, 50, (2, 8))
    want = plain(input_ids=ids, labels=ids).loss
    with backend.forced("reference"):
        assert torch.equal(model(input_ids=ids, labels=ids).loss, want)
    compiled = torch.compile(model, backend="aot_eager")(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(compiled, want, rtol=16 * EPS, atol=0.0)
    copy.deepcopy(model).double()(input_ids=ids, labels=ids)
    assert not calls


def test_gradients_of_gradients_are_torchs():
    logits, labels = torch.randn(5, 9, requires_grad=True), torch.tensor([1, IGNORED, 8, 0, 4])
    found = []
    for compute in (
        lambda: CrossEntropy.apply(logits, labels, IGNORED),
        lambda: F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none"),
    ):
        (grad,) = torch.autograd.grad(compute().sum(), logits, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), logits)[0])
    torch.testing.assert_close(*found)
    # ... so that a sparse layer raises, as ever
    model = sparse(tiny.llama())
    ids = torch.randint(4, 50, (2, 8))
    loss = model(input_ids=ids, labels=ids).loss
    with pytest.raises(RuntimeError, match=r"twice|derivative"):
        found = torch.autograd.grad(loss, parameters(model), create_graph=True)
        (loss + sum(g.square().sum() for g in found)).backward()


class OwnLoss(LlamaForCausalLM):
    def loss_function(self, logits, labels, vocab_size, **kwargs):
        return logits.sum()


class OwnAttribute(LlamaForCausalLM):
    _loss_function = staticmethod(lambda logits, labels, vocab_size, **kwargs: logits.sum())


def test_a_model_inside_another_and_one_without_a_type_of_loss_have_it():
    outer = nn.ModuleList([tiny.llama(), tiny.gpt2()])
    lean_loss(outer)
    assert [model.loss_function is causal_lm_loss for model in outer] == [True, True]
    plain_loss(outer)
    assert not any("_loss_function" in vars(module) for module in outer.modules())


def test_other_losses_and_other_modules_stay():
    own = tiny.llama()
    own.loss_function = mine = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    subclasses = [kind(tiny.llama().config) for kind in (OwnLoss, OwnAttribute)]
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    for model in (own, *subclasses, BertForMaskedLM(config), nn.Linear(2, 2)):
        before = dict(vars(model))
        lean_loss(model)
        assert vars(model) == before
        plain_loss(model)
        assert vars(model) == before
    assert own.loss_function is mine
