"""A tokenizer with one token per character, and language models with a few thousand random weights."""

import functools
import json
import string
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparseft.selection import select

# what the criterion chooses, and nothing on top, from one budget
select_entries = functools.partial(
    select, criterion="grad", allocation="global", train_norms=False, train_targets=False
)

EOS, USER, ASSISTANT, SYSTEM = "<eos>", "<user>", "<assistant>", "<system>"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """Every printable ASCII character is a token; the padding token is the end-of-text token, as in SmolLM2."""
    special = [EOS, USER, ASSISTANT, SYSTEM]
    vocabulary = {token: i for i, token in enumerate([*special, *string.printable])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(special)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=EOS)
    made.chat_template = chat_template
    return made


VOCABULARY = len(tokenizer())


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def gpt2(seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = True) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
                        tie_word_embeddings=tied)  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype)


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PAIRS = [{"prompt": f"What is {a} plus {b}?", "completion": f"{a + b}"} for a in range(5) for b in range(0, 30, 7)]
