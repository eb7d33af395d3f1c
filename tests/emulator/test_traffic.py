"""How much memory the entry kernels move: 32-byte sectors, counted warp instruction by warp instruction."""

import pytest
import torch

from sparseft.pattern import Pattern

ROWS, COLUMNS = 512, 1024
ENTRIES = 41 * 128  # 1 % of the weight, and whole sectors of every stream


@pytest.fixture(scope="module")
def layout() -> list:
    flat = torch.randperm(ROWS * COLUMNS)[:ENTRIES]
    pattern = Pattern.from_indices(flat, (ROWS, COLUMNS), tile=(64, 64), row_order=torch.arange(ROWS),
                                   col_order=torch.arange(COLUMNS))  # fmt: skip
    return [*pattern.layout[:4], list(pattern.tile)]


def assert_streamed(emulator, streams: dict[str, tuple[torch.Tensor, bool]]) -> None:
    """Every stream is read once, and written once if it changes, in full sectors."""
    for name, (tensor, changes) in streams.items():
        reads, writes = emulator.traffic(tensor)
        size = tensor.numel() * tensor.element_size()
        for way, traffic in (("read", reads), ("written", writes))[: 1 + changes]:
            print(f"{name} {way}: {traffic.bytes} bytes in {traffic.sectors} sectors, {traffic.efficiency:.0%}")
            assert traffic.efficiency == 1 and traffic.bytes == size, f"{name} {way}: {traffic}"


def assert_model(traffic, weight: torch.Tensor) -> None:
    """Distinct sectors of the weight as if its entries were drawn at random: 1 - (1 - d)^n of all, n in a sector."""
    in_sector = 32 // weight.element_size()
    model = weight.numel() / in_sector * (1 - (1 - ENTRIES / weight.numel()) ** in_sector)
    print(f"weight: {traffic.distinct_sectors} sectors, model {model:.0f}")
    assert abs(traffic.distinct_sectors / model - 1) < 0.05


@pytest.mark.parametrize(
    ("dtype", "seed"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 7)], ids=str
)
def test_sparse_adamw(emulator, layout, dtype, seed):
    emulator.configure(sectors=True)
    weight = torch.randn(ROWS, COLUMNS).to(dtype)
    values, grad, exp_avg, exp_avg_sq = (torch.rand(ENTRIES) for _ in range(4))
    values = values if seed is None else values.to(dtype)
    base = torch.zeros(ENTRIES, dtype=dtype)
    state, step = (values, grad, exp_avg, exp_avg_sq, base), torch.tensor([1])
    hyper = (torch.tensor(0.1), 0.9, 0.999, 1e-8, 0.1, False, None, None)
    torch.ops.sparseft_cuda.sparse_adamw_([weight], *state, step, None, *layout, *hyper, seed)
    changed = {"values": values, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    constant = {"grad": grad, "base": base, "local": layout[3]}
    assert_streamed(emulator, {name: (t, name in changed) for name, t in {**changed, **constant}.items()})
    assert_model(emulator.traffic(weight)[1], weight)
    assert emulator.traffic(weight)[0].requests == 0, "the weights are only written"


@pytest.mark.parametrize("mode", ["add", "copy", "swap"])
def test_scatter_delta(emulator, layout, mode):
    emulator.configure(sectors=True)
    weight, values = torch.randn(ROWS, COLUMNS).bfloat16(), torch.randn(ENTRIES).bfloat16()
    torch.ops.sparseft_cuda.scatter_delta_([weight], values, *layout, mode, 1.0)
    assert_streamed(emulator, {"values": (values, mode == "swap"), "local": (layout[3], False)})
    reads, writes = emulator.traffic(weight)
    for traffic in (writes,) if mode == "copy" else (reads, writes):
        assert_model(traffic, weight)
