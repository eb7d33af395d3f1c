"""Training data: rows from JSONL files or the Hub, as token ids with the loss on the answers only.

A row is a conversation, `{"messages": [{"role": ..., "content": ...}, ...]}`, or a pair,
`{"prompt": ..., "completion": ...}`; further fields are kept and ignored here.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

IGNORE = -100  # the label of a position without loss, as everywhere in transformers
ROLES = ("system", "user", "assistant", "tool")

Row = dict[str, Any]


def check_row(row: object, where: str) -> Row:
    """The row itself if it is a conversation, a pair or a multiple-choice question; otherwise ValueError at `where`."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if "messages" in row:
        _check_messages(row["messages"], where)
    elif "prompt" in row or "completion" in row:
        for name in ("prompt", "completion"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(f"{where}: {name!r} must be a text that is not empty, got {row.get(name)!r}")
    elif "choices" in row:
        choices, answer = row["choices"], row.get("answer")
        if not isinstance(row.get("question"), str) or not isinstance(choices, list) or len(choices) < 2:
            raise ValueError(f"{where}: expected 'question' (text) and 'choices' (at least two texts)")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise ValueError(f"{where}: 'answer' must be an index into the {len(choices)} choices, got {answer!r}")
    else:
        raise ValueError(f"{where}: expected 'messages' or 'prompt' and 'completion', got the fields {sorted(row)}")
    if "keys" in row:
        _check_keys(row["keys"], where)
    return row


def _check_keys(keys: object, where: str) -> None:
    """A text in place of a list would be read letter by letter."""
    if not isinstance(keys, list) or not all(
        isinstance(spellings, list) and spellings and all(isinstance(text, str) and text.strip() for text in spellings)
        for spellings in keys
    ):
        raise ValueError(f"{where}: 'keys' must be a list of facts, each a list of its spellings, got {keys!r}")


def _check_messages(messages: object, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' must be a list that is not empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"{where}: messages[{i}] must have a 'role' out of {ROLES}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: messages[{i}] must have a text as 'content'")
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"{where}: messages[{i}] is an empty answer")
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise ValueError(f"{where}: 'messages' must end with an answer (role 'assistant') to something")


def check_question(row: object, where: str) -> Row:
    """The row itself if it asks for an answer, by a `prompt` or a `question`; otherwise ValueError at `where`."""
    names = [name for name in ("prompt", "question") if isinstance(row, dict) and name in row]
    if not isinstance(row, dict) or len(names) != 1 or not isinstance(row[names[0]], str) or not row[names[0]].strip():
        raise ValueError(
            f"{where}: expected a JSON object with either 'prompt' or 'question', a text that is not empty"
        )
    return row


def plain_question(row: Row) -> str:
    """How a `question` is put to any model, whatever its chat format."""
    return f"Question: {row['question']}\nAnswer:"


def read_rows(source: str | Path, split: str = "train", check: Callable[[object, str], Row] = check_row) -> list[Row]:
    """All rows of a JSONL file or of a Hub data set, checked.

    Args:
        source: path of a `.jsonl` file, or a data set name such as `org/name` (needs the package `datasets`).
        split: which split of a Hub data set.
        check: `check_row`, or `check_question` for rows without answers.

    Raises:
        ValueError: no such file, no rows, or a broken row; the message names the file and the line.
    """
    path = Path(source)
    if path.is_file():
        rows = _read_jsonl(path, check)
    elif path.suffix or path.is_absolute() or str(source).startswith("."):
        raise ValueError(f"data: there is no file {source}")
    else:
        rows = _read_hub(str(source), split, check)
    if not rows:
        raise ValueError(f"data: {source} holds no rows")
    return rows


def _read_jsonl(path: Path, check: Callable[[object, str], Row]) -> list[Row]:
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{where}: not valid JSON ({error})") from error
            rows.append(check(row, where))
    return rows


def _read_hub(name: str, split: str, check: Callable[[object, str], Row]) -> list[Row]:
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"data: {name!r} is not a file, and a Hub data set needs the package `datasets` "
                         "(python -m pip install datasets)")  # fmt: skip
    from datasets import load_dataset

    return [check(dict(row), f"{name}[{split}], row {i}") for i, row in enumerate(load_dataset(name, split=split))]


