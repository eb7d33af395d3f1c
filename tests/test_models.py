"""Loading, conversion of GGUF files, folders that appear whole or not at all, and what a model weighs."""

import resource
import sys
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparseft import models, sparsify
from sparseft.pattern import Pattern

from .tiny import gpt2, llama, tokenizer

TOKENS = ["<eos>", "a", "b", "ab", "\u0120", "\u010a", *"cdefghij"]  # byte-level BPE: \u0120 is the space
HIDDEN, INNER, HEADS = 8, 16, 2


def write_gguf(path: Path) -> dict[str, numpy.ndarray]:
    """A one-layer Llama with random fp32 weights and a byte-level tokenizer; returns the tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}")
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,),
              "blk.0.ffn_norm": (HIDDEN,), "blk.0.ffn_up": (INNER, HIDDEN), "blk.0.ffn_gate": (INNER, HIDDEN),
              "blk.0.ffn_down": (HIDDEN, INNER)}  # fmt: skip
    shapes |= {f"blk.0.attn_{part}": (HIDDEN, HIDDEN) for part in ("q", "k", "v", "output")}
    tensors = {name: numpy.random.randn(*shape).astype(numpy.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved bf16 model with its tokenizer."""
    llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("fp32", torch.float32)])
def test_load_a_folder(folder, dtype, expected):
    model, t = models.load(folder, dtype=dtype)
    assert model.dtype == expected
    assert not model.training
    assert t("Hi").input_ids == tokenizer()("Hi").input_ids
    for name, tensor in llama(dtype=torch.bfloat16).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(expected))


def test_errors_name_what_is_wrong(folder, tmp_path):
    with pytest.raises(ValueError, match="dtype must be 'auto' or one of"):
        models.load(folder, dtype="int8")
    with pytest.raises(ValueError, match="no file"):
        models.load(tmp_path / "absent.gguf")
    with pytest.raises(ValueError, match=r"cannot load .*empty"):
        (tmp_path / "empty").mkdir()
        models.load(tmp_path / "empty")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF?")
    with pytest.raises(ValueError, match=r"cannot convert .*broken\.gguf"):
        models.load(tmp_path / "broken.gguf")
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda"):
        models.device("tpu9")


def test_a_gguf_file_is_converted_once_to_a_plain_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEFT_CACHE", str(tmp_path / "cache"))
    tensors = write_gguf(tmp_path / "tiny.gguf")
    model, t = models.load(tmp_path / "tiny.gguf", dtype="fp32")
    expected = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "token_embd",
                "model.layers.0.mlp.up_proj": "blk.0.ffn_up", "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
                "model.layers.0.self_attn.v_proj": "blk.0.attn_v"}  # fmt: skip
    for name, source in expected.items():
        assert torch.equal(model.get_parameter(f"{name}.weight").detach(), torch.from_numpy(tensors[source])), name
    assert t("ab a").input_ids == [TOKENS.index(token) for token in ("ab", "\u0120", "a")]
    assert t.eos_token == "<eos>"
    assert t.chat_template

    (converted,) = (tmp_path / "cache").iterdir()
    plain = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    ids = torch.arange(5)[None]
    assert torch.equal(plain(ids).logits, model(ids).logits)

    made = converted.stat().st_ino
    again, _ = models.load(tmp_path / "tiny.gguf", dtype="fp32")
    assert models.state_sha256(again) == models.state_sha256(model)
    assert [folder.stat().st_ino for folder in (tmp_path / "cache").iterdir()] == [made]


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gguf_file_loads_in_the_fast_dtype(tmp_path, monkeypatch, fast, dtype):
    monkeypatch.setenv("SPARSEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "fast_bf16", lambda device: fast)
    write_gguf(tmp_path / "tiny.gguf")
    assert models.load(tmp_path / "tiny.gguf")[0].dtype == dtype


def test_a_package_with_a_gguf_file_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_model").mkdir()
    (tmp_path / "some_model" / "__init__.py").touch()
    write_gguf(tmp_path / "some_model" / "tiny.gguf")
    assert models.load("some-model", dtype="fp32")[0].config.hidden_size == HIDDEN


def test_the_cache_folder(monkeypatch):
    monkeypatch.delenv("SPARSEFT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert models.cache() == Path("/somewhere/sparseft")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache() == Path.home() / ".cache" / "sparseft"
    monkeypatch.setenv("SPARSEFT_CACHE", "/here")
    assert models.cache() == Path("/here")


def test_count_takes_tied_weights_once_and_no_leaves():
    tied, untied, conv = llama(), llama(tied=False), gpt2()
    for model in (tied, untied, conv):
        expected = sum(p.numel() for p in model.parameters())
        name, weight = next((n, p) for n, p in model.named_parameters() if "mlp" in n and p.dim() == 2)
        sparsify(model, {name: Pattern.from_mask(torch.rand(weight.shape) < 0.5)})
        assert models.count(model) == expected
    assert models.count(untied) - models.count(tied) == untied.lm_head.weight.numel()


def test_state_sha256_sees_every_bit_and_name():
    model = llama(dtype=torch.bfloat16)
    digest = models.state_sha256(model)
    assert digest == models.state_sha256(llama(dtype=torch.bfloat16))
    weight = model.model.layers[1].mlp.down_proj.weight.data
    bits = weight.view(torch.int16)
    bits[-1, -1] ^= 1
    assert models.state_sha256(model) != digest
    bits[-1, -1] ^= 1
    assert models.state_sha256(model) == digest
    weight[0, 0] = 0.0
    zero = models.state_sha256(model)
    weight[0, 0] = -0.0
    assert models.state_sha256(model) != zero


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "target"
    for content in ("first", "second"):
        with models.new_folder(target) as made:
            (made / content).write_text(content)
            assert not (target / content).exists()
        assert [file.name for file in target.iterdir()] == [content]
    with pytest.raises(KeyError), models.new_folder(target) as made:
        (made / "third").touch()
        raise KeyError
    assert [file.name for file in target.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]


def test_peak_memory_is_that_of_the_process():
    before = models.peak_memory_bytes()
    block = torch.ones(1 << 26)  # 256 MiB, touched
    peak = models.peak_memory_bytes()
    assert peak >= block.nbytes
    unit = 1 if sys.platform == "darwin" else 1024
    assert before <= peak <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit * 1.05
