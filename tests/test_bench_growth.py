"""bench/growth.py: the fit, and one small point."""

import pytest

from bench.growth import Size, exponent, measure_point


def test_exponent_of_a_power_law():
    sizes = [1.0, 2.0, 5.0, 40.0]
    assert exponent(sizes, [3 * size**0.7 for size in sizes]) == pytest.approx(0.7, abs=1e-12)


@pytest.mark.parametrize("provider", ["tiles10", "frozen", "dense"])
def test_a_point_is_measured(provider):
    result = measure_point(provider, Size(density=0.02, tokens=16, layers=2, width=64), steps=1)
    assert result["step_ms"] > 0 and result["trained"] > 0