def reference(row: Row) -> str:
    """The row's (last) answer."""
    return row["messages"][-1]["content"] if "messages" in row else row["completion"]


def fingerprint(rows: Iterable[Row]) -> str:
    """sha256 (hex) of the rows' content, in their order; the same for a file and for its copy with other spacing."""
    state = hashlib.sha256()
    for row in rows:
        state.update(json.dumps(row, sort_keys=True, ensure_ascii=True).encode() + b"\n")
    return state.hexdigest()


class Encoder:
    """Rows to token ids, in the format that the model was trained on.

    With a chat template the row's turns go through it. Without one, a pair is prompt, completion and the
    end-of-text token, with a newline between the two unless one of them brings its own space.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: True or False; None uses the tokenizer's template if it has one.
        system: system message for rows without one. None leaves that to the template (some insert a default
            of their own); "" is an explicit empty message, often the cheapest format.
        max_length: longer rows are cut at the end.
    """

    def __init__(self, tokenizer, *, chat_template: bool | None = None, system: str | None = None,
                 max_length: int = 1024):  # fmt: skip
        if chat_template and not tokenizer.chat_template:
            raise ValueError("chat_template=True, but this tokenizer has no chat template")
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}")
        self.tokenizer = tokenizer
        self.chat = bool(tokenizer.chat_template) if chat_template is None else chat_template
        self.system = system
        self.max_length = max_length

    def prompt(self, row: Row) -> list[int]:
        """Token ids of everything before the row's (last) answer."""
        return [token for text, _ in self._segments(row)[:-1] for token in self._ids(text)]

    def question(self, row: Row) -> list[int]:
        """Token ids of a row without an answer: its `prompt` in the model's format, or its `question` as plain text."""
        if "question" in row:
            return self.tokenizer(plain_question(row)).input_ids
        return self.prompt({"prompt": row["prompt"], "completion": "."})

    def example(self, row: Row) -> dict[str, list[int]]:
        """`input_ids` and `labels` of the row, both of its full length; labels are IGNORE outside of the answers."""
        input_ids, labels = [], []
        for text, learned in self._segments(row):
            ids = self._ids(text)
            input_ids += ids
            labels += ids if learned else [IGNORE] * len(ids)
        return {"input_ids": input_ids, "labels": labels}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _segments(self, row: Row) -> list[tuple[str, bool]]:
        """(text, learned) pieces of a row; the last one is the last answer. Tokenised one by one, so that the
        prompt's tokens are the same with and without the answer behind it."""
        if "messages" not in row and "prompt" not in row:
            raise ValueError(f"expected 'messages' or 'prompt' and 'completion', got the fields {sorted(row)}")
        if not self.chat:
            return self._plain(row)
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]},
                                           {"role": "assistant", "content": row["completion"]}]  # fmt: skip
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        pieces = self._chat(messages, answers) or self._chat(messages, answers[-1:])
        if pieces is None:
            raise ValueError("this tokenizer's chat template does not put the answer behind its own prompt; "
                             "use chat_template=False")  # fmt: skip
        return pieces

    def _chat(self, messages: list[dict], answers: list[int]) -> list[tuple[str, bool]] | None:
        """The pieces with these turns learned; None where the template rewrites earlier turns later on."""
        pieces: list[tuple[str, bool]] = []
        done = ""
        whole = self._render(messages)
        for i in answers:
            before, after = self._render(messages[:i], True), self._render(messages[: i + 1])
            if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
                return None
            end = after.rfind(self.tokenizer.eos_token or "\0", len(before))
            stop = len(after) if end < 0 else end + len(self.tokenizer.eos_token)  # no loss on what follows the end
            pieces += [(before[len(done) :], False), (after[len(before) : stop], True)]
            done = after[:stop]
        return pieces

    def _render(self, messages: list[dict], answer_next: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)

    def _plain(self, row: Row) -> list[tuple[str, bool]]:
        if "messages" in row:
            raise ValueError("rows with 'messages' need a chat template, and this tokenizer has none (or it is "
                             "switched off); use 'prompt' and 'completion'")  # fmt: skip
        prompt, completion = row["prompt"], row["completion"]
        if not (prompt[-1].isspace() or completion[0].isspace()):
            prompt += "\n"
        first = self.tokenizer.bos_token if getattr(self.tokenizer, "add_bos_token", False) else ""
        return [((first or "") + prompt, False), (completion + (self.tokenizer.eos_token or ""), True)]


