"""The strict interpreter has to be in place before anything imports triton."""

import importlib.util

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from . import hardened  # noqa: F401
