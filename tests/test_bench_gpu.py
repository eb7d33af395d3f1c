"""The GPU benchmark, as far as it can run without one: small sizes on the CPU."""

import json

from bench import gpu

SMALL = gpu.Sizes(size=128, layers=2, tokens=32, scores=5000, repeats=1, tile=32)


def test_every_operation_is_timed_and_what_cannot_run_is_said():
    report = gpu.measure("cpu", SMALL, ("reference", "cuda"))
    assert json.loads(json.dumps(report)) == report
    operations = {line["operation"] for line in report["lines"] if line["implementation"] == "reference"}
    assert operations == {"masked_grad", "scatter_delta", "sparse_adamw", "select_topk"}
    assert all(line["milliseconds"] > 0 and line["share"] > 0 for line in report["lines"])
    assert {what for what in report["could_not_run"] if "cuda" in what} == {f"{o}, cuda" for o in operations}
    assert "could not run: masked_grad, cuda: " in gpu.show(report)


def test_the_patterns_are_what_the_sizes_say():
    pattern = gpu.clustered(gpu.Sizes(size=2048), 0, "cpu").validate()
    across = 2048 // 64
    assert abs(len(pattern.tiles) / across**2 - 0.1) < 0.03
    assert abs(pattern.density - 0.01) < 0.003
