"""Pattern: which entries of one weight train, in the order in which the kernels walk them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparseft.reference import COL0, ENTRY0, ENTRY1, LAYER, ROW0, decode

FORMAT = "sparseft.pattern.v1"
MAX_TILE = 1 << 16  # a local position has 16 bits
TENSORS = ("rows", "cols", "tiles", "local")


class Layout(NamedTuple):
    """The entries of one or several layers, as every operation takes them (the fields: `reference.py`)."""

    rows: Tensor
    cols: Tensor
    tiles: Tensor
    local: Tensor
    tile: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Pattern:
    """The selected entries of one weight `[N, K]`, tile by tile in a sorted row-by-column space.

    Active rows and columns are kept in an order that packs the entries into few tiles. An entry costs two
    bytes: its 16-bit position inside its tile. Entries are ordered by tile and row-major inside a tile, so
    a tile's gradient, moments and values are one contiguous run.

    Args:
        shape: (N, K) of the weight. Weights of another rank are seen as `[-1, last dimension]`.
        tile: (BM, BN), rows and columns of a tile; BM * BN <= 65536.
        rows: int32 [R], the active rows in their order. `cols`: int32 [C], likewise.
        tiles: int64 [n, 5], the worklist (LAYER = 0, ROW0, COL0, ENTRY0, ENTRY1).
        local: int16 [k], one position per entry, its bits read as unsigned.
    """

    shape: tuple[int, int]
    tile: tuple[int, int]
    rows: Tensor = field(repr=False)
    cols: Tensor = field(repr=False)
    tiles: Tensor = field(repr=False)
    local: Tensor = field(repr=False)

    @classmethod
    def from_indices(
        cls,
        indices: Tensor,
        shape: Sequence[int],
        *,
        tile: tuple[int, int] = (64, 64),
        mass: Tensor | None = None,
        row_order: Tensor | None = None,
        col_order: Tensor | None = None,
    ) -> "Pattern":
        """Build from unique flat positions (int64, any order) in a weight of `shape`.

        Rows and columns are ordered by the `mass` ([k], default: one each) that their entries carry, largest
        first, unless `row_order` / `col_order` (int64, every active row or column once) fix the order.

        Raises:
            TypeError: `indices` is not int64.
            ValueError: a position is out of range or repeated, the tile is too large, an order misses a row.
        """
        rows_n, cols_n = matrix_shape(shape)
        check_tile(tile)
        if indices.dtype != torch.int64 or indices.dim() != 1:
            raise TypeError(f"indices must be a 1-D int64 tensor, got {indices.dim()}-D {indices.dtype}")
        if len(indices) and not (0 <= int(indices.min()) and int(indices.max()) < rows_n * cols_n):
            bad = indices[(indices < 0) | (indices >= rows_n * cols_n)][0]
            raise ValueError(f"indices must lie in [0, {rows_n * cols_n}) for shape {tuple(shape)}, got {int(bad)}")
        if mass is not None and mass.shape != indices.shape:
            raise ValueError(
                f"mass must have one value per index, shape {tuple(indices.shape)}, got {tuple(mass.shape)}"
            )
        row, col = indices // cols_n, indices % cols_n
        weight = torch.ones(len(indices), device=indices.device) if mass is None else mass
        row_order = _by_mass(row, weight, rows_n) if row_order is None else row_order
        col_order = _by_mass(col, weight, cols_n) if col_order is None else col_order
        r, c = _place(row, row_order, rows_n, "row_order"), _place(col, col_order, cols_n, "col_order")

        across = -(-max(len(col_order), 1) // tile[1])
        number = (r // tile[0]) * across + c // tile[1]
        local = (r % tile[0]) * tile[1] + c % tile[1]
        order = torch.argsort(number * (tile[0] * tile[1]) + local)
        number, local, sorted_flat = number[order], local[order], indices[order]
        if bool((sorted_flat[1:] == sorted_flat[:-1]).any()):
            bad = sorted_flat[1:][sorted_flat[1:] == sorted_flat[:-1]][0]
            raise ValueError(f"indices must be unique, got {int(bad)} twice")
        ids, counts = torch.unique_consecutive(number, return_counts=True)
        end = counts.cumsum(0)
        table = torch.stack(
            [torch.zeros_like(ids), ids // across * tile[0], ids % across * tile[1], end - counts, end], dim=1
        )
        return cls(
            (rows_n, cols_n),
            (int(tile[0]), int(tile[1])),
            row_order.to(torch.int32),
            col_order.to(torch.int32),
            table,
            local.to(torch.int16),
        )

    @classmethod
    def from_mask(cls, mask: Tensor, *, tile: tuple[int, int] = (64, 64), mass: Tensor | None = None) -> "Pattern":
        """Build from a boolean mask of the weight's shape; `mass` (same shape) orders rows and columns."""
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
        if mass is not None and mass.shape != mask.shape:
            raise ValueError(f"mass must have the mask's shape {tuple(mask.shape)}, got {tuple(mass.shape)}")
        indices = mask.reshape(-1).nonzero().squeeze(1)
        picked = None if mass is None else mass.reshape(-1)[indices]
        return cls.from_indices(indices, mask.shape, tile=tile, mass=picked)

    def __len__(self) -> int:
        """k, the number of selected entries."""
        return len(self.local)

    @property
    def density(self) -> float:
        """Share of the weight's entries that are selected."""
        return len(self) / max(self.shape[0] * self.shape[1], 1)

    @property
    def whole_rows(self) -> bool:
        """Whether every row that has an entry has all (a vector is one row); not so if there is none."""
        return len(self) == len(self.rows) * self.shape[1] > 0

    @property
    def layout(self) -> Layout:
        """The tensors, as the operations take them."""
        return Layout(self.rows, self.cols, self.tiles, self.local, self.tile)

    def indices(self) -> Tensor:
        """int64 [k]: flat positions row * K + col, in the kernels' order."""
        _, _, row, col = decode(self.rows, self.cols, self.tiles, self.local, self.tile)
        return row * self.shape[1] + col

    def to_mask(self) -> Tensor:
        """bool [N, K]."""
        mask = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.bool, device=self.local.device)
        mask[self.indices()] = True
        return mask.view(self.shape)

    def gather(self, weight: Tensor) -> Tensor:
        """[k], a copy: the selected entries of a tensor with the weight's shape (ValueError for another shape)."""
        if matrix_shape(weight.shape) != self.shape:
            raise ValueError(f"weight must have shape {self.shape}, got {tuple(weight.shape)}")
        return weight.reshape(-1)[self.indices()]

    def to(self, device: torch.device | str) -> "Pattern":
        """The same pattern on another device."""
        return Pattern(self.shape, self.tile, *(getattr(self, name).to(device) for name in TENSORS))

    def validate(self) -> "Pattern":
        """Check every index against its bounds; returns self.

        Raises:
            ValueError: naming the field, the first bad element and what was expected.
        """
        check_tile(self.tile)
        for name, dtype, dim in (("rows", torch.int32, 1), ("cols", torch.int32, 1), ("tiles", torch.int64, 2),
                                 ("local", torch.int16, 1)):  # fmt: skip
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.dim() != dim:
                raise ValueError(f"Pattern.{name} must be {dim}-D {dtype}, got {tensor.dim()}-D {tensor.dtype}")
        if self.tiles.shape[1] != 5:
            raise ValueError(f"Pattern.tiles must be [n, 5], got {tuple(self.tiles.shape)}")
        for name, size in zip(("rows", "cols"), self.shape, strict=True):
            order = getattr(self, name)
            _first_bad(f"Pattern.{name}", (order < 0) | (order >= size), order, f"an index in [0, {size})")
            _first_bad(f"Pattern.{name}", _repeats(order), order, "every index once")
        row0, col0, first, last = (self.tiles[:, i] for i in (ROW0, COL0, ENTRY0, ENTRY1))
        _first_bad("Pattern.tiles LAYER", self.tiles[:, LAYER] != 0, self.tiles[:, LAYER], "0")
        for name, start, step, size in (("ROW0", row0, self.tile[0], len(self.rows)),
                                        ("COL0", col0, self.tile[1], len(self.cols))):  # fmt: skip
            bad = (start < 0) | (start >= size) | (start % step != 0)
            _first_bad(f"Pattern.tiles {name}", bad, start, f"a multiple of {step} in [0, {size})")
        expected = torch.cat([first.new_zeros(1), last])
        _first_bad("Pattern.tiles ENTRY0", first != expected[:-1], first, "the previous tile's ENTRY1")
        _first_bad("Pattern.tiles ENTRY1", last <= first, last, "more than ENTRY0")
        if int(expected[-1]) != len(self):
            raise ValueError(f"Pattern.tiles must end at entry {len(self)}, got {int(expected[-1])}")
        across = -(-max(len(self.cols), 1) // self.tile[1])
        number = row0 // self.tile[0] * across + col0 // self.tile[1]
        _first_bad("Pattern.tiles", number[1:] <= number[:-1], number[1:], "ascending tile numbers")
        self._validate_local(row0, col0, last - first)
        return self

    def _validate_local(self, row0: Tensor, col0: Tensor, lengths: Tensor) -> None:
        position = self.local.long() & 0xFFFF
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        r, c = row0[owner] + position // self.tile[1], col0[owner] + position % self.tile[1]
        bad = (position >= self.tile[0] * self.tile[1]) | (r >= len(self.rows)) | (c >= len(self.cols))
        inside = f"a position inside tile {self.tile} and the active rows and columns"
        _first_bad("Pattern.local", bad, position, inside)
        falls = (owner[1:] == owner[:-1]) & (position[1:] <= position[:-1])
        _first_bad("Pattern.local", falls, position[1:], "ascending positions inside a tile")

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of shape, tile and all four tensors: two patterns are equal when their digests are."""
        lengths = [len(getattr(self, name)) for name in TENSORS]
        state = hashlib.sha256(json.dumps([FORMAT, self.shape, self.tile, lengths]).encode())
        for name in TENSORS:
            state.update(getattr(self, name).cpu().contiguous().numpy().tobytes())
        return state.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the digest goes into its header."""
        header = {"format": FORMAT, "shape": json.dumps(self.shape), "tile": json.dumps(self.tile),
                  "digest": self.digest}  # fmt: skip
        save_file({name: getattr(self, name).cpu().contiguous() for name in TENSORS}, path, header)

    @classmethod
    def load(cls, path: str | Path) -> "Pattern":
        """Read a file written by `save`.

        Raises:
            ValueError: not such a file, truncated, or its content does not match its digest.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ValueError(f"{path}: expected format {FORMAT}, got {header.get('format')}")
                tensors = [file.get_tensor(name) for name in TENSORS]
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable pattern file: {error}") from error
        shape, tile = (_pair(header, name, path) for name in ("shape", "tile"))
        pattern = cls(shape, tile, *tensors).validate()
        if pattern.digest != header.get("digest"):
            raise ValueError(f"{path}: content does not match its digest; the file was changed or damaged")
        return pattern


def _pair(header: dict[str, str], name: str, path: str | Path) -> tuple[int, int]:
    try:
        first, second = json.loads(header[name])
        if type(first) is type(second) is int and min(first, second) >= 0:
            return first, second
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"{path}: header field {name!r} must be two sizes, got {header.get(name)!r}")


def pack(patterns: Sequence[Pattern]) -> Layout:
    """Join patterns (one tile shape, one device) into the layout of an arena; layer i is `patterns[i]`."""
    tiles = {p.tile for p in patterns}
    if len(tiles) != 1:
        raise ValueError(f"patterns must share one tile shape, got {sorted(tiles)}")
    table, rows, cols, entries = [], 0, 0, 0
    for layer, p in enumerate(patterns):
        table.append(p.tiles + p.tiles.new_tensor([layer, rows, cols, entries, entries]))
        rows, cols, entries = rows + len(p.rows), cols + len(p.cols), entries + len(p)
    return Layout(
        torch.cat([p.rows for p in patterns]),
        torch.cat([p.cols for p in patterns]),
        torch.cat(table),
        torch.cat([p.local for p in patterns]),
        tiles.pop(),
    )


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """How a weight of any rank is seen: 1-D as one row, more dimensions as [-1, last dimension]."""
    *lead, last = shape or (1,)
    n = 1
    for size in lead:
        n *= int(size)
    return n, int(last)


def check_tile(tile: Sequence[int]) -> None:
    sizes = isinstance(tile, Sequence) and len(tile) == 2 and all(type(size) is int for size in tile)
    if not sizes or min(tile) < 1 or tile[0] * tile[1] > MAX_TILE:
        raise ValueError(f"tile must be two positive sizes with at most {MAX_TILE} positions, got {tile!r}")


def _by_mass(index: Tensor, mass: Tensor, size: int) -> Tensor:
    """The distinct values of `index`, by their summed mass, largest first; ties to the lower index."""
    device, index, mass = index.device, index.cpu(), mass.cpu().double()  # on the CPU sums have a fixed order
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, index, mass)
    active = torch.bincount(index, minlength=size).nonzero().squeeze(1)
    return active[torch.argsort(total[active], descending=True, stable=True)].to(device)


def _place(index: Tensor, order: Tensor, size: int, name: str) -> Tensor:
    """Where each of `index` stands in `order`."""
    order = order.long()
    if len(order) and not (0 <= int(order.min()) and int(order.max()) < size):
        raise ValueError(f"{name} must hold indices in [0, {size}), got {int(order.min())}..{int(order.max())}")
    where = torch.full((size,), -1, dtype=torch.int64, device=index.device)
    where[order] = torch.arange(len(order), device=index.device)
    if int((where >= 0).sum()) != len(order):
        raise ValueError(f"{name} must hold every index once")
    place = where[index]
    if bool((place < 0).any()):
        raise ValueError(f"{name} must hold every active index, {int(index[place < 0][0])} is missing")
    return place


def _repeats(order: Tensor) -> Tensor:
    """bool: which elements equal an earlier one."""
    found, at = torch.sort(order, stable=True)
    repeated = torch.zeros_like(order, dtype=torch.bool)
    repeated[at[1:]] = found[1:] == found[:-1]
    return repeated


def _first_bad(what: str, bad: Tensor, values: Tensor, expected: str) -> None:
    if bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        raise ValueError(f"{what}[{at}] is {int(values[at])}, expected {expected}")
