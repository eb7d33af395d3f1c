"""The strict interpreter itself: every fault that it promises to refuse is planted here and refused."""

import numpy
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from . import hardened


@triton.jit
def _copy(source, target, count, BLOCK: tl.constexpr, MASKED: tl.constexpr, HINT: tl.constexpr):
    at = tl.multiple_of(tl.program_id(0) * BLOCK, HINT) + tl.arange(0, BLOCK)
    mask = at < count
    if MASKED:
        tl.store(target + at, tl.load(source + at, mask=mask), mask=mask)
    else:
        tl.store(target + at, tl.load(source + at, mask=mask))


@triton.jit
def _scatter(target, places, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + tl.load(places + lane), lane)


@triton.jit
def _shift(data, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(data + at, tl.load(data + at + 1))


@triton.jit
def _twice(data, BLOCK: tl.constexpr, STORES: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(data + at)
    tl.store(data + at, value + 1.0)
    if BARRIER:
        tl.debug_barrier()
    if STORES:
        tl.store(data + at, value)
    else:
        tl.store(data + BLOCK + at, tl.load(data + BLOCK - 1 - at))


@triton.jit
def _tally(counts, result, FIRST: tl.constexpr):
    tl.atomic_add(counts + FIRST * tl.program_id(0), 1)
    tl.store(result + tl.program_id(0), tl.load(counts))


@triton.jit
def _total(source, total, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(total, tl.sum(tl.load(source + at, mask=at < count), 0))


@triton.jit
def _arithmetic(x, y, out, product, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a * b + a)
    tl.store(product + at, tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def _cast(source, target, alpha: tl.float64, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty) + tl.cast(alpha, target.dtype.element_ty))


def copy(count: int, source: torch.Tensor, target: torch.Tensor, masked: bool = True, hint: int = 16) -> None:
    _copy[(triton.cdiv(count, 64),)](source, target, count, BLOCK=64, MASKED=masked, HINT=hint)


def test_a_right_kernel_passes_and_its_bytes_are_counted():
    source, target = torch.arange(100.0), torch.zeros(100)
    with hardened.recorded() as launches:
        copy(100, source, target)
    assert torch.equal(source, target)
    (launch,) = launches
    assert (launch.kernel, launch.programs, launch.total()) == ("_copy", 2, 800)
    assert launch.loads["source"].requested == launch.stores["target"].distinct == 400
    assert launch.loads["source"].sectors == 13 * 32


@pytest.mark.parametrize("what", ["load", "store"])
def test_out_of_bounds(what):
    whole, short = torch.zeros(200), torch.zeros(200)[:99]
    with pytest.raises(InterpreterError, match=f"{what} out of bounds, 1 of 36 lanes"):
        copy(100, *((short, whole) if what == "load" else (whole, short)))


def test_missing_mask():
    with pytest.raises(InterpreterError, match="store out of bounds, 28 of 64 lanes"):
        copy(100, torch.zeros(100), torch.zeros(100), masked=False)


def test_masked_lanes_without_other_are_poison():
    total = torch.zeros(1)
    _total[(1,)](torch.ones(100), total, 100, BLOCK=128)
    assert total.isnan()


def test_misaligned_pointer():
    data = torch.zeros(101, dtype=torch.int8)[1:].untyped_storage()
    odd = torch.frombuffer(bytearray(bytes(data)), dtype=torch.int8, offset=1)[:8].view(torch.int8)
    with pytest.raises(InterpreterError, match="misaligned"):
        _cast[(1,)](odd, triton.reinterpret(odd, tl.float32), 0.0, N=1)


def test_false_alignment_hint():
    with pytest.raises(InterpreterError, match="multiple_of"):
        copy(100, torch.zeros(100), torch.zeros(100), hint=128)


def test_one_store_twice_to_one_address():
    with pytest.raises(InterpreterError, match="from several lanes"):
        _scatter[(1,)](torch.zeros(4, dtype=torch.int32), torch.tensor([0, 1, 1, 2]), BLOCK=4)


def test_two_programs_store_to_one_address():
    with pytest.raises(RuntimeError, match="race on 'target': two programs"):
        _scatter[(2,)](torch.zeros(8, dtype=torch.int32), torch.tensor([0, 1, 2, 3, 4, 5, 6, 0]), BLOCK=4)


def test_one_program_loads_what_another_stores():
    with pytest.raises(RuntimeError, match="race on 'data': one program loads"):
        _shift[(2,)](torch.zeros(9), BLOCK=4)


def test_one_program_loads_what_another_adds_to():
    with pytest.raises(RuntimeError, match="race on 'counts': one program loads what another one atomics"):
        _tally[(2,)](torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), FIRST=1)
    with pytest.raises(RuntimeError, match="race on 'counts'"):
        _tally[(2,)](torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), FIRST=0)
    _tally[(1,)](torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), FIRST=0)


