"""The table of the four operations: inputs, oracles' coordinates and comparisons, shared by all implementations.

Nothing here uses `pattern.py` or `reference.py`: the selected entries are encoded by the loop in `encode`, and
each test keeps the plain (layer, row, column) of every entry for its oracle.
"""

import functools
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UNIT = {  # unit roundoff: the relative error of one rounding to nearest
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
SMALLEST = {  # smallest subnormal: half of it is the absolute error of one rounding near zero
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-149,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
}


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operation on `dtype` computes: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


# ---- selected entries -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """How the entries of one or several layers are chosen.

    `fill` is a share of the entries or one of: empty, full, one, row, column. `absent` is the share of the
    active tiles that the worklist leaves out. `large` cases run in two dtypes only.
    """

    id: str
    shapes: tuple[tuple[int, int], ...]
    tile: tuple[int, int]
    fill: float | str
    absent: float = 0.0
    large: bool = False


ONE_LAYER = [
    Case("1x1", ((1, 1),), (1, 1), "full"),
    Case("no_rows", ((0, 5),), (16, 16), "empty"),
    Case("no_columns", ((5, 0),), (16, 16), "empty"),
    Case("none_selected", ((130, 127),), (64, 64), "empty"),
    Case("one_entry", ((128, 129),), (64, 64), "one"),
    Case("one_row", ((33, 65),), (16, 16), "row"),
    Case("one_column", ((33, 65),), (16, 16), "column"),
    Case("primes_tile_1x1", ((13, 7),), (1, 1), 0.4),
    Case("primes_tile_3x5", ((13, 7),), (3, 5), 0.4),
    Case("tile_16x16", ((31, 33),), (16, 16), 0.3),
    Case("tile_64x64_odd", ((65, 63),), (64, 64), 0.1),
    Case("tile_64x64_full", ((64, 64),), (64, 64), "full"),
    Case("tile_16x16_full", ((64, 128),), (16, 16), "full"),
    Case("tile_256x256_full", ((256, 256),), (256, 256), "full", large=True),  # 65,536 positions: locals beyond int16
    Case("tile_256x256_sparse", ((300, 270),), (256, 256), 0.02),
    Case("tile_1x256", ((5, 300),), (1, 256), 0.2),
    Case("tile_256x1", ((300, 5),), (256, 1), 0.2),
    Case("tile_1x65536", ((2, 40000),), (1, 65536), 0.05, large=True),
    Case("wide", ((3, 40009),), (16, 64), 0.004),  # columns beyond int16
    Case("tall", ((40009, 3),), (16, 64), 0.004),
    Case("tiles_absent", ((97, 89),), (16, 16), 0.2, absent=0.5),
    Case("all_tiles_absent", ((17, 19),), (16, 16), 0.2, absent=1.0),
]
SEVERAL_LAYERS = [
    Case("layers", ((13, 7), (64, 64), (1, 33), (31, 2), (65, 130)), (16, 16), 0.3),
    Case("layers_tile_64x64", ((129, 64), (63, 257)), (64, 64), 0.05),
    Case("layers_tiles_absent", ((40, 70), (33, 31), (70, 40)), (16, 16), 0.2, absent=0.5),
    Case("layers_one_entry_each", ((5, 9), (300, 2), (2, 300)), (16, 16), "one"),
]
ALL = ONE_LAYER + SEVERAL_LAYERS


def crossed(cases: Sequence[Case], options: Sequence, names: Sequence[str]) -> list:
    """pytest parameters (case, option): every option for a small case, the first two for a large one."""
    return [
        pytest.param(case, option, id=f"{case.id}-{name}")
        for case in cases
        for option, name in list(zip(options, names, strict=True))[: 2 if case.large else None]
    ]


def by_dtype(cases: Sequence[Case]) -> list:
    """`crossed` with the floating dtypes."""
    return crossed(cases, FLOATS, [str(dtype) for dtype in FLOATS])


@dataclass(frozen=True)
class Entries:
    """Selected entries in both languages: the kernels' layout, and plain coordinates for the oracles."""

    shapes: tuple[tuple[int, int], ...]
    rows: Tensor
    cols: Tensor
    tiles: Tensor
    local: Tensor
    tile: tuple[int, int]
    layer: Tensor  # int64 [k], and so the next two
    row: Tensor
    col: Tensor
    present: Tensor  # bool [k]: the entry's tile is in the worklist

    @property
    def layout(self) -> tuple:
        return self.rows, self.cols, self.tiles, self.local, list(self.tile)

    def __len__(self) -> int:
        return len(self.local)

    def on(self, device: str) -> tuple:
        return (*(t.to(device) for t in self.layout[:4]), list(self.tile))


@functools.cache
def entries(case: Case) -> Entries:
    """The case's entries; the same on every run."""
    rng = generator(case.id)
    masks = [_mask(shape, case.fill, rng) for shape in case.shapes]
    return encode(masks, case.tile, rng, case.absent)


def encode(masks: Sequence[numpy.ndarray], tile: tuple[int, int], rng: numpy.random.Generator, absent=0.0) -> Entries:
    """Write masks down as the kernels read them, with rows and columns in a random order.

    A few rows and columns without any entry are listed as active, too: an order may hold them.
    """
    rows, cols, tiles, local, where, present = [], [], [], [], [], []
    first_row = first_col = first_entry = 0
    for layer, mask in enumerate(masks):
        r, c = (_order(mask.any(1 - axis), rng) for axis in (0, 1))
        compact = mask[r][:, c]
        for r0 in range(0, len(r), tile[0]):
            for c0 in range(0, len(c), tile[1]):
                i, j = compact[r0 : r0 + tile[0], c0 : c0 + tile[1]].nonzero()  # row-major
                if not len(i):
                    continue
                keep = rng.random() >= absent
                if keep:
                    tiles.append([layer, first_row + r0, first_col + c0, first_entry, first_entry + len(i)])
                local.append(i * tile[1] + j)
                where.append(numpy.stack([numpy.full(len(i), layer), r[r0 + i], c[c0 + j]]))
                present.append(numpy.full(len(i), keep))
                first_entry += len(i)
        rows.append(r)
        cols.append(c)
        first_row, first_col = first_row + len(r), first_col + len(c)
    layer, row, col = torch.from_numpy(numpy.concatenate([numpy.zeros((3, 0), numpy.int64), *where], axis=1))
    return Entries(
        tuple(m.shape for m in masks),
        torch.from_numpy(numpy.concatenate(rows).astype(numpy.int32)),
        torch.from_numpy(numpy.concatenate(cols).astype(numpy.int32)),
        torch.tensor(tiles, dtype=torch.int64).reshape(-1, 5),
        torch.from_numpy(numpy.concatenate([numpy.zeros(0), *local]).astype(numpy.uint16).view(numpy.int16)),
        tile,
        layer,
        row,
        col,
        torch.from_numpy(numpy.concatenate([numpy.zeros(0, bool), *present])),
    )


def _order(active: numpy.ndarray, rng: numpy.random.Generator) -> numpy.ndarray:
    """The active indices and up to two others, shuffled."""
    idle = (~active).nonzero()[0]
    spare = rng.choice(idle, min(2, len(idle)), replace=False) if len(idle) and active.any() else idle[:0]
    return rng.permutation(numpy.concatenate([active.nonzero()[0], spare]))


def _mask(shape: tuple[int, int], fill: float | str, rng: numpy.random.Generator) -> numpy.ndarray:
    if not isinstance(fill, str):
        return rng.random(shape) < fill
    mask = numpy.full(shape, fill == "full")
    if fill == "one":
        mask[-1, -1] = True
    elif fill == "row":
        mask[shape[0] // 2] = True
    elif fill == "column":
        mask[:, shape[1] // 2] = True
    return mask


# ---- numbers --------------------------------------------------------------------------------------------------


def generator(*key: object) -> numpy.random.Generator:
    """Random numbers that depend on the key only."""
    return numpy.random.default_rng(zlib.crc32(repr(key).encode()))


def normal(rng: numpy.random.Generator, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return rounded(torch.from_numpy(rng.standard_normal(shape)), dtype)


def special(dtype: torch.dtype) -> Tensor:
    """fp64 [n]: zeros of both signs, infinities, subnormals, the largest value, and ties and near-ties of rounding."""
    info = torch.finfo(dtype)
    one = [1.0, 1 + info.eps, 1 + info.eps / 2, 1 + 1.5 * info.eps, 1 + info.eps / 2 + 2.0**-23, 1 + 0.75 * info.eps]
    edge = [info.max, info.tiny, info.tiny / 2, SMALLEST[dtype], SMALLEST[dtype] / 2, SMALLEST[dtype] * 1.5]
    positive = torch.tensor([0.0, float("inf"), *one, *edge], dtype=torch.float64)
    return torch.cat([positive, -positive])


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` to nearest, ties to even, without torch's casts to 16 bits; bf16 is rounded from fp32."""
    exact = values.to(wide(values.dtype)).numpy()
    with numpy.errstate(over="ignore"):
        if dtype != torch.bfloat16:
            return torch.from_numpy(exact.astype(str(dtype).removeprefix("torch.")))
        bits = exact.astype(numpy.float32).view(numpy.uint32).astype(numpy.uint64)
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    out = numpy.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, up).astype(numpy.uint16)
    return torch.from_numpy(out.view(numpy.int16)).view(torch.bfloat16)


def gamma(n: int, unit: float) -> float:
    """Higham's constant: n roundings change a sum of products by at most gamma * sum |products|."""
    return n * unit / (1 - n * unit)


# ---- memory that notices stray writes -------------------------------------------------------------------------


class Memory:
    """Hands out tensors that lie inside larger buffers, and checks that what lies around them did not change.

    The margins hold NaN, so that a kernel which reads past an operand's end shows it. They are odd in size: no
    tensor is aligned by luck.
    """

    MARGIN = 37

    def __init__(self, device: str):
        self.device = device
        self._buffers: list[tuple[Tensor, Tensor, Tensor]] = []

    def put(self, data: Tensor, row_stride: int | None = None) -> Tensor:
        """A copy of `data`; with `row_stride` a matrix whose rows lie that far apart."""
        steps = (row_stride, 1) if row_stride else data.contiguous().stride()
        span = sum((n - 1) * s for n, s in zip(data.shape, steps, strict=True)) + 1 if data.numel() else 0
        buffer = torch.full((span + 2 * self.MARGIN,), float("nan"), dtype=data.dtype, device=self.device)
        view = buffer.as_strided(data.shape, steps, self.MARGIN)
        view.copy_(data)
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside.as_strided(data.shape, steps, self.MARGIN).fill_(False)
        self._buffers.append((buffer, buffer.clone(), outside))
        return view

    def check(self) -> None:
        """No byte around any tensor has changed."""
        for buffer, before, outside in self._buffers:
            changed = (bits(buffer) != bits(before)) & outside
            assert not changed.any(), f"wrote outside a tensor, at element {int(changed.nonzero()[0])} of its buffer"


def huge(numel: int, dtype: torch.dtype, device: str, folder: Path) -> Tensor:
    """Zeros, [numel]; on the CPU a sparse file, of which only the touched pages cost anything."""
    if device != "cpu":
        return torch.zeros(numel, dtype=dtype, device=device)
    return torch.from_file(str(folder / "huge"), shared=True, size=numel, dtype=dtype)


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """`torch.set_num_threads(count)` inside a with block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- comparisons ----------------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, to tell -0 from 0 and to compare NaNs."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return tensor.contiguous().view(integer)


def assert_same_bits(got: Tensor, expected: Tensor, what: str = "value") -> None:
    """Bit for bit the same."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    got, expected = got.cpu(), expected.cpu()
    differ = bits(got) != bits(expected)
    assert not differ.any(), f"{what}: {_first(differ, got, expected)}"


def assert_equal(got: Tensor, expected: Tensor, what: str = "value") -> None:
    """Bit for bit the same, any NaN for a NaN."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    got, expected = got.cpu(), expected.cpu()
    differ = (bits(got) != bits(expected)) & ~(got.isnan() & expected.isnan())
    assert not differ.any(), f"{what}: {_first(differ, got, expected)}"


def assert_within(got: Tensor, exact: Tensor, bound: Tensor, what: str = "value") -> None:
    """|got - exact| <= bound everywhere; an exact infinity or NaN must be met."""
    assert got.shape == exact.shape
    got, exact = got.cpu().double(), exact.cpu().double()
    same = (got == exact) | (got.isnan() & exact.isnan())
    wrong = ~(same | ((got - exact).abs() <= bound.cpu().double()))  # a NaN is wrong
    assert not wrong.any(), f"{what}: {_first(wrong, got, exact)}, bound {bound.cpu().expand_as(exact)[wrong][0]:.3g}"


def _first(wrong: Tensor, got: Tensor, expected: Tensor) -> str:
    at = tuple(wrong.nonzero()[0].tolist())
    found, wanted = got[at].item(), expected[at].item()
    return f"{int(wrong.sum())} of {wrong.numel()} differ; {list(at)} is {found!r}, expected {wanted!r}"
