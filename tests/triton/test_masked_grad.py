"""What masked_grad's Triton kernels do beyond the operation table: both variants, several layers, sums of squares."""

from functools import partial

import pytest
import torch

from sparseft import reference
from sparseft.pattern import Pattern, pack

from . import hardened, strict  # noqa: F401 (the kernels run in the strict interpreter)

# isort: split
from sparseft.kernels.masked_grad import choose, configuration, masked_grad_, precision

SHAPES = ((130, 100), (64, 100), (1, 100))


def pattern(shape: tuple[int, int], density: float, tile=(64, 64)) -> Pattern:
    mask = torch.rand(shape) < density
    mask[-1, -1] = True
    return Pattern.from_mask(mask, tile=tile)


def operands(tokens: int, dtype: torch.dtype, *widths: int) -> list[torch.Tensor]:
    return [torch.randn(tokens, n).to(dtype) for n in widths]


def expected(p: Pattern, grad_out: torch.Tensor, input: torch.Tensor, start: torch.Tensor | None = None):
    """fp64 [k] and the bound of an fp32 sum's error, T + 2 roundings, 12 for TF32 in three (see tests/kernels)."""
    at = p.indices() // p.shape[1], p.indices() % p.shape[1]
    g, x = grad_out.double(), input.double()
    before = torch.zeros(len(p), dtype=torch.float64) if start is None else start.double()
    bound = (len(g) + 2 + 12 * (input.dtype == torch.float32)) * 2.0**-24 * (before.abs() + (g.abs().T @ x.abs())[at])
    return before + (g.T @ x)[at], bound


