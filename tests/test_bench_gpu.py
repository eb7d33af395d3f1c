"""The GPU benchmark, as far as it can run without one: small sizes on the CPU."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import torch

from bench import gpu

SMALL = gpu.Sizes(size=128, layers=2, tokens=32, scores=5000, repeats=1, tile=32)


def test_every_operation_is_timed_and_what_cannot_run_is_said():
    report = gpu.measure("cpu", SMALL, ("reference", "cuda"))
    assert json.loads(json.dumps(report)) == report
    operations = {line["operation"] for line in report["lines"] if line["implementation"] == "reference"}
    assert operations == {"masked_grad", "masked_grad x 3", "masked_grad, 1 %", "scatter_delta", "sparse_adamw",
                          "select_topk"}  # fmt: skip
    assert all(line["milliseconds"] > 0 and line["share"] > 0 for line in report["lines"])
    assert {what for what in report["could_not_run"] if "cuda" in what} == {f"{o}, cuda" for o in operations}
    assert "could not run: masked_grad, cuda: " in gpu.show(report)


def test_the_patterns_are_what_the_sizes_say():
    pattern = gpu.clustered(gpu.Sizes(size=2048), 0, "cpu").validate()
    across = 2048 // 64
    assert abs(len(pattern.tiles) / across**2 - 0.1) < 0.03
    assert abs(pattern.density - 0.01) < 0.003


def test_skipped_tests_are_counted_by_reason(monkeypatch):
    suite = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped message="no nvcc"/></testcase>
    <testcase name="c"><skipped message="no nvcc"/></testcase></testsuite></testsuites>"""

    def pytest_in_a_process(command, timeout, **_):
        (target,) = (word.partition("=")[2] for word in command if word.startswith("--junitxml="))
        Path(target).write_text(suite)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(gpu.subprocess, "run", pytest_in_a_process)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 << 30))
    assert gpu.test() == (0, {"no nvcc": 2})


def test_tests_that_do_not_end_are_stopped(monkeypatch):
    def too_long(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu.subprocess, "run", too_long)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=8 << 30))
    assert gpu.test() == (-1, {})
