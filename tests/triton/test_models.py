"""Whole models on the Triton kernels: selection, training steps and a delta's round trip, beside the reference's."""

import copy

import pytest
import torch

from sparseft import Delta, SparseAdamW, backend, select, sparsify
from sparseft.layers import parameters, selected

from ..kernels.table import bits
from . import hardened, strict  # noqa: F401 (the kernels run in the strict interpreter)

transformers = pytest.importorskip("transformers")
VOCABULARY, LR, EPS = 83, 0.01, 1e-8


def qwen2():
    """Grouped queries (6 heads, 2 of keys and values), biases, sizes that no tile divides, a head of its own."""
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=60, intermediate_size=77, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def gpt2():
    """Conv1D weights [in, out]; the head is the embedding."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=36, n_layer=1, n_head=3, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def trained(implementation: str, model: torch.nn.Module, tokens: torch.Tensor) -> torch.nn.Module:
    """The model after one step per batch on entries that were selected by all batches."""
    batches = [{"input_ids": t, "labels": t} for t in tokens]
    with backend.forced(implementation):
        sparsify(model, select(model, batches, density=0.05, tile=(16, 16)))
        optimizer = SparseAdamW(model, lr=LR, eps=EPS, weight_decay=0.1)
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters(model), 1.0)
            optimizer.step()
    return model


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: bits(tensor).clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [qwen2, gpt2])
def test_a_model_trains_and_its_delta_comes_and_goes(make, dtype, tmp_path):
    """In fp64, gradients (clipped to 1) are off by some 1e-15, which Adam divides by no less than eps. In bf16 the
    masters are held against the weights only: the rounding of one gradient near zero may turn an entry's first step."""
    base = make().to(dtype)
    start, tokens = state(base), torch.randint(VOCABULARY, (2, 2, 13))
    with hardened.recorded() as launches:
        model = trained("triton", copy.deepcopy(base), tokens)
    assert {"_compact", "_tiles", "_adamw", "_count", "_gather"} <= {launch.kernel for launch in launches}

    mine, theirs = selected(model), selected(trained("reference", copy.deepcopy(base), tokens))
    assert mine.keys() == theirs.keys() and len(mine) > 10
    for name, one in mine.items():
        assert torch.equal(one.pattern.indices(), theirs[name].pattern.indices())
        assert torch.equal(one.weight.view(-1)[one.pattern.indices()], one.values.to(dtype))
        assert one.values.sub(one.base).abs().max() > LR / 20  # norms and biases have a tenth of the rate
        if dtype == torch.float64:
            bound = len(tokens) * LR * 1e-15 / EPS
            torch.testing.assert_close(one.values, theirs[name].values, rtol=0, atol=bound)

    end = state(model)
    for name, one in mine.items():
        unselected = torch.ones(one.weight.numel(), dtype=torch.bool)
        unselected[one.pattern.indices()] = False
        assert torch.equal(end[name].view(-1)[unselected], start[name].view(-1)[unselected])

    Delta.from_model(model).save(tmp_path / "delta.safetensors")
    delta = Delta.load(tmp_path / "delta.safetensors")
    with backend.forced("triton"), hardened.recorded() as launches:
        for _ in range(2):
            assert same(state(delta.apply_(base)), end)
            assert same(state(delta.revert_(base)), start)
    assert {launch.kernel for launch in launches} == {"_scatter"}
