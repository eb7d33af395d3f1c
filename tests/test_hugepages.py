"""Huge pages: what lies in them is what lay there before, at the same place."""

import platform

import pytest
import torch

from sparseft import Pattern, SparseAdamW, hugepages, sparsify
from sparseft.hugepages import collapse


def test_contents_and_addresses_stay():
    tensors = [torch.randn(3, 1 << 20), torch.arange(1 << 20), torch.randn(7), torch.empty(0)]
    before = [(tensor.clone(), tensor.data_ptr()) for tensor in tensors]
    collapse(tensors)
    for tensor, (copy, address) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy) and tensor.data_ptr() == address
    tensors[0].zero_()  # can be written
    assert not tensors[0].any()


def pages_on_demand() -> bool:
    """Whether this system should be able to collapse memory: Linux 6.1 and later, not switched off."""
    release = platform.release().split("-")[0].split(".")[:2]
    return hugepages._page_size() > 0 and [int(part) for part in release] >= [6, 1]


@pytest.mark.skipif(not pages_on_demand(), reason="needs Linux 6.1 with huge pages that are not switched off")
def test_a_large_tensor_moves():
    assert collapse([torch.randn(1 << 24)]) > 0  # 64 MiB; the system may have no room for some


def test_the_pages_that_hold_a_large_cpu_tensor_are_asked_for_once(monkeypatch):
    size, asked = 1 << 21, []
    monkeypatch.setattr(hugepages, "_page_size", lambda: size)
    monkeypatch.setattr(hugepages, "_advise", lambda start, n: asked.append((start, n)) or True)
    large = torch.randn(3 << 19)  # 6 MiB
    tensors = [torch.randn(100), torch.empty(1 << 22, device="meta"), large, large[1 << 18 :]]
    first, last = large.data_ptr() // size, (large.data_ptr() + large.nbytes - 1) // size
    assert collapse(tensors) == last - first + 1
    assert asked == [(page * size, size) for page in range(first, last + 1)]


def test_a_system_that_refuses_is_not_asked_for_ever(monkeypatch):
    asked = []
    monkeypatch.setattr(hugepages, "_page_size", lambda: 1 << 21)
    monkeypatch.setattr(hugepages, "_advise", lambda start, n: bool(asked.append(start)))
    assert collapse([torch.empty(1 << 26)]) == 0 and len(asked) == hugepages.PATIENCE


def test_the_optimizers_weights_and_state_move(monkeypatch):
    moved: list[torch.Tensor] = []
    monkeypatch.setattr("sparseft.arena.collapse", moved.extend)
    model = torch.nn.Linear(8, 8)
    sparsify(model, {"weight": Pattern.from_mask(torch.rand(8, 8) < 0.5)})
    optimizer = SparseAdamW(model)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    addresses = {tensor.data_ptr() for tensor in moved}
    state = optimizer.state[model.values]
    assert {t.data_ptr() for t in (model.weight, model.values, state["exp_avg"], state["exp_avg_sq"])} <= addresses


@pytest.mark.parametrize("size", [0, 1 << 29])
def test_pages_of_no_or_enormous_size_are_not_used(size, monkeypatch):
    monkeypatch.setattr(hugepages, "_page_size", lambda: size)
    monkeypatch.setattr(hugepages, "_advise", lambda start, n: pytest.fail("asked for"))
    assert collapse([torch.randn(1 << 22)]) == 0


@pytest.mark.parametrize("text", ["always madvise [never]", None])
def test_no_huge_pages_where_they_are_switched_off_or_unknown(text, tmp_path, monkeypatch):
    monkeypatch.setattr(hugepages, "SETTINGS", tmp_path)
    if text is not None:
        (tmp_path / "enabled").write_text(text)
        (tmp_path / "hpage_pmd_size").write_text("2097152")
    assert collapse([torch.randn(1 << 22)]) == 0
