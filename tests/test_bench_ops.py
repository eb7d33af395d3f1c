"""The CPU benchmark of the operations: it runs on small sizes, and each operation as an entry of pytest-benchmark."""

import pytest
import torch

from bench import ops
from bench.rows import read_rows

SMALL = ops.Sizes(squares=(96,), tokens=(33,), densities=(0.01, 0.05), shapes=((48, 32), (32, 64)), layers=2,
                  embedding=(64, 32), scores=20_000, repeats=1)  # fmt: skip


@pytest.mark.parametrize("name", ops.OPERATIONS)
def test_a_group_is_checked_timed_and_judged(name):
    for group in ops.OPERATIONS[name](SMALL):
        rows = [{**row, "round": 1} for row in ops.measure(group, repeats=1)]
        assert {row["what"] for row in rows if row["unit"] == "ms"} == set(group.calls)
        judged = ops.judge(rows)
        assert [row["what"] for row in judged] == [row["what"] for row in rows if row["unit"] == "ratio"]
        assert all(row["figure"] > 0 for row in rows)
        assert all(isinstance(ops.show(row), str) for row in rows + judged)


def test_the_median_over_the_rounds_is_judged():
    def rows(what, figures, bound):
        about = {"operation": "switch", "size": "", "dtype": "fp32", "unit": "ratio", "verdict": ""}
        return [
            {**about, "what": what, "figure": figure, "bound": bound, "round": i} for i, figure in enumerate(figures)
        ]

    measured = [*rows("good", [9.0, 3.0, 7.0], 7.0), *rows("bad", [9.0, 6.99996, 1.0], 7.0), *rows("time", [1.0], None)]
    judged = [ops.stored(row) for row in ops.judge(measured)]
    assert [(row["what"], row["figure"], row["verdict"], row["round"]) for row in judged] == [
        ("good", 7.0, "ok", "median"),
        ("bad", 7.0, "short", "median"),  # what is stored is rounded, what is judged is not
    ]


@pytest.mark.parametrize(("bound", "status"), [(1e9, 1), (0.0, 0)])
def test_a_run_fails_if_a_median_is_short(bound, status, monkeypatch, tmp_path, capsys):
    group = ops.Group("switch", "", "fp32", {"ours": lambda: None}, lambda: None,
                      bounds=[("x", lambda seconds: 1 + seconds["ours"], bound)])  # fmt: skip
    monkeypatch.setattr(ops, "OPERATIONS", {"switch": lambda sizes: [group]})
    monkeypatch.setattr(ops, "RESULTS", tmp_path / "ops.csv")
    monkeypatch.setattr(ops, "LEAST", 0.0)
    monkeypatch.setattr("sys.argv", ["ops", "--only", "switch", "--rounds", "2", "--repeats", "1"])
    with pytest.raises(SystemExit) as ended:
        ops.main()
    assert ended.value.code == status
    assert ("short" in capsys.readouterr().out) == bool(status)
    rounds = [(row["round"], row["what"], row["verdict"]) for row in read_rows(tmp_path / "ops.csv")]
    verdict = "short" if status else "ok"
    assert rounds == [(i, what, "") for i in "12" for what in ("ours", "x")] + [("median", "x", verdict)]


def test_a_run_without_rounds_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ops", "--rounds", "0"])
    with pytest.raises(SystemExit):
        ops.main()
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err


def test_a_wrong_result_leaves_no_figure():
    def wrong():
        raise AssertionError("wrong")

    group = ops.Group("masked_grad", "", "fp32", {"ours": lambda: pytest.fail("timed before it was checked")}, wrong)
    with pytest.raises(AssertionError, match="wrong"):
        ops.measure(group, repeats=1)


MEDIUM = ops.Sizes(squares=(1024,), tokens=(512,), densities=(0.01,), layers=2, embedding=(64, 32), scores=1 << 22)


@pytest.mark.parametrize("name", ops.OPERATIONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_speed(benchmark, name, dtype):
    for group in ops.OPERATIONS[name](MEDIUM):
        if group.dtype == dtype:
            with torch.no_grad():
                benchmark(group.calls["ours"])
            return
    pytest.skip(f"{name} is measured in fp32 only")
