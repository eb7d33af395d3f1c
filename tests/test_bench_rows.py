"""The benches' results files, and what the picture makes of them."""

import pytest

from bench.plot import shares
from bench.rows import read_rows, write_rows


def test_rows_come_back_as_text(tmp_path):
    path = tmp_path / "results" / "some.csv"
    assert read_rows(path) == []
    write_rows(path, [{"what": 'a "name", quoted', "figure": 1.5}, {"what": "", "figure": 2}])
    assert read_rows(path) == [{"what": 'a "name", quoted', "figure": "1.5"}, {"what": "", "figure": "2"}]


def test_an_interruption_leaves_the_old_file(tmp_path):
    path = tmp_path / "some.csv"
    write_rows(path, [{"figure": 1}])
    with pytest.raises(ValueError, match="unknown"):
        write_rows(path, [{"figure": 2}, {"unknown": 3}])
    assert read_rows(path) == [{"figure": "1"}]


def test_shares_are_of_the_same_round():
    """Medians over rounds of the ratio to dense, not ratios of medians; rounds without dense do not count."""

    def row(run, number, provider, step_ms, model="smollm2", dtype="fp32"):
        return {"run": run, "round": number, "model": model, "dtype": dtype, "provider": provider, "step_ms": step_ms}

    rows = [
        row("a", "0", "dense", "100"), row("a", "0", "frozen", "60"),
        row("a", "1", "dense", "200"), row("a", "1", "frozen", "140"),
        row("b", "0", "dense", "1000"), row("b", "0", "frozen", "10"),
        row("b", "1", "frozen", "1"), row("b", "1", "lora8", "1"),
        row("b", "0", "dense", "1", model="llama1b"), row("b", "0", "frozen", "1", dtype="bf16"),
    ]  # fmt: skip
    assert shares(rows, "step_ms", "fp32") == {"frozen": 0.6, "dense": 1.0}
