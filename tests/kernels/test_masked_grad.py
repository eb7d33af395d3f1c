"""masked_grad_ against a dense weight gradient in fp64, gathered at the entries' own coordinates.

Bound: a product of fp32 numbers is rounded once (of bf16 or fp16 numbers: it is exact), a sum of T of them T - 1
times, in whatever order; accumulating adds one more. So |error| <= gamma(T + 1) * (|start| + sum |g| |x|), in the
unit roundoff u of the accumulator; the oracle adds the same in fp64.

Two things are coarser (see `roundings`). Tensor cores add n products to a sum by cutting each of them to the largest
one's last bit (2 u), and cut the result (2 u); n is at least 4 (Fasi, Higham, Mikaitis & Pranesh, "Numerical behavior
of NVIDIA tensor cores", 2021): T products in ceil(T / 4) groups, each with the sum so far, cost (2 T + 4 ceil(T / 4)) u
<= (3 T + 4) u. And Triton multiplies fp32 numbers as three TF32 products: each number is split in two parts of 11 bits;
what is left of it (2^-22) and the product of the two small parts (2^-22) are lost: 3 * 2^-22 = 12 u.
"""

import pytest
import torch
from torch import Tensor

from sparseft import reference

from .table import (
    FLOATS,
    ONE_LAYER,
    SEVERAL_LAYERS,
    UNIT,
    Case,
    Entries,
    Memory,
    assert_same_bits,
    assert_within,
    by_dtype,
    entries,
    gamma,
    generator,
    huge,
    normal,
    threads_set,
    wide,
)

OPERATION = "masked_grad_"
SWEEP = Case("sweep", ((37, 70),), (16, 16), 0.2)
CROWDED = Case("crowded", ((24, 40),), (16, 16), "full")
COMPACT = Case("compact", ((61, 150),), (16, 16), 0.03, absent=0.4)
TOKENS = (0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129, 257, 1023)


def operands(e: Entries, tokens: int, dtype: torch.dtype, layer: int = 0) -> tuple[Tensor, Tensor]:
    """grad_out [T, N] and input [T, K]; columns that no entry of `layer` needs are NaN: they must not matter."""
    rng, mine = generator(e.shapes, tokens), e.layer == layer
    out = []
    for size, needed in zip(e.shapes[layer], (e.row[mine], e.col[mine]), strict=True):
        scale = torch.from_numpy(2.0 ** rng.integers(-4, 5, size))
        matrix = normal(rng, (tokens, size), torch.float64) * scale
        idle = torch.ones(size, dtype=torch.bool)
        idle[needed] = False
        matrix[:, idle] = float("nan")
        out.append(matrix.to(dtype))
    return out[0], out[1]


