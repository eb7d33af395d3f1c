"""The finished runs: one CSV, a row each. A run that is in it is not run again."""

import csv
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLUMNS = (
    "key", "study", "task", "variant", "method", "options", "role", "rate", "seed", "steps", "batch", "status",
    "trained_values", "train_loss", "validation_accuracy", "validation_loss",
    "accuracy", "low", "high", "rows", "loss", "other", "other_accuracy", "other_rows", "hellaswag_accuracy",
    "hellaswag_rows", "text_loss", "prepare_wall_s", "prepare_cpu_s", "train_wall_s", "train_cpu_s", "evaluate_wall_s",
    "skipped_steps", "hits", "dtype", "cpu", "cores", "gpu", "python", "torch", "transformers", "commit", "finished",
)  # fmt: skip
NUMBERS = {name for name in COLUMNS if name.endswith(("_s", "_accuracy", "_loss", "_rows", "_values", "_steps"))} | {
    "rate", "seed", "steps", "batch", "accuracy", "low", "high", "rows", "loss"
}  # fmt: skip

Row = dict[str, Any]


class Store:
    """The CSV file; every change replaces it whole, so that an interruption leaves the old one or the new one."""

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[Row]:
        """All rows; empty fields are left out, numbers are floats."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [
                {name: float(text) if name in NUMBERS else text for name, text in row.items() if text}
                for row in csv.DictReader(file)
            ]

    def add(self, row: Row) -> None:
        """Append one run.

        Raises:
            ValueError: the row has an unknown column, or its key is in the file already.
        """
        unknown = row.keys() - set(COLUMNS)
        if unknown:
            raise ValueError(f"row: unknown columns {sorted(unknown)}")
        rows = self.rows()
        if any(old["key"] == row["key"] for old in rows):
            raise ValueError(f"row: {row['key']} is in {self.path} already")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with scratch.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*rows, row])
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self.path)

    @contextmanager
    def only_one(self) -> Iterator[None]:
        """One process at a time: runs that share the machine would falsify each other's times.

        Raises:
            RuntimeError: another process runs this study.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RuntimeError(f"another process writes {self.path}") from error
            yield
