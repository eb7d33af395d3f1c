"""bench.finetune: who takes part in a round, and what a bound's figure is."""

import pytest

from bench.finetune import BOUNDED_MODEL, Bound, ratio, report, rounds_of

BOUND = Bound("peak_mb", "tiles10", "dense", {"fp32": 0.45, "bf16": 0.55})


def rows(peaks: list[dict[str, float]], dtype: str = "fp32", model: str = BOUNDED_MODEL) -> list[dict]:
    """One row for each provider of each round, as the CSV has them; the step times hold their bounds."""
    return [
        {"run": "1", "round": number, "model": model, "dtype": dtype, "provider": provider, "peak_mb": peak,
         "step_ms": 0.5 if provider == "tiles10" else 1.0}
        for number, of_round in enumerate(peaks) for provider, peak in of_round.items()
    ]  # fmt: skip


def test_rounds_have_what_a_bound_compares_and_one_the_rest_with_the_reference():
    everyone = ["frozen", "lora16", "tiles10", "columns", "dense"]
    rest = ["dense", "lora16", "columns"]
    assert rounds_of(everyone, 2, BOUNDED_MODEL) == [
        ["frozen", "tiles10", "dense"],
        ["tiles10", "dense", "frozen"],
        rest,
    ]
    assert rounds_of(everyone, 2, "llama-1b") == [["frozen", "tiles10", "dense"], rest]
    assert rounds_of(["columns"], 2, BOUNDED_MODEL) == [["columns"]]
    assert rounds_of(["frozen"], 2, BOUNDED_MODEL) == [["frozen"], ["frozen"]]


def test_the_figure_is_the_median_of_the_ratios_inside_rounds():
    rounds = [{"tiles10": 1.0, "dense": 2.0}, {"tiles10": 3.0, "dense": 4.0}, {"tiles10": 30.0, "dense": 100.0}]
    assert ratio(rows(rounds), BOUND, "fp32") == pytest.approx(0.5)
    assert ratio([*rows(rounds), *rows([{"tiles10": 9.0}], model="llama-1b")], BOUND, "fp32") == pytest.approx(0.5)
    assert ratio(rows([{"tiles10": 1.0}, {"dense": 2.0}]), BOUND, "fp32") is None


def test_a_short_bound_is_said_and_fails(capsys):
    assert report(rows([{"tiles10": 0.4, "dense": 1.0}]), "step_ms")
    out = capsys.readouterr().out
    assert "0.400 (<= 0.45) ok" in out and "peak tiles10 / lora8, fp32           not measured" in out
    assert not report(rows([{"tiles10": 0.5, "dense": 1.0}]), "step_ms")
    assert "peak tiles10 / dense, fp32" in (out := capsys.readouterr().out) and "(<= 0.45) short" in out


def test_a_process_that_dies_says_why(tmp_path):
    from argparse import Namespace

    from bench.finetune import Process

    process = Process("tiles10", "nothing", "fp32", Namespace(rows=1, tokens=1, steps=1, attention="sdpa"), tmp_path)
    with pytest.raises(SystemExit, match=r"tiles10 .nothing, fp32. failed with exit status 2:"):
        process.take_turn()