def dense(e: Entries, grad_out: Tensor, input: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
    """fp64 [m] each: the gradients of the layer's entries and their sums of |products|."""
    g, x = grad_out.double(), input.double()
    at = e.row[e.layer == layer], e.col[e.layer == layer]
    return (g.T @ x)[at], (g.abs().T @ x.abs())[at]


def roundings(implementation, tokens: int, dtype: torch.dtype) -> int:
    """The number of roundings to nearest whose error bounds the implementation's."""
    tensor_cores = implementation.device == "cuda" and dtype != torch.float64
    split = implementation.name == "triton" and dtype == torch.float32
    return (3 * tokens + 5 if tensor_cores else tokens + 1) + 12 * split


def check(implementation, memory: Memory, e: Entries, grad_out: Tensor, input: Tensor, layout=None, put=None) -> None:
    """Overwriting and accumulating: both against the oracle and the reference; absent entries stay as they were."""
    layout = e.layout if layout is None else layout
    place = memory.put if put is None else put
    accumulator = wide(grad_out.dtype)
    exact, magnitude = dense(e, grad_out, input)
    if layout[0] is None:
        grad_out = grad_out[:, e.rows.long()]
    if layout[1] is None:
        input = input[:, e.cols.long()]
    on_device = [t.to(implementation.device) if isinstance(t, Tensor) else t for t in layout]
    for accumulate in (False, True):
        start = torch.full((len(e),), float("nan"), dtype=accumulator)
        if accumulate:
            start = normal(generator("start", len(e)), (len(e),), accumulator)
        out = memory.put(start)
        implementation(out, place(grad_out), place(input), *on_device, accumulate)
        before = start.double() if accumulate else torch.zeros(len(e), dtype=torch.float64)
        t = grad_out.shape[0] + 1
        own = gamma(roundings(implementation, t - 1, grad_out.dtype), UNIT[accumulator])
        bound = (own + gamma(t, UNIT[torch.float64])) * (before.abs() + magnitude)
        got = out.cpu()
        assert_within(got[e.present], (before + exact)[e.present], bound[e.present], "gradient")
        assert_same_bits(got[~e.present], start[~e.present], "gradient of an absent tile")
        if implementation.name != "reference":
            plain = start.clone()
            reference.masked_grad_(plain, grad_out, input, *layout, accumulate)
            assert_within(got[e.present], plain[e.present], 2 * bound[e.present], "gradient against the reference")
    memory.check()


@pytest.mark.parametrize(("case", "dtype"), by_dtype(ONE_LAYER))
def test_entries(implementation, memory, case, dtype):
    e = entries(case)
    check(implementation, memory, e, *operands(e, 17, dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens(implementation, memory, tokens, dtype):
    e = entries(SWEEP)
    check(implementation, memory, e, *operands(e, tokens, dtype))


@pytest.mark.parametrize("compact", ["rows", "cols", "both"])
@pytest.mark.parametrize("case", [SWEEP, COMPACT], ids=lambda c: c.id)
def test_compact_operands(implementation, memory, case, compact):
    """rows=None (cols=None): the operand holds the active rows (columns) only, in their order."""
    e = entries(case)
    rows = e.rows if compact == "cols" else None
    cols = e.cols if compact == "rows" else None
    check(implementation, memory, e, *operands(e, 17, torch.float32), layout=(rows, cols, *e.layout[2:]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_rows(implementation, memory, dtype):
    """Operands may be column slices of wider matrices."""
    e = entries(SWEEP)
    check(implementation, memory, e, *operands(e, 33, dtype), put=lambda t: memory.put(t, row_stride=t.shape[1] + 5))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", [1, 33, 64, 1056])
def test_columns_that_lie_in_memory_as_rows(implementation, memory, tokens, dtype):
    """Operands may be stored [N, T] and [K, T], as a sparse layer keeps its input."""
    e = entries(SWEEP)
    check(implementation, memory, e, *operands(e, tokens, dtype), put=lambda t: memory.put(t.T.contiguous()).T)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", [64, 256, 1100])
@pytest.mark.parametrize("lie", ["rows", "columns"])
def test_many_entries_of_a_row(implementation, memory, tokens, dtype, lie):
    """The CPU's kernel takes twice as many tokens at once then."""
    e = entries(CROWDED)
    put = None if lie == "rows" else lambda t: memory.put(t.T.contiguous()).T
    check(implementation, memory, e, *operands(e, tokens, dtype), put=put)


@pytest.mark.parametrize("tokens", [17, 1100])
def test_one_layer_of_several(implementation, memory, tokens):
    """The worklist may pick one layer out of a packed layout; `out` is then the buffer of all layers."""
    e = entries(SEVERAL_LAYERS[0])
    for layer in range(len(e.shapes)):
        tiles = e.tiles[e.tiles[:, 0] == layer]
        grad_out, input = operands(e, tokens, torch.float32, layer)
        exact, magnitude = dense(e, grad_out, input, layer)
        start = torch.full((len(e),), float("nan"))
        out = memory.put(start)
        rows, cols, _, local, tile = e.on(implementation.device)
        layout = rows, cols, tiles.to(implementation.device), local, tile
        implementation(out, memory.put(grad_out), memory.put(input), *layout, False)
        mine = e.layer == layer
        bound = gamma(roundings(implementation, tokens, torch.float32), UNIT[torch.float32]) * magnitude
        assert_within(out.cpu()[mine], exact, bound)
        assert_same_bits(out.cpu()[~mine], start[~mine], "gradient of another layer")
    memory.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_reaches_only_its_own_entries(implementation, memory, dtype, value):
    """One bad number in a row of grad_out or a column of input: exactly the entries that use it are bad."""
    e = entries(SWEEP)
    grad_out, input = operands(e, 17, dtype)
    grad_out[3, e.row[0]], input[5, e.col[-1]] = value, -value
    check(implementation, memory, e, grad_out, input)


def test_same_bits_on_every_run(implementation):
    """Two runs, and any number of threads, give the same bits."""
    large, wide = Case("large", ((190, 210),), (64, 64), 0.2), Case("wide", ((70, 3000),), (64, 64), 0.01)
    cases = [(large, torch.float32, 257), (large, torch.bfloat16, 257)]
    if implementation.name == "cpu":  # more tokens than one share of them, more columns than are multiplied at a time
        cases += [(large, torch.bfloat16, 2100), (wide, torch.float32, 1100), (wide, torch.bfloat16, 257)]
    for case, dtype, tokens in cases:
        e = entries(case)
        grad_out, input = (t.to(implementation.device) for t in operands(e, tokens, dtype))
        runs = []
        for threads in (1, 2, 2, 3, 5):
            with threads_set(threads):
                out = torch.ones(len(e), device=implementation.device)
                implementation(out, grad_out, input, *e.on(implementation.device), True)
            runs.append(out)
        for out in runs[1:]:
            assert_same_bits(out, runs[0])


def test_offsets_beyond_int32(implementation, tmp_path):
    """Element offsets past 2^31: the operands are two rows, 2^31 + 7 elements apart, of a sparse file."""
    e = entries(SWEEP)
    n, stride = 70, 2**31 + 7
    store = huge(stride + n, torch.bfloat16, implementation.device, tmp_path)
    matrix = store.as_strided((2, n), (stride, 1))
    matrix.copy_(normal(generator("huge"), (2, n), torch.bfloat16))
    grad_out, input = matrix[:, :37], matrix
    out = torch.zeros(len(e), device=implementation.device)
    implementation(out, grad_out, input, *e.on(implementation.device), False)
    exact, magnitude = dense(e, grad_out.cpu(), input.cpu())
    assert_within(out, exact, gamma(roundings(implementation, 2, torch.bfloat16), UNIT[torch.float32]) * magnitude)
