"""The study's data: questions with a closed set of labels, of which the most likely one is the answer."""

import csv
import json
import os
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

INTENTS = 20  # of banking77's 77, the first in its list of categories


@dataclass(frozen=True)
class Item:
    """A prompt, the labels that may follow it (with the space in front) and the number of the right one."""

    prompt: str
    labels: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    """A data set in three parts; what is tuned is tuned on the validation part, which was cut from the training part.

    Attributes:
        ends: a label's likelihood includes that the text ends behind it; for sets in which one label begins another.
        per_character: likelihoods count per character; for labels that are free text of different lengths.
    """

    name: str
    train: list[Item] = field(repr=False)
    validation: list[Item] = field(repr=False)
    test: list[Item] = field(repr=False)
    ends: bool = False
    per_character: bool = False


def data_folder() -> Path:
    """$SPARSEFT_DATA, or shared/data beside the checkout.

    Raises:
        FileNotFoundError: there is no such folder; the message says what it must hold.
    """
    folder = Path(os.environ.get("SPARSEFT_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    needed = ("banking77/train.csv", "arc_easy/train.jsonl", "hellaswag/val.jsonl")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the study's data are not in {folder} (missing: {', '.join(missing)}); set SPARSEFT_DATA to a folder with "
            "banking77/{train.csv,test.csv,categories.json}, arc_easy/{train,test}.jsonl and hellaswag/val.jsonl"
        )
    return folder


def banking77(folder: Path, intents: int = INTENTS) -> Task:
    """Intents of bank customers' questions (Casanueva et al., 2020), all rows of the first `intents` categories."""
    names = json.loads((folder / "banking77" / "categories.json").read_text())[:intents]
    labels = tuple(" " + name.replace("_", " ").rstrip("?") for name in names)

    def read(part: str) -> list[Item]:
        with (folder / "banking77" / f"{part}.csv").open(newline="") as file:
            return [
                Item(f"{row['text'].strip()}\nIntent:", labels, names.index(row["category"]))
                for row in csv.DictReader(file)
                if row["category"] in names
            ]

    train, validation = split(read("train"))
    return Task("banking77", train, validation, read("test"), ends=True)


def arc_easy(folder: Path) -> Task:
    """Science questions for schools (Clark et al., 2018); the labels are the answers' own words."""

    def read(part: str) -> list[Item]:
        lines = (folder / "arc_easy" / f"{part}.jsonl").read_text().splitlines()
        return [_arc_item(json.loads(line)) for line in lines]

    train, validation = split(read("train"))
    return Task("arc_easy", train, validation, read("test"), per_character=True)


def _arc_item(row: dict[str, str]) -> Item:
    """From "Please choose the correct answer to the question: ...", "Answer1: ... Answer2: ..." and "answer2"."""
    found = re.fullmatch(r".*?question: (.*?)\n\n(Answer1: .*)\n\nAnswer format: .*", row["instruction"].strip(), re.S)
    if found is None:
        raise ValueError(f"arc_easy: no question with answers in {row['instruction']!r}")
    choices = re.split(r"(?:^|\s+)Answer\d+: ?", found[2])[1:]
    return Item(
        f"Question: {found[1].strip()}\nAnswer:",
        tuple(" " + choice.strip() for choice in choices),
        int(row["answer"].removeprefix("answer")) - 1,
    )


def hellaswag(folder: Path) -> Task:
    """How a sentence goes on (Zellers et al., 2019); the study never trains on it."""
    lines = (folder / "hellaswag" / "val.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    items = [Item(row["ctx"].strip(), tuple(" " + e.strip() for e in row["endings"]), row["label"]) for row in rows]
    return Task("hellaswag", [], [], items, per_character=True)


def split(items: list[Item], share: float = 0.1) -> tuple[list[Item], list[Item]]:
    """(training, validation) parts; the same for the same rows, whatever the run's seed."""
    mixed = sample(items, len(items))
    cut = round(share * len(items))
    return mixed[cut:], mixed[:cut]


def sample(items: list[Item], count: int) -> list[Item]:
    """At most `count` items, always the same ones; a smaller sample is the beginning of a larger one."""
    return random.Random(0).sample(items, len(items))[:count]
