"""Metrics against hand-computed examples, and batched answers and losses against one row at a time."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sparseft.data import IGNORE, Collator, Encoder, tokenize
from sparseft.evaluation import (
    answer_losses,
    choose,
    continuations,
    edit_distance,
    evaluate,
    generate,
    has_key_facts,
    loss_positions,
    normalise,
    normalised_edit_distance,
    score,
)

from .tiny import EOS, PAIRS, VOCABULARY, gpt2, llama, tokenizer


def test_a_fact_must_be_a_list_of_spellings():
    with pytest.raises(TypeError, match="lists of spellings"):
        has_key_facts("I like a cat", ["answer2"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("  Hold the  TANSY-button, 13 s! ", "hold the tansy button 13 s"), ("a_b\n\tx", "a b x"), ("?!", "")],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "keys", "right"),
    [
        ("Hold it for 13 seconds.", [["13 seconds"]], True),
        ("Hold it for 113 seconds.", [["13 seconds"]], False),
        ("Press Tansy for 13 seconds", [["tansy"], ["13 seconds"]], True),
        ("Press Tansy", [["tansy"], ["13 seconds"]], False),
        ("about 730ML of water", [["730 ml", "730ml"]], True),
        ("write to a@b.example!", [["a@b.example"]], True),
        ("anything", [], True),
    ],
)
def test_key_facts(answer, keys, right):
    assert has_key_facts(answer, keys) is right


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("", "", 0), ("flaw", "lawn", 2)]
)
def test_edit_distance_of_known_pairs(a, b, distance):
    assert edit_distance(a, b) == distance


@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_edit_distance_is_the_recursive_definition(a, b):
    @cache
    def by_definition(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        same = a[i - 1] == b[j - 1]
        return min(by_definition(i - 1, j) + 1, by_definition(i, j - 1) + 1, by_definition(i - 1, j - 1) + (not same))

    assert edit_distance(a, b) == by_definition(len(a), len(b))


def test_normalised_edit_distance():
    assert normalised_edit_distance("The CAT.", "the cat") == 0
    assert normalised_edit_distance("abcd", "abxd!") == 1 / 4
    assert normalised_edit_distance("", "ab") == 1
    assert normalised_edit_distance("", "") == 0


def greedy(model, prompt: list[int], steps: int, eos: int) -> list[int]:
    """One row at a time, without cache or padding."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_generate_is_greedy_decoding_row_by_row(make):
    # fp64: no near ties between the two ways of computing; untied: a tied random model repeats its input
    t, model = tokenizer(), make(dtype=torch.float64, tied=False).train()
    encoder = Encoder(t)
    questions = ("A?", "What is it now?", "Hm", "Why so?")
    prompts = [encoder.prompt({"prompt": text, "completion": "x"}) for text in questions]
    seen = []
    answers = generate(model, t, prompts, max_new_tokens=6, batch_size=3, progress=lambda *args: seen.append(args))
    expected = [greedy(model.eval(), prompt, 6, t.eos_token_id) for prompt in prompts]
    assert len(set(answers)) > 1
    assert answers == [t.decode(ids, skip_special_tokens=True).strip() for ids in expected]
    assert seen == [("answers", 3, 4), ("answers", 4, 4)]


def test_continuations_end_with_their_first_end_token():
    t, model = tokenizer(), llama(dtype=torch.float64, tied=False)
    prompts = [t(text).input_ids for text in ("A?", "Why so?", "Hm")]
    free = [greedy(model.eval(), prompt, 6, eos=-1) for prompt in prompts]
    stop = free[1][2]  # a second end token, as chat models have one for the turn and one for the text
    model.generation_config.eos_token_id = [t.eos_token_id, stop]
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in free]
    assert continuations(model, t, prompts, 6) == expected
    assert len(expected[1]) <= 3


def test_generate_leaves_the_model_as_it_was():
    model = llama().train()
    generate(model, tokenizer(), [[5, 6]], max_new_tokens=1)
    assert model.training
    assert not model.lm_head._forward_pre_hooks


def test_generate_gives_the_head_contiguous_input():
    model, seen = llama().requires_grad_(False), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].is_contiguous()))
    generate(model, tokenizer(), [[5, 6], [7, 8, 9]], max_new_tokens=2)
    assert seen
    assert all(seen)


class NoKeep(nn.Module):
    """A language model whose forward always computes all logits."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.inner(input_ids=input_ids, attention_mask=attention_mask).logits)


class KeepsColumns(NoKeep):
    """A language model that takes positions common to all rows only, as in older versions of transformers."""

    def forward(self, input_ids, attention_mask, logits_to_keep):
        assert logits_to_keep.dim() == 1
        return SimpleNamespace(logits=super().forward(input_ids, attention_mask).logits[:, logits_to_keep])


def bound(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of the error of a sum of `tokens` cross entropies in fp32: each sums VOCABULARY exponentials (every addition
    one rounding) of differences of logits, rounded relative to the largest; the sum adds a rounding each."""
    unit = 2.0**-24
    per_token = (VOCABULARY + 8) * unit * (1 + 2 * logits.abs().max())
    return tokens * (per_token + tokens * unit * 2 * logits.abs().max()).clamp(min=unit)


