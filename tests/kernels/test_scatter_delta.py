"""scatter_delta_ against plain indexing of dense clones at the entries' own coordinates.

Copy and swap are exact. Add is exact for alpha = 1 (one addition in fp32 or fp64, one rounding); otherwise it has
one rounding of the product, one of the sum and one to the weight's dtype.
"""

import pytest
import torch
from torch import Tensor

from sparseft import reference

from .table import (
    ALL,
    FLOATS,
    SEVERAL_LAYERS,
    SMALLEST,
    UNIT,
    Case,
    Entries,
    assert_equal,
    assert_same_bits,
    assert_within,
    crossed,
    entries,
    generator,
    huge,
    normal,
    rounded,
    special,
    threads_set,
    wide,
)

OPERATION = "scatter_delta_"
PAIRS = [(w, w) for w in FLOATS] + [(w, torch.float32) for w in FLOATS[1:]]  # dtypes of weights and values
NAMES = [f"{w}-{v}".replace("torch.", "") for w, v in PAIRS]
BEYOND = 2**31 // 31000 + 1  # the last rows of a weight with 31,000 columns lie past 2^31 elements


def start(e: Entries, weight: torch.dtype, value: torch.dtype) -> tuple[list[Tensor], Tensor]:
    rng = generator(e.shapes, e.tile)
    return [normal(rng, shape, weight) for shape in e.shapes], normal(rng, (len(e),), value)


def expected(e: Entries, weights: list[Tensor], values: Tensor, mode: str, alpha: float) -> tuple[list[Tensor], Tensor]:
    """What the weights and the values are afterwards, by dense indexing."""
    after, values_after = [w.clone() for w in weights], values.clone()
    for layer, weight in enumerate(after):
        mine = (e.layer == layer) & e.present
        at, new = (e.row[mine], e.col[mine]), values[mine]
        if mode == "swap":
            values_after[mine] = weight[at]
            weight[at] = new
        elif mode == "copy":
            weight[at] = rounded(new, weight.dtype)
        else:
            total = weight[at].to(wide(weight.dtype)) + (new * alpha if alpha != 1 else new).to(wide(weight.dtype))
            weight[at] = rounded(total, weight.dtype)
    return after, values_after


def run(implementation, memory, e: Entries, weights: list[Tensor], values: Tensor, mode: str, alpha: float = 1.0):
    """The weights and values after the operation, in guarded memory."""
    placed, vector = [memory.put(w) for w in weights], memory.put(values)
    implementation(placed, vector, *e.on(implementation.device), mode, alpha)
    memory.check()
    return placed, vector


def compare(implementation, e: Entries, got, weights: list[Tensor], values: Tensor, mode: str) -> None:
    """Exactly the oracle's result, and the reference's."""
    same = assert_same_bits if mode == "swap" else assert_equal
    outcomes = [expected(e, weights, values, mode, 1.0)]
    if implementation.name != "reference":
        plain = [w.clone() for w in weights], values.clone()
        reference.scatter_delta_(*plain, *e.layout, mode, 1.0)
        outcomes.append(plain)
    for after, values_after in outcomes:
        for i, (g, w) in enumerate(zip(got[0], after, strict=True)):
            same(g, w, f"weight {i}")
        same(got[1], values_after, "values")


def modes(weight: torch.dtype, value: torch.dtype) -> tuple[str, ...]:
    return ("add", "copy", "swap") if weight == value else ("add", "copy")


@pytest.mark.parametrize(("case", "dtypes"), crossed(ALL, PAIRS, NAMES))
def test_entries(implementation, memory, case, dtypes):
    e = entries(case)
    weights, values = start(e, *dtypes)
    for mode in modes(*dtypes):
        got = run(implementation, memory, e, weights, values, mode)
        compare(implementation, e, got, weights, values, mode)


@pytest.mark.parametrize(("weight", "value"), PAIRS, ids=NAMES)
def test_special_numbers(implementation, memory, weight, value):
    """Signed zeros, infinities, subnormals, overflow and halfway cases, every one written over every other."""
    numbers = special(weight)
    new, old = torch.meshgrid(numbers, numbers, indexing="ij")
    n = len(numbers)
    e = entries(Case("special", ((n, n),), (16, 16), "full"))
    values, weights = rounded(new[e.row, e.col], value), [rounded(old, weight)]
    for mode in modes(weight, value):
        got = run(implementation, memory, e, weights, values, mode)
        compare(implementation, e, got, weights, values, mode)


