"""A wrong worklist: CUDA memory cannot be checked before a launch without waiting, so the kernels must stay inside.

`Pattern.validate` refuses such worklists where they come from files. Here every number of one is replaced in turn. The
emulator stops a kernel at the first access outside the tensors of its call; what the results are does not matter.
"""

import pytest
import torch

from ..kernels.table import Case, entries

CASE = Case("bad", ((70, 90), (40, 33)), (32, 48), 0.1)
NUMBERS = (-1, -(2**40), 2**31, 2**62, -(2**63), 2**63 - 1, 1, 1000)


def call(operation: str, dtype: torch.dtype, rows, cols, tiles, local) -> None:
    k, layout = len(local), (rows, cols, tiles, local, list(CASE.tile))
    if operation == "masked_grad_":
        grad_out, input = torch.randn(5, 70).to(dtype), torch.randn(5, 90).to(dtype)
        arguments = (torch.zeros(k), grad_out, input, *layout, True)
    else:
        weights = [torch.randn(shape).to(dtype) for shape in CASE.shapes]
        if operation == "scatter_delta_":
            arguments = (weights, torch.randn(k).to(dtype), *layout, "swap", 1.0)
        else:
            hyper = (torch.tensor(0.1), 0.9, 0.999, 1e-8, 0.1, False, None, None)
            states = [torch.rand(k) for _ in range(4)]
            arguments = (weights, *states, None, torch.tensor([1, 2]), None, *layout, *hyper)
    getattr(torch.ops.sparseft_cuda, operation)(*arguments)


def assert_stays_inside(operation: str, dtype: torch.dtype, *layout) -> None:
    try:
        call(operation, dtype, *layout)
    except RuntimeError as error:  # two tiles with the same entries race for them: wrong, but inside
        assert "race" in str(error), error


@pytest.fixture(params=["tiles", "panels"])
def way(request, monkeypatch, emulator):
    monkeypatch.setenv("SPARSEFT_MASKED_GRAD", request.param)
    emulator.configure(seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", ["masked_grad_", "scatter_delta_", "sparse_adamw_"])
class TestWrong:
    @pytest.mark.parametrize("field", range(5), ids=["LAYER", "ROW0", "COL0", "ENTRY0", "ENTRY1"])
    def test_tile(self, way, operation, dtype, field):
        e = entries(CASE)
        for i, number in enumerate(NUMBERS):
            tiles = e.tiles.clone()
            tiles[i % len(tiles), field] = number
            assert_stays_inside(operation, dtype, e.rows, e.cols, tiles, e.local)

    def test_order_of_the_tiles(self, way, operation, dtype):
        e = entries(CASE)
        for tiles in (e.tiles.flip(0), torch.cat([e.tiles, e.tiles]), e.tiles[torch.randperm(len(e.tiles))]):
            assert_stays_inside(operation, dtype, e.rows, e.cols, tiles.contiguous(), e.local)

    @pytest.mark.parametrize("name", ["rows", "cols"])
    def test_row_or_column(self, way, operation, dtype, name):
        e = entries(CASE)
        for i, number in enumerate((-1, -(2**31), 2**31 - 1, 91)):
            orders = {"rows": e.rows.clone(), "cols": e.cols.clone()}
            orders[name][i] = number
            assert_stays_inside(operation, dtype, orders["rows"], orders["cols"], e.tiles, e.local)

    def test_position(self, way, operation, dtype):
        e = entries(CASE)
        local = torch.randint(-(2**15), 2**15, (len(e),)).short()
        assert_stays_inside(operation, dtype, e.rows, e.cols, e.tiles, local)

    def test_everything(self, way, operation, dtype):
        e = entries(CASE)
        for _ in range(3):
            tiles = torch.randint(-3, len(e) + 200, e.tiles.shape)
            rows, cols = (torch.randint(-5, 120, t.shape, dtype=torch.int32) for t in (e.rows, e.cols))
            local = torch.randint(-(2**15), 2**15, (len(e),)).short()
            assert_stays_inside(operation, dtype, rows, cols, tiles, local)
