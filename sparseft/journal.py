"""The finished trials of a search in a file, a line each: an interrupted search goes on where it was."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparseft.finetune import RunConfig
from sparseft.trainer import SparseConfig

FREE = ("sparse", "steps", "epochs")  # fields of RunConfig that trials may differ in


class Journal:
    """A file of JSON lines: first what all trials share, then a line for each.

    Args:
        config: of all trials, but for the FREE fields. `data`: names and fingerprints of their rows.

    The file and its folder are made with the first trial.

    Attributes:
        seconds, cpu_seconds: of all trials in the file.

    Raises:
        ValueError: the file is there, and its trials were made with another configuration or other rows.
    """

    def __init__(self, path: Path, config: RunConfig, data: dict[str, str | None]):
        self.path = path
        shared = {name: value for name, value in asdict(config).items() if name not in FREE}
        self._head = json.loads(json.dumps({**shared, **data}))
        self._found: dict[str, dict[str, Any]] = {}
        self.seconds = self.cpu_seconds = 0.0
        whole = _whole_lines(path) if path.exists() else []
        if not whole:
            return
        head, *lines = whole
        different = [name for name in self._head if head.get(name) != self._head[name]]
        if different:
            name = different[0]
            if name not in head:
                raise ValueError(f"{path}: made by another version of sparseft; start anew in another folder")
            raise ValueError(f"{path}: its trials had {name}={head.get(name)!r}, now it is {self._head[name]!r}")
        for line in lines:
            self._take(line)

    def find(self, sparse: SparseConfig, steps: int) -> dict[str, Any] | None:
        """The outcome of this trial, if it was made."""
        found = self._found.get(_key(asdict(sparse), steps))
        return None if found is None else found["outcome"]

    def add(self, sparse: SparseConfig, steps: int, outcome: dict[str, Any], seconds: float, cpu_seconds: float):
        """Keep a finished trial, on the disk when this returns."""
        line = {"setting": asdict(sparse), "steps": steps, "outcome": outcome, "seconds": seconds,
                "cpu_seconds": cpu_seconds}  # fmt: skip
        new = not self.path.exists() or not self.path.stat().st_size
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            for content in (self._head, line) if new else (line,):
                file.write(json.dumps(content) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        self._found[_key(line["setting"], line["steps"])] = line
        self.seconds += line["seconds"]
        self.cpu_seconds += line["cpu_seconds"]


def _key(setting: dict[str, Any], steps: int) -> str:
    return json.dumps([setting, steps], sort_keys=True)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """What the file holds; half a line at its end, where the writing was interrupted, is cut off."""
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]
