"""bench.finetune: who takes part in a round, and what a bound's figure is."""

import pytest

from bench.finetune import BOUNDED_MODEL, Bound, ratio, report, sittings

BOUND = Bound("peak_mb", "tiles10", "dense", {"fp32": 0.45, "bf16": 0.55})


def rows(peaks: list[dict[str, float]], dtype: str = "fp32", model: str = BOUNDED_MODEL) -> list[dict]:
    """One row for each provider of each round, as the CSV has them; the step times hold their bounds."""
    return [
        {"run": "1", "round": number, "model": model, "dtype": dtype, "provider": provider, "peak_mb": peak,
         "step_ms": 0.5 if provider == "tiles10" else 1.0}
        for number, of_round in enumerate(peaks) for provider, peak in of_round.items()
    ]  # fmt: skip


def test_later_rounds_have_only_what_a_bound_compares():
    everyone = ["frozen", "lora16", "tiles10", "columns", "dense"]
    compared, rest = ["frozen", "tiles10", "dense"], ["lora16", "columns"]
    assert sittings(0, BOUNDED_MODEL, everyone) == sittings(0, "llama-1b", everyone) == [compared, rest]
    assert sittings(1, BOUNDED_MODEL, everyone) == [compared]
    assert sittings(1, "llama-1b", everyone) == [] == sittings(1, BOUNDED_MODEL, ["columns"])


def test_the_figure_is_the_median_of_the_ratios_inside_rounds():
    rounds = [{"tiles10": 1.0, "dense": 2.0}, {"tiles10": 3.0, "dense": 4.0}, {"tiles10": 30.0, "dense": 100.0}]
    assert ratio(rows(rounds), BOUND, "fp32") == pytest.approx(0.5)
    assert ratio([*rows(rounds), *rows([{"tiles10": 9.0}], model="llama-1b")], BOUND, "fp32") == pytest.approx(0.5)
    assert ratio(rows([{"tiles10": 1.0}, {"dense": 2.0}]), BOUND, "fp32") is None


def test_a_short_bound_is_said_and_fails(capsys):
    assert report(rows([{"tiles10": 0.4, "dense": 1.0}]), "step_ms")
    assert "ok" in capsys.readouterr().out
    assert not report(rows([{"tiles10": 0.5, "dense": 1.0}]), "step_ms")
    assert "peak tiles10 / dense, fp32" in (out := capsys.readouterr().out) and "(<= 0.45) short" in out
