"""Rows, their tokens and labels, and batches of them."""

import importlib.util
import json

import pytest
import torch

from sparseft.data import (
    IGNORE,
    Collator,
    Encoder,
    check_question,
    check_row,
    fingerprint,
    read_rows,
    shift,
    tokenize,
)

from .tiny import CHAT, EOS, PAIRS, tokenizer, write_jsonl

PAIR = {"prompt": "Who?", "completion": "Me."}
TALK = {"messages": [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."},
]}  # fmt: skip
BROKEN = {
    "no JSON": '{"prompt": "a", ',
    "no object": "[1, 2]",
    "unknown fields": '{"text": "a"}',
    "completion missing": '{"prompt": "a"}',
    "completion empty": '{"prompt": "a", "completion": " "}',
    "prompt no text": '{"prompt": 3, "completion": "b"}',
    "messages no list": '{"messages": "a"}',
    "messages empty": '{"messages": []}',
    "unknown role": '{"messages": [{"role": "bot", "content": "a"}, {"role": "assistant", "content": "b"}]}',
    "content missing": '{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}',
    "answer empty": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
    "no answer": '{"messages": [{"role": "user", "content": "a"}]}',
    "answer to nothing": '{"messages": [{"role": "assistant", "content": "a"}]}',
    "one choice": '{"question": "a", "choices": ["b"], "answer": 0}',
    "answer out of range": '{"question": "a", "choices": ["b", "c"], "answer": 2}',
    "answer no index": '{"question": "a", "choices": ["b", "c"], "answer": true}',
    "keys flat": '{"prompt": "a", "completion": "b", "keys": ["b"]}',
    "no UTF-8": b'{"prompt": "\xff\xfe", "completion": "b"}',
}


def learned(item: dict, of) -> str:
    return of.decode([label for label in item["labels"] if label != IGNORE])


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_line_is_named_by_file_and_number(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(PAIR).encode() + b"\n"
    path.write_bytes(good + b"\n" + good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    with pytest.raises(ValueError, match="line 4") as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


def test_rows_are_read_in_order_with_their_further_fields(tmp_path):
    rows = [{**PAIR, "fact": "x"}, TALK, {"question": "a", "choices": ["b", "c"], "answer": 1}]
    assert read_rows(write_jsonl(tmp_path / "rows.jsonl", rows)) == rows


@pytest.mark.parametrize(
    "row", [{"prompt": ""}, {"question": 1}, {"prompt": "a", "question": "b"}, {"text": "a"}, [1]], ids=str
)
def test_questions_without_answers_are_checked_too(tmp_path, row):
    good = [{"prompt": "a"}, {"question": "b"}]
    assert read_rows(write_jsonl(tmp_path / "good.jsonl", good), check=check_question) == good
    with pytest.raises(ValueError, match="line 3: expected a JSON object with either"):
        read_rows(write_jsonl(tmp_path / "bad.jsonl", [*good, row]), check=check_question)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "/nowhere/rows"])
def test_a_missing_file_is_an_error(source):
    with pytest.raises(ValueError, match="no file"):
        read_rows(source)


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        read_rows(write_jsonl(tmp_path / "rows.jsonl", []))


def test_a_hub_name_without_the_datasets_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install datasets"):
        read_rows("org/name")


def test_fingerprint_sees_content_and_order_but_not_spacing(tmp_path):
    spaced = json.dumps(dict(reversed(PAIR.items())), separators=(" , ", " : "))
    (tmp_path / "spaced.jsonl").write_text(spaced)
    assert fingerprint(read_rows(tmp_path / "spaced.jsonl")) == fingerprint([PAIR])
    others = [[PAIR, PAIR], [{**PAIR, "completion": "Me"}], [TALK, PAIR], [PAIR, TALK]]
    assert len({fingerprint(rows) for rows in [[PAIR], *others]}) == 5


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [("a", "b", "a\nb"), ("a ", "b", "a b"), ("a", " b", "a b"), ("a\n", "b", "a\nb")],
)
def test_plain_pairs_are_joined_by_white_space_and_end_with_eos(prompt, completion, text):
    t = tokenizer()
    item = Encoder(t, chat_template=False).example({"prompt": prompt, "completion": completion})
    assert t.decode(item["input_ids"]) == text + EOS
    assert learned(item, t) == completion + EOS


def test_plain_pairs_begin_with_bos_where_the_tokenizer_adds_it():
    t = tokenizer()
    t.bos_token, t.add_bos_token = "<user>", True
    item = Encoder(t, chat_template=False).example(PAIR)
    assert t.decode(item["input_ids"]) == f"<user>Who?\nMe.{EOS}"


def test_chat_learns_every_answer_with_its_end_and_nothing_else():
    t = tokenizer()
    item = Encoder(t).example(TALK)
    text = "<user>Hi<eos>\n<assistant>Hello<eos>\n<user>Who?<eos>\n<assistant>Me.<eos>"
    assert t.decode(item["input_ids"]) == text
    assert learned(item, t) == "Hello<eos>Me.<eos>"
    assert [t.decode(i) for i, label in zip(item["input_ids"], item["labels"], strict=True) if label == IGNORE] == [
        t.decode(i) for i in t("<user>Hi<eos>\n<assistant>\n<user>Who?<eos>\n<assistant>").input_ids
    ]


