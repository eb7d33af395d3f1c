"""The strict interpreter has to be in place before anything imports triton. Without triton, every module is skipped."""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:

    class Skipped(pytest.Module):
        """A test module that is not imported."""

        def collect(self):
            pytest.skip("the package triton is not installed", allow_module_level=True)

    def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Skipped:
        return Skipped.from_parent(parent, path=module_path)

else:
    from . import hardened  # noqa: F401