@dataclass(frozen=True)
class Examples(Dataset):
    """Tokenised rows: item i is `{"input_ids": [...], "labels": [...]}`.

    Attributes:
        items: the examples.
        fingerprint: sha256 of the rows that they were made from.
        duplicates: rows that repeat an earlier row. `truncated`: rows cut at `max_length`. `dropped`: rows left
            out because the cut left nothing of the answer.
    """

    items: list[dict[str, list[int]]] = field(repr=False)
    fingerprint: str
    duplicates: int = 0
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return self.items[i]

    @property
    def tokens(self) -> int:
        return sum(len(item["input_ids"]) for item in self.items)

    @property
    def answer_tokens(self) -> int:
        """Tokens with a loss."""
        return sum(label != IGNORE for item in self.items for label in item["labels"][1:])

    def report(self) -> str:
        """One line for people."""
        text = f"{len(self)} examples, {self.tokens:,} tokens, {self.answer_tokens:,} of them answers"
        notes = ((self.duplicates, "duplicates (kept)"), (self.truncated, "cut at the maximal length"),
                 (self.dropped, "dropped: no answer left after the cut"))  # fmt: skip
        return "; ".join([text, *(f"{count} {note}" for count, note in notes if count)])


def tokenize(rows: Sequence[Row], encoder: Encoder) -> Examples:
    """All rows as training examples.

    Raises:
        ValueError: a row that the encoder cannot take (its number is named), or no example is left.
    """
    items, seen = [], set()
    truncated = dropped = 0
    for number, row in enumerate(rows, 1):
        try:
            item = encoder.example(row)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        seen.add(tuple(item["input_ids"]))
        if len(item["input_ids"]) > encoder.max_length:
            truncated += 1
            item = {name: ids[: encoder.max_length] for name, ids in item.items()}
        if any(label != IGNORE for label in item["labels"][1:]):
            items.append(item)
        else:
            dropped += 1
    if not items:
        raise ValueError(f"no example has an answer within max_length={encoder.max_length}")
    return Examples(items, fingerprint(rows), len(rows) - len(seen), truncated, dropped)


@dataclass(frozen=True)
class Collator:
    """Batches of examples: padded tensors `input_ids`, `attention_mask` and, where given, `labels`.

    Padding is marked by the attention mask alone: the padding token may well be the end-of-text token.

    Args:
        pad: the id that fills up rows. `side`: where, "right" or "left" (for generation).
    """

    pad: int
    side: str = "right"

    @classmethod
    def of(cls, tokenizer, side: str = "right") -> "Collator":
        """With the tokenizer's padding token, or its end-of-text token, or 0."""
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return cls(next(i for i in ids if i is not None), side)

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
        for example in examples:
            ids = example["input_ids"]
            rows = {"input_ids": (ids, self.pad), "attention_mask": ([1] * len(ids), 0)}
            if "labels" in example:
                rows["labels"] = (example["labels"], IGNORE)
            for name, (values, fill) in rows.items():
                padding = [fill] * (length - len(ids))
                columns.setdefault(name, []).append(padding + values if self.side == "left" else values + padding)
        return {name: torch.tensor(rows) for name, rows in columns.items()}


def shift(labels: Tensor) -> Tensor:
    """[B, T]: at each position the label of the next one, which is what its logits predict."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)