@pytest.mark.parametrize(("weight", "value"), PAIRS, ids=NAMES)
@pytest.mark.parametrize("alpha", [0.0, -1.0, 0.3, 1e-3])
def test_add_with_alpha(implementation, memory, weight, value, alpha):
    e = entries(SEVERAL_LAYERS[0])
    weights, values = start(e, weight, value)
    placed, _ = run(implementation, memory, e, weights, values, "add", alpha)
    unit = UNIT[wide(weight)]
    for layer, (got, before) in enumerate(zip(placed, weights, strict=True)):
        mine = e.layer == layer
        at, change = (e.row[mine], e.col[mine]), alpha * values[mine].double()
        exact = before[at].double() + change
        # alpha itself is rounded to fp32, too: two roundings of the change, one of the sum, one to the weight's dtype
        bound = 2.1 * unit * change.abs() + 1.1 * (unit + UNIT[weight]) * exact.abs() + SMALLEST[weight]
        assert_within(got.cpu()[at], exact, bound, f"weight {layer}")
        untouched = torch.ones(before.shape, dtype=torch.bool)
        untouched[at] = False
        assert_same_bits(got.cpu()[untouched], before[untouched], f"weight {layer} outside the entries")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_swap_twice_restores_every_bit(implementation, memory, dtype):
    """Any bit pattern survives, NaNs with their payloads included."""
    e = entries(SEVERAL_LAYERS[0])
    rng = generator("swap")
    size = torch.finfo(dtype).bits // 8
    noise = [torch.from_numpy(rng.integers(0, 256, (n, k * size)).astype("uint8")).view(dtype) for n, k in e.shapes]
    values = torch.from_numpy(rng.integers(0, 256, len(e) * size).astype("uint8")).view(dtype)
    placed, vector = run(implementation, memory, e, noise, values, "swap")
    after, values_after = expected(e, noise, values, "swap", 1.0)
    for got, want in zip([*placed, vector], [*after, values_after], strict=True):
        assert_same_bits(got, want)
    implementation(placed, vector, *e.on(implementation.device), "swap", 1.0)
    for got, before in zip([*placed, vector], [*noise, values], strict=True):
        assert_same_bits(got, before)
    memory.check()


def test_same_bits_on_every_run(implementation):
    e = entries(Case("large", ((300, 290), (200, 310)), (64, 64), 0.4))
    weights, values = start(e, torch.bfloat16, torch.float32)
    runs = []
    for threads in (1, 2, 2, 5):
        with threads_set(threads):
            placed, vector = [w.to(implementation.device, copy=True) for w in weights], values.to(implementation.device)
            implementation(placed, vector, *e.on(implementation.device), "add", 0.37)
        runs.append(placed)
    for later in runs[1:]:
        for got, first in zip(later, runs[0], strict=True):
            assert_same_bits(got, first)


@pytest.mark.parametrize("mode", ["add", "copy", "swap"])
def test_offsets_beyond_int32(implementation, tmp_path, mode):
    """A weight of more than 2^31 elements (a sparse file): entries in its first and in its last rows."""
    shape = (BEYOND + 40, 31000)
    weight = huge(shape[0] * shape[1], torch.bfloat16, implementation.device, tmp_path).view(shape)
    rows = torch.tensor([shape[0] - 1, 0, shape[0] - 40], dtype=torch.int32)
    cols = torch.tensor([30999, 0], dtype=torch.int32)
    tiles, local = torch.tensor([[0, 0, 0, 0, 6]]), torch.arange(6, dtype=torch.int16)
    values = torch.arange(1, 7, dtype=torch.bfloat16)
    on_device = [t.to(implementation.device) for t in (values, rows, cols, tiles, local)]
    implementation([weight], *on_device, [3, 2], mode, 1.0)
    at = rows.long().repeat_interleave(2).tolist(), cols.long().repeat(3).tolist()
    assert [weight[r, c].item() for r, c in zip(*at, strict=True)] == [1, 2, 3, 4, 5, 6]
    assert on_device[0].tolist() == ([0] * 6 if mode == "swap" else [1, 2, 3, 4, 5, 6])
    wrapped = (shape[0] - 1) * shape[1] + 30999 - 2**32  # where a 32-bit offset would have landed, if unsigned
    assert wrapped < 0 or weight.view(-1)[wrapped].item() == 0