@pytest.mark.parametrize("variant", ["tiles", "panels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "density"), [((130, 70), 0.1), ((33, 300), 0.01), ((16, 64), 1.1), ((1, 1), 1.1)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_variants(variant, dtype, shape, density, accumulate):
    p = pattern(shape, density)
    grad_out, input = operands(70, dtype, *shape)
    start = torch.randn(len(p))
    exact, bound = expected(p, grad_out, input, start if accumulate else None)
    for rows, cols, g, x in ((p.rows, p.cols, grad_out, input),
                             (None, None, grad_out[:, p.rows.long()], input[:, p.cols.long()])):  # fmt: skip
        out = start.clone()
        masked_grad_(out, g, x, rows, cols, *p.layout[2:], accumulate, variant=variant)
        assert ((out - exact).abs() <= bound).all()


@pytest.mark.parametrize("variant", ["tiles", "panels"])
def test_layers_that_share_an_input(variant):
    """One launch for q, k and v; the layers' active columns differ."""
    patterns = [pattern(shape, 0.1) for shape in SHAPES]
    *grad_outs, input = operands(40, torch.bfloat16, *(n for n, _ in SHAPES), 100)
    out = torch.zeros(sum(map(len, patterns)))
    masked_grad_(out, grad_outs, input, *pack(patterns), False, variant=variant)
    for p, grad_out, mine in zip(patterns, grad_outs, out.split([len(p) for p in patterns]), strict=True):
        exact, bound = expected(p, grad_out, input)
        assert ((mine - exact).abs() <= bound).all()


def test_sums_of_squares():
    """Of what `out` holds afterwards, tile by tile; of the tiles in the worklist only."""
    p = pattern((130, 70), 0.2)
    tiles = p.tiles[::2]
    out, squares = torch.randn(len(p)), torch.full((len(tiles),), float("nan"))
    grad_out, input = operands(33, torch.float32, 130, 70)
    masked_grad_(out, grad_out, input, p.rows, p.cols, tiles, p.local, p.tile, True, squares=squares)
    want = torch.stack([out[first:last].double().square().sum() for first, last in tiles[:, 3:].tolist()])
    torch.testing.assert_close(squares.double(), want, rtol=1e-5, atol=0)


def test_an_input_kept_as_columns_is_not_copied_whole():
    """A sparse layer passes the transpose of [columns, T]: it is compacted from there."""
    p = pattern((130, 70), 0.1)
    grad_out, kept = operands(33, torch.bfloat16, 130, 70)[0], torch.randn(70, 33).bfloat16()
    out = torch.zeros(len(p))
    with hardened.recorded() as launches:
        masked_grad_(out, grad_out, kept.T, *p.layout, False)
    assert [launch.kernel for launch in launches] == ["_compact", "_compact", "_tiles"]
    exact, bound = expected(p, grad_out, kept.T)
    assert ((out - exact).abs() <= bound).all()


@pytest.mark.parametrize("switch", ["fp32_precision", "allow_tf32"])
def test_tf32_is_torchs_choice_by_either_of_its_switches(switch):
    """Reading the older switch raises where the newer one was set."""
    assert precision() == "tf32x3"
    try:
        setattr(torch.backends.cuda.matmul, switch, {"fp32_precision": "tf32", "allow_tf32": True}[switch])
        assert precision() == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")


def test_wrong_options(monkeypatch):
    p = pattern((20, 30), 0.3)
    grad_out, input = operands(3, torch.float32, 20, 30)
    out, squares = torch.zeros(len(p)), torch.zeros(len(p.tiles))
    call = partial(masked_grad_, out, grad_out, input, *p.layout, False)
    with pytest.raises(ValueError, match="'tiles' or 'panels', got 'panel'"):
        call(variant="panel")
    with pytest.raises(ValueError, match="variant must be 'tiles' for sums of squares, got 'panels'"):
        call(variant="panels", squares=squares)
    with pytest.raises(ValueError, match="rows must be given for a list of grad_out, got None"):
        masked_grad_(out, [grad_out], input, None, *p.layout[1:], False)
    monkeypatch.setenv("SPARSEFT_MASKED_GRAD", "fast")
    with pytest.raises(ValueError, match="SPARSEFT_MASKED_GRAD"):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tile", [(1, 1), (16, 16), (64, 64), (128, 16), (128, 128), (1, 65536)], ids=str)
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_configurations_fit_the_smallest_gpu(dtype, tile, arch):
    """The copies in flight stay under the 99 KiB that a block may use on sm_86 and sm_120; tl.dot takes 16 and more."""
    c = configuration(arch, dtype, tile)
    stage = (c["BLOCK_M"] + c["BLOCK_N"]) * c["BLOCK_T"] * dtype.itemsize
    assert stage * c["num_stages"] <= 99 * 1024
    assert min(c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_T"]) >= 16
    assert c["BLOCK_M"] * c["BLOCK_N"] * max(dtype.itemsize, 4) <= 64 * 1024  # what gathering from the sums takes


@pytest.mark.parametrize("variant", ["tiles", "panels"])
def test_the_same_bits_in_any_order_of_programs(variant, monkeypatch):
    p = pattern((200, 130), 0.1)
    grad_out, input = operands(65, torch.bfloat16, 200, 130)
    runs = []
    for seed in (0, 1, 2):
        monkeypatch.setattr(hardened, "seed", seed)
        out = torch.zeros(len(p))
        masked_grad_(out, grad_out, input, *p.layout, True, variant=variant)
        runs.append(out)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_a_changed_worklist_is_noticed():
    """Plans are remembered by tensor and version: writing into the worklist must not leave a stale one."""
    p = pattern((130, 70), 0.2)
    tiles = p.tiles.clone()
    grad_out, input = operands(9, torch.float32, 130, 70)
    for _ in range(2):
        out, want = torch.zeros(len(p)), torch.zeros(len(p))
        masked_grad_(out, grad_out, input, p.rows, p.cols, tiles, p.local, p.tile, False)
        reference.masked_grad_(want, grad_out, input, p.rows, p.cols, tiles, p.local, p.tile, False)
        torch.testing.assert_close(out, want)
        tiles[:] = tiles[:1].clone()  # now the first tile, again and again; then only once
        tiles = tiles[:1]


@pytest.mark.parametrize(
    ("entries", "tile", "variant"),
    [(400, (64, 64), "tiles"), (40, (64, 64), "panels"), (1, (16, 16), "panels"), (256, (16, 16), "tiles")],
)
def test_the_stated_rule(entries, tile, variant):
    """Panels where 2 * 1.25 operand elements per entry are fewer than a tile's BM + BN."""
    assert choose(10 * entries, 10, tile) == variant
