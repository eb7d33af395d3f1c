"""What every test gets: the same random numbers on each run, a hypothesis profile, and the real data sets."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "sparseft",
    derandomize=True,  # the same examples on every run
    deadline=None,  # the machine's speed is not what is tested
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("sparseft")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    numpy.random.seed(0)


@pytest.fixture
def data_folder() -> Callable[[str], Path]:
    """`data_folder("banking77")`: that data set under $SPARSEFT_DATA (or ../shared/data); skips where it is not."""

    def find(name: str) -> Path:
        beside = Path(__file__).resolve().parents[2] / "shared" / "data"
        folder = Path(os.environ.get("SPARSEFT_DATA") or beside) / name
        if not folder.is_dir():
            pytest.skip(f"there is no data set {folder}; SPARSEFT_DATA names the folder that holds them")
        return folder

    return find
