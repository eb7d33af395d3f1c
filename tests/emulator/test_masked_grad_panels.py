"""The operation table's tests of masked_grad with tiles of few entries: its panels, whatever the rule would choose."""

import pytest
import torch

from sparseft.pattern import Pattern

from ..kernels import test_masked_grad as table
from ..kernels.table import ONE_LAYER, SEVERAL_LAYERS, Case, crossed, entries, generator, normal

OPERATION = table.OPERATION
HALVES = (torch.bfloat16, torch.float16)
MANY_TILES = Case("many_tiles", ((330, 1700),), (32, 16), 0.004)  # four in a block, of one or two bands; empty panels
WIDE_TILES = Case("wide_tiles", ((20, 700),), (16, 300), 0.05)  # several chunks in a block


@pytest.fixture(autouse=True)
def panels(monkeypatch):
    monkeypatch.setenv("SPARSEFT_MASKED_GRAD", "panels")


@pytest.mark.parametrize(("case", "dtype"), crossed(ONE_LAYER, HALVES, [str(dtype) for dtype in HALVES]))
def test_entries(implementation, memory, case, dtype):
    table.test_entries(implementation, memory, case, dtype)


@pytest.mark.parametrize(("case", "tokens"), [(MANY_TILES, 17), (WIDE_TILES, 330)], ids=["many_tiles", "wide_tiles"])
def test_several_tiles_or_chunks_in_a_block(implementation, memory, case, tokens):
    e = entries(case)
    table.check(implementation, memory, e, *table.operands(e, tokens, torch.bfloat16))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", table.TOKENS)
def test_tokens(implementation, memory, tokens, dtype):
    table.test_tokens(implementation, memory, tokens, dtype)


@pytest.mark.parametrize("compact", ["rows", "cols", "both"])
def test_compact_operands(implementation, memory, compact):
    e = entries(table.COMPACT)
    rows = e.rows if compact == "cols" else None
    cols = e.cols if compact == "rows" else None
    table.check(implementation, memory, e, *table.operands(e, 17, torch.bfloat16), layout=(rows, cols, *e.layout[2:]))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_strided_rows(implementation, memory, dtype):
    table.test_strided_rows(implementation, memory, dtype)


@pytest.mark.parametrize("tokens", [1, 33, 64, 1056])
def test_columns_that_lie_in_memory_as_rows(implementation, memory, tokens):
    """Used as they lie where every column starts on a 16-byte boundary (64 and 1056, on one), copied where not."""
    table.test_columns_that_lie_in_memory_as_rows(implementation, memory, tokens, torch.bfloat16)


def test_one_layer_of_several(implementation, memory):
    e = entries(SEVERAL_LAYERS[0])
    for layer in range(len(e.shapes)):
        tiles = e.tiles[e.tiles[:, 0] == layer]
        grad_out, input = table.operands(e, 17, torch.bfloat16, layer)
        exact, magnitude = table.dense(e, grad_out, input, layer)
        start = normal(generator("start", layer), (len(e),), torch.float32)
        out = memory.put(start)
        implementation(out, grad_out, input, *e.layout[:2], tiles, *e.layout[3:], False)
        mine = e.layer == layer
        table.assert_within(out[mine], exact, table.gamma(18, 2.0**-24) * magnitude)
        table.assert_same_bits(out[~mine], start[~mine], "gradient of another layer")
    memory.check()


def test_non_finite_reaches_only_its_own_entries(implementation, memory):
    table.test_non_finite_reaches_only_its_own_entries(implementation, memory, torch.bfloat16, float("inf"))


def test_offsets_beyond_int32(implementation, tmp_path):
    table.test_offsets_beyond_int32(implementation, tmp_path)


def pattern(size: int, density: float) -> Pattern:
    """Entries drawn at random, in tiles of 64 x 64."""
    flat = torch.randperm(size * size)[: int(density * size * size)]
    order = torch.arange(size)
    return Pattern.from_indices(flat, (size, size), row_order=order, col_order=order)


def loaded(emulator, p: Pattern, tokens: int) -> int:
    """Elements of the operands that the products loaded for each token; all of it in full sectors."""
    grad_out, input = (torch.randn(p.shape[0], tokens).bfloat16().T for _ in range(2))  # by columns: used as they lie
    emulator.configure(sectors=True)
    torch.ops.sparseft_cuda.masked_grad_(
        torch.zeros(len(p)), grad_out, input, None, None, p.tiles, p.local, list(p.tile), False
    )
    total = 0
    for operand in (grad_out, input):
        reads, _ = emulator.traffic(operand)
        assert reads.efficiency == 1, reads
        total += reads.bytes
    return total // (2 * tokens)


def test_only_columns_with_an_entry_are_loaded(emulator):
    """What docs/kernels.md counts: each marked column once, and the panel's 16 rows for every 64 of them."""
    torch.manual_seed(0)
    p, tokens = pattern(256, 0.01), 64
    row, col = p.indices() // 256, p.indices() % 256
    marked = torch.zeros(16, 4, 64)  # panel, tile, column
    marked[row // 16, col // 64, col % 64] = 1
    columns = marked.sum(2)  # a block takes one tile here, of at most 64 columns
    assert loaded(emulator, p, tokens) == columns.sum() + 16 * (columns > 0).sum()


@pytest.mark.parametrize(("density", "panels"), [(0.001, True), (0.005, True), (0.05, False)])
def test_the_rule(emulator, monkeypatch, density, panels):
    """Panels where tiles hold few entries; SPARSEFT_MASKED_GRAD decides otherwise. Seen by what is loaded."""
    p, tokens = pattern(256, density), 16
    ways = {}
    for asked in ("tiles", "panels", ""):
        monkeypatch.setenv("SPARSEFT_MASKED_GRAD", asked)
        ways[asked] = loaded_in_any_way(emulator, p, tokens)
    assert ways["tiles"] != ways["panels"]
    assert ways[""] == ways["panels" if panels else "tiles"]
    monkeypatch.setenv("SPARSEFT_MASKED_GRAD", "fast")
    with pytest.raises(RuntimeError, match="SPARSEFT_MASKED_GRAD must be tiles or panels, got fast"):
        loaded_in_any_way(emulator, p, tokens)


def loaded_in_any_way(emulator, p: Pattern, tokens: int) -> list[int]:
    grad_out, input = (torch.randn(p.shape[0], tokens).bfloat16().T for _ in range(2))
    emulator.configure(sectors=True)
    torch.ops.sparseft_cuda.masked_grad_(torch.zeros(len(p)), grad_out, input, *p.layout[:4], list(p.tile), False)
    figures = []
    for operand in (grad_out, input):
        try:
            figures.append(emulator.traffic(operand)[0].bytes)
        except KeyError:  # a copy was used in its place
            figures.append(0)
    return figures
