"""Tiny random GPT-2, Llama and mixture-of-experts models, trained through both doors and saved as plain models."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from sparseft import Pattern, SparseLinear, sparsify
from sparseft.conv1d import SparseConv1D
from sparseft.layers import selected
from sparseft.optim import SparseAdamW

VOCABULARY = 40
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 32}  # fmt: skip


def gpt2() -> PreTrainedModel:
    """Conv1D weights [in, out]; the output head is the embedding."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, n_positions=32,
                                      n_embd=16, n_layer=2, n_head=2,
                                      resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))  # fmt: skip


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=24))


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=4))


def qwen3_moe() -> PreTrainedModel:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, intermediate_size=24, moe_intermediate_size=16, num_experts=4,
                                              num_experts_per_tok=2, head_dim=8))  # fmt: skip


MODELS = {"gpt2": gpt2, "llama": llama, "mixtral": mixtral, "qwen3_moe": qwen3_moe}
EXPERTS = ("mixtral", "qwen3_moe")


def build(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """As `from_pretrained(dtype=...)` does: buffers such as the rotary frequencies stay fp32."""
    model = MODELS[name]()
    return type(model)._from_config(model.config, dtype=dtype)


def random_patterns(model: nn.Module, embeddings: bool) -> dict[str, Pattern]:
    chosen = {}
    for name, p in model.named_parameters():
        if p.dim() > 1 and (embeddings or not any(part in name for part in ("embed", "wte", "wpe", "lm_head"))):
            chosen[name] = Pattern.from_mask(torch.rand(p.shape) < 0.2, tile=(8, 8))
    return chosen


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[float]:
    tokens = torch.randint(VOCABULARY, (4, 12))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def changed_bits(before: Tensor, after: Tensor) -> Tensor:
    """bool of the tensors' shape: which elements differ in any bit (-0.0 is not 0.0, NaN is itself)."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[after.element_size()]
    return before.view(integer) != after.view(integer)


def assert_only_selected_changed(model: nn.Module, start: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict(keep_vars=False).items():
        changed = changed_bits(start[name], tensor)
        mask = masks.get(name, torch.zeros_like(changed))
        assert not bool((changed & ~mask).any()), f"{name}: an entry that is not selected has changed"
        assert name not in masks or bool(changed.any()), f"{name}: nothing has changed"


def tied(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The masks by every name under which the state_dict lists a weight."""
    by_address = {model.get_parameter(name).data_ptr(): mask for name, mask in masks.items()}
    return {name: by_address[t.data_ptr()] for name, t in model.state_dict().items() if t.data_ptr() in by_address}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_lean_door_changes_the_selected_entries_only(name, embeddings, dtype):
    model = build(name, dtype)
    start, patterns = copy.deepcopy(model.state_dict()), random_patterns(model, embeddings)
    sparsify(model, patterns)
    kinds, head = [type(m) for m in model.modules()], embeddings and name != "gpt2"
    assert kinds.count(SparseConv1D) == (8 if name == "gpt2" else 0)
    assert kinds.count(SparseLinear) == {"gpt2": 0, "llama": 14, "mixtral": 8, "qwen3_moe": 8}[name] + head
    optimizer = SparseAdamW(model, lr=0.02)
    losses = train(model, optimizer)
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.parameters() if not any(p is c.values for c in selected(model).values()))
    masks = {n: p.to_mask().view(model.get_parameter(n).shape) for n, p in patterns.items()}
    assert_only_selected_changed(model, start, tied(model, masks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", ["model", "parameters"])
@pytest.mark.parametrize("name", MODELS)
def test_the_drop_in_door_changes_the_selected_entries_only(name, given, dtype):
    model = build(name, dtype)
    start = copy.deepcopy(model.state_dict())
    params = model if given == "model" else model.parameters()
    optimizer = SparseAdamW(params, lr=0.02, density=0.05, allocation="layer" if name in EXPERTS else "global")
    losses = train(model, optimizer)
    assert losses[-1] < losses[0]
    names = {id(p): n for n, p in model.named_parameters()}
    masks = {}
    for leaf in optimizer.param_groups[0]["params"]:
        chosen = optimizer._selected(leaf)
        masks[names[id(chosen.weight)]] = chosen.pattern.to_mask().view(chosen.weight.shape)
    if name in EXPERTS:
        assert any(mask.dim() == 3 for mask in masks.values())
    if given == "model":
        assert not any(part in n for n in masks for part in ("embed", "wte", "wpe", "lm_head", "norm", "ln_"))
        assert sum(int(mask.sum()) for mask in masks.values()) < 0.05 * sum(p.numel() for p in model.parameters())
    assert_only_selected_changed(model, start, tied(model, masks))


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_3d_parameters_and_get_the_dense_gradients_entries(name):
    model = MODELS[name]()
    patterns = random_patterns(model, embeddings=False)
    experts = [n for n in patterns if model.get_parameter(n).dim() == 3]
    assert len(experts) == 4  # two layers, gate_up and down
    dense, tokens = copy.deepcopy(model), torch.randint(VOCABULARY, (2, 9))
    sparsify(model, patterns)
    for each in (model, dense):
        each(input_ids=tokens, labels=tokens).loss.backward()
    for n in experts:
        chosen, grad = selected(model)[n], dense.get_parameter(n).grad
        assert chosen.pattern.shape == (grad.shape[0] * grad.shape[1], grad.shape[2])
        torch.testing.assert_close(
            chosen.values.grad, grad[chosen.pattern.to_mask().view(grad.shape)][_order(chosen.pattern)]
        )
        assert chosen.weight.grad is None


def _order(pattern: Pattern) -> Tensor:
    """Where each of the pattern's entries stands among the mask's entries in row-major order."""
    return torch.argsort(torch.argsort(pattern.indices()))


LOAD_WITHOUT_SPARSEFT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sparseft":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    expected = load_file(folder + "/expected.safetensors")
    with torch.no_grad():
        logits = model.eval()(input_ids=expected["tokens"]).logits
    assert torch.equal(logits, expected["logits"]), (folder, float((logits - expected["logits"]).abs().max()))
assert not any(name.partition(".")[0] == "sparseft" for name in sys.modules)
print("same logits", len(sys.argv) - 1)
"""


def test_a_trained_model_loads_without_sparseft_with_the_same_logits(tmp_path: Path):
    for name in ("gpt2", "llama", "mixtral"):
        for dtype in (torch.float32, torch.bfloat16):
            model = build(name, dtype)
            before, tokens = copy.deepcopy(model), torch.randint(VOCABULARY, (2, 9))
            sparsify(model, random_patterns(model, embeddings=True))
            train(model, SparseAdamW(model, lr=0.02), steps=3)
            with torch.no_grad():
                logits = model.eval()(input_ids=tokens).logits
                assert not torch.equal(logits, before.eval()(input_ids=tokens).logits)
            folder = tmp_path / f"{name}-{str(dtype).rpartition('.')[2]}"
            model.save_pretrained(folder)
            save_file({"tokens": tokens, "logits": logits}, folder / "expected.safetensors")
    folders = sorted(str(folder) for folder in tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_SPARSEFT, *folders], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same logits 6"
