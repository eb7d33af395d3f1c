"""Huge pages: what lies in them is what lay there before, at the same place."""

import pytest
import torch

from sparseft import hugepages
from sparseft.hugepages import collapse


def test_contents_and_addresses_stay():
    tensors = [torch.randn(3, 1 << 20), torch.arange(1 << 20), torch.randn(7), torch.empty(0)]
    before = [(tensor.clone(), tensor.data_ptr()) for tensor in tensors]
    collapse(tensors)
    for tensor, (copy, address) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy) and tensor.data_ptr() == address
    tensors[0].zero_()  # can be written
    assert not tensors[0].any()


@pytest.mark.skipif(not hugepages._page_size(), reason="this system has no huge pages, or they are switched off")
def test_a_large_tensor_moves():
    assert collapse([torch.randn(1 << 24)]) > 0  # 64 MiB; the system may have no room for some


def test_small_tensors_and_those_elsewhere_are_left_alone(monkeypatch):
    monkeypatch.setattr(hugepages, "_page_size", lambda: 1 << 21)
    assert collapse([torch.randn(100), torch.empty(1 << 22, device="meta")]) == 0


@pytest.mark.parametrize("text", ["always madvise [never]", None])
def test_no_huge_pages_where_they_are_switched_off_or_unknown(text, tmp_path, monkeypatch):
    monkeypatch.setattr(hugepages, "SETTINGS", tmp_path)
    if text is not None:
        (tmp_path / "enabled").write_text(text)
        (tmp_path / "hpage_pmd_size").write_text("2097152")
    assert collapse([torch.randn(1 << 22)]) == 0