def test_atomics_on_floats():
    with pytest.raises(InterpreterError, match="its bits depend on the programs' order"):
        _tally[(2,)](torch.zeros(2), torch.zeros(2), FIRST=1)


@pytest.mark.parametrize(("stores", "what"), [(True, "stores"), (False, "loads")])
def test_one_program_touches_again_what_it_stored(stores, what):
    with pytest.raises(InterpreterError, match=f"a program {what} what it stored, without a barrier: 'data'"):
        _twice[(1,)](torch.zeros(8), BLOCK=4, STORES=stores, BARRIER=False)
    with hardened.recorded() as launches:
        _twice[(1,)](torch.zeros(8), BLOCK=4, STORES=stores, BARRIER=True)
    assert launches[0].rewritten == {"data"}  # by the first store


def test_programs_run_in_another_order():
    order = []
    builder = hardened.interpreter.interpreter_builder
    builder.set_grid_dim(4, 3, 2)
    for index in numpy.ndindex(4, 3, 2):
        builder.set_grid_idx(*index)
        order.append(builder.grid_idx)
    assert sorted(order) == list(numpy.ndindex(4, 3, 2)) != order


def test_bf16_arithmetic():
    x, y = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out, product = torch.empty_like(x), torch.empty(16, 16)
    _arithmetic[(1,)](x, y, out, product, N=16, PRECISION="tf32")
    assert torch.equal(out, x * y + x)
    torch.testing.assert_close(product, x.float() @ y.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("precision", "unit"), [("tf32", 2.0**-11), ("tf32x3", 2.0**-22), ("ieee", 2.0**-24)])
def test_products_of_fp32_are_as_precise_as_asked(precision, unit):
    x, y = torch.randn(16, 16), torch.randn(16, 16)
    product = torch.empty(16, 16)
    _arithmetic[(1,)](x, y, torch.empty(16, 16), product, N=16, PRECISION=precision)
    exact, magnitude = x.double() @ y.double(), x.double().abs() @ y.double().abs()
    error = ((product - exact).abs() / magnitude).max()
    assert unit / 100 < error < 20 * unit


def test_three_tf32_products_lose_the_product_of_the_small_parts():
    """1 - 3 * 2^-12 is 1 - 2^-11 (a tie, away from zero) and -2^-12. Infinities stay what they are."""
    x, product = torch.zeros(16, 16).fill_diagonal_(1 - 3 * 2**-12), torch.empty(16, 16)
    _arithmetic[(1,)](x, x, torch.empty(16, 16), product, N=16, PRECISION="tf32x3")
    assert product[0, 0].item() == (1 - 3 * 2**-12) ** 2 - (2**-12) ** 2
    x[0, 0] = torch.inf
    _arithmetic[(1,)](x, x, torch.empty(16, 16), product, N=16, PRECISION="tf32x3")
    assert product[0, 0] == torch.inf and product[1, 1].isfinite()


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_round_to_nearest_even(target):
    source = torch.cat([torch.tensor([0.0, -0.0, 1 + 2**-9, 1 + 3 * 2**-9, 2.0**-130, 70000.0]), torch.randn(58)])
    out = torch.empty(64, dtype=target)
    _cast[(1,)](source, out, 0.0, N=64)
    assert torch.equal(out, source.to(target))


def test_fp64_arguments_keep_their_precision():
    out = torch.empty(1, dtype=torch.float64)
    _cast[(1,)](torch.zeros(1), out, 0.1, N=1)
    assert out.item() == 0.1
