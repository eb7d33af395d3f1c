"""Positions beyond 2^31 in select_topk's Triton kernels, without that many scores: the table says where a tensor is."""

import pytest
import torch

from sparseft import reference

from . import strict  # noqa: F401 (the kernels run in the strict interpreter)

# isort: split
from sparseft.kernels import select_topk

FAR = 2**31 + 12345


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_positions_beyond_int32(dtype, monkeypatch):
    """The same scores, told to be the ones from FAR on."""
    cut = select_topk._cut

    def moved(scores, others):
        stretches = cut(scores, others)
        stretches.table[:, 2] += FAR
        return stretches

    monkeypatch.setattr(select_topk, "_cut", moved)
    scores = [torch.randint(0, 9, (5000,)).to(dtype), torch.randn(3000).to(dtype)]
    for k in (1, 700, 8000):
        got = select_topk.select_topk(scores, [], k, "abs")
        assert torch.equal(got, reference.select_topk(scores, [], k, "abs") + FAR)