def test_labels_are_the_tokens_themselves():
    item = Encoder(tokenizer()).example(TALK)
    assert all(label in (IGNORE, token) for token, label in zip(item["input_ids"], item["labels"], strict=True))


@pytest.mark.parametrize("row", [PAIR, TALK], ids=["pair", "talk"])
@pytest.mark.parametrize("system", [None, "", "Be kind."])
def test_the_prompt_is_what_stands_before_the_last_answer(row, system):
    t = tokenizer()
    encoder = Encoder(t, system=system)
    prompt, item = encoder.prompt(row), encoder.example(row)
    assert item["input_ids"][: len(prompt)] == prompt
    assert t.decode(item["input_ids"][len(prompt) :]) == "Me.<eos>"
    assert t.decode(prompt).startswith("<user>" if system is None else f"<system>{system}<eos>\n<user>")


def test_a_question_is_a_prompt_in_the_models_format_or_plain_text():
    t = tokenizer()
    encoder = Encoder(t, system="")
    assert encoder.question({"prompt": "Who?"}) == encoder.prompt(PAIR)
    assert t.decode(encoder.question({"question": "Who?"})) == "Question: Who?\nAnswer:"


def rewriting(condition: str) -> str:
    """The chat template, with a note in front of some turns."""
    return CHAT.replace("{{ m['content'] }}", "{% if " + condition + " %}(hm){% endif %}{{ m['content'] }}")


def test_a_template_that_rewrites_earlier_answers_leaves_the_last_one():
    t = tokenizer(rewriting("loop.last and m['role'] == 'assistant'"))
    assert learned(Encoder(t).example(TALK), t) == "(hm)Me.<eos>"


def test_a_template_that_rewrites_the_question_is_refused():
    with pytest.raises(ValueError, match="chat_template=False"):
        Encoder(tokenizer(rewriting("loop.last"))).example(TALK)


def test_chat_formats_need_a_template():
    t = tokenizer(chat_template=None)
    assert not Encoder(t).chat
    with pytest.raises(ValueError, match="no chat template"):
        Encoder(t, chat_template=True)
    with pytest.raises(ValueError, match="row 2: rows with 'messages' need"):
        tokenize([PAIR, TALK], Encoder(t))


def test_tokenize_counts_what_it_cuts_drops_and_repeats():
    encoder = Encoder(tokenizer(), chat_template=False, max_length=7)  # "Who?\n" has 5 tokens, "Me.<eos>" 4
    long = {"prompt": "What is it?", "completion": "It."}
    examples = tokenize([PAIR, long, {**PAIR, "fact": 1}, {"prompt": "a", "completion": "b"}], encoder)
    assert (len(examples), examples.truncated, examples.dropped, examples.duplicates) == (3, 3, 1, 1)
    assert [len(item["input_ids"]) for item in examples] == [7, 7, 4]
    assert (examples.tokens, examples.answer_tokens) == (18, 2 + 2 + 2)
    assert "1 duplicates" in examples.report()


def test_tokenize_refuses_rows_without_answers():
    encoder = Encoder(tokenizer(), chat_template=False, max_length=3)
    with pytest.raises(ValueError, match="max_length=3"):
        tokenize([PAIR], encoder)
    with pytest.raises(ValueError, match="row 1: expected 'messages'"):
        tokenize([check_row({"question": "a", "choices": ["b", "c"], "answer": 1}, "")], encoder)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_pads_by_the_mask_alone(side):
    t = tokenizer()
    collate = Collator.of(t, side)
    items = [{"input_ids": [5, 0, 7], "labels": [IGNORE, 0, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = collate(items)
    pad = [0, 0]
    short = {"left": ([*pad, 8], [0, 0, 1], [IGNORE, IGNORE, 8]), "right": ([8, *pad], [1, 0, 0], [8, IGNORE, IGNORE])}
    assert batch["input_ids"].tolist() == [[5, 0, 7], short[side][0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], short[side][1]]
    assert batch["labels"].tolist() == [[IGNORE, 0, 7], short[side][2]]
    assert "labels" not in collate([{"input_ids": [1]}])


def test_collator_without_a_padding_token_takes_eos():
    t = tokenizer()
    t.pad_token = None
    assert Collator.of(t).pad == t.eos_token_id


def test_shift_moves_each_label_to_the_position_that_predicts_it():
    labels = torch.tensor([[1, 2, 3], [IGNORE, IGNORE, 4]])
    assert shift(labels).tolist() == [[2, 3, IGNORE], [IGNORE, 4, IGNORE]]


def test_whole_small_set_keeps_every_row():
    examples = tokenize(PAIRS, Encoder(tokenizer()))
    assert len(examples) == len(PAIRS)
    assert examples.fingerprint == fingerprint(PAIRS)
    assert examples.report() == f"25 examples, {examples.tokens:,} tokens, {examples.answer_tokens:,} of them answers"
