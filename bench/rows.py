"""Rows of results in a CSV file, which is replaced whole: an interruption leaves the old one or the new one."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows, as text; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The first row's keys are the head."""
    path.parent.mkdir(exist_ok=True)
    whole = path.with_suffix(".part")
    with whole.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    whole.replace(path)