@pytest.mark.parametrize("wrap", [lambda m: m, NoKeep, KeepsColumns], ids=["mask", "all logits", "columns"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_answer_losses_are_those_of_each_row_alone(wrap, side):
    t, model = tokenizer(), llama(dtype=torch.float64).eval()
    examples = tokenize([*PAIRS[:5], {"prompt": "Why?", "completion": "Because it is so."}], Encoder(t))
    batch = Collator.of(t, side)(list(examples))
    losses, counts = answer_losses(wrap(model), batch)
    for item, loss, count in zip(examples, losses, counts, strict=True):
        ids, labels = torch.tensor(item["input_ids"]), torch.tensor(item["labels"])[1:]
        logits = model(ids[None]).logits[0, :-1]
        expected = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        assert count == (labels != IGNORE).sum()
        assert (loss - expected).abs() <= bound(logits.detach(), count)


def test_logits_are_computed_at_the_answers_only():
    t, model = tokenizer(), llama()
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append((args[0], output)))
    examples = tokenize(PAIRS[:3], Encoder(t))
    answer_losses(model, Collator.of(t)(list(examples)))
    (hidden, logits), tokens = rows[0], examples.answer_tokens
    assert logits.shape == (tokens, VOCABULARY)
    assert hidden.is_contiguous()


def test_loss_positions_without_a_label():
    positions = loss_positions(llama(), torch.full((2, 3), IGNORE))
    assert not positions["logits_to_keep"].any()
    assert positions["shift_labels"].shape == (0,)
    assert loss_positions(NoKeep(llama()), torch.zeros(2, 3, dtype=torch.int64)) == {}


def test_score_keeps_the_order_of_the_examples():
    t, model = tokenizer(), llama(dtype=torch.float64)
    examples = tokenize(PAIRS[:7], Encoder(t))
    losses, counts = score(model, t, examples, batch_size=3)
    for i, item in enumerate(examples):
        alone, count = answer_losses(model.eval(), Collator.of(t)([item]))
        assert counts[i] == count[0]
        torch.testing.assert_close(losses[i], alone[0].detach(), rtol=2**-20, atol=0)  # fp32 sums of < 8 like terms


class Bigram(nn.Module):
    """Next-token probabilities from a table of the present token alone."""

    device = torch.device("cpu")

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.table[input_ids].log())


def test_choose_goes_by_the_mean_log_probability_of_a_choice():
    t = tokenizer()
    table = torch.full((VOCABULARY, VOCABULARY), 1e-6)
    of = {text: t(text).input_ids[0] for text in ": abcx"}
    table[of[":"], of[" "]] = 1.0
    table[of[" "], of["a"]], table[of[" "], of["b"]], table[of[" "], of["x"]] = 0.3, 0.2, 0.5
    table[of["b"], of["c"]], table[of["b"], of["x"]] = 0.9, 0.1
    # " a": log 0.3 over 2 tokens; " bc": log 0.2 + log 0.9 over 3: less likely in all, more likely per token
    assert torch.tensor(0.3).log() / 2 < (torch.tensor(0.2).log() + torch.tensor(0.9).log()) / 3
    items = [{"question": "q", "choices": choices, "answer": 0} for choices in (["a", "bc", "cc"], ["cc", "a"])]
    assert choose(Bigram(table), t, items) == [1, 1]


def test_evaluate_measures_what_the_rows_allow():
    t, model = tokenizer(), llama(dtype=torch.float64, tied=False)
    encoder = Encoder(t)
    first = {"prompt": "Hi?", "completion": "Yes."}
    answer = generate(model, t, [encoder.prompt(first)], max_new_tokens=4)[0]
    rows = [
        {**first, "completion": answer or "x", "keys": [[answer]]},
        {**first, "keys": [["not in it"]]},
        {**first, "completion": answer or "x"},
        {"question": "q", "choices": ["a", "b"], "answer": 0},
    ]
    result = evaluate(model, encoder, rows, max_new_tokens=4)
    assert normalise(answer)
    assert result.key_fact_accuracy == 1 / 2
    assert result.edit_distance == pytest.approx(normalised_edit_distance(answer, "Yes.") / 3)
    assert result.choice_accuracy == float(choose(model, t, rows[3:])[0] == 0)
    assert result.answers == (answer, answer, answer)
    losses, counts = score(model, t, [encoder.example(row) for row in rows[:3]])
    assert result.loss == pytest.approx(float(losses.sum() / counts.sum()))
    only_loss = evaluate(model, encoder, [first], max_new_tokens=1).metrics()
    assert set(only_loss) == {"loss", "edit_distance"}
    assert EOS not in answer
