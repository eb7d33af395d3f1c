"""Budgets that choose whole blocks, whole heads and channels, or a row set times a column set."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseft.pattern import Pattern, matrix_shape


class BlockBudget:
    """As Budget, but blocks are chosen whole, by their mean |score|; no score is kept. SMT's choice (He et al., 2025).

    Blocks are the tiles of the weight in its own order, those at its edges smaller. The best are taken as long as that
    brings the number of entries closer to k.

    Args:
        shapes: the weights of the group, in the order in which ties are preferred; then the upper, the left block.
        k: entries to select, over all of them. `tile`: rows and columns of a block.
    """

    waits = False

    def __init__(self, shapes: Mapping[str, Sequence[int]], k: int, tile: tuple[int, int]):
        self._shapes = {name: matrix_shape(shape) for name, shape in shapes.items()}
        self._k, self._tile = k, tile
        self._mass: dict[str, Tensor] = {}  # fp64 [blocks down, blocks across], the sum of |score| of every block
        self._size = {name: _outer(*map(_lengths, shape, tile)) for name, shape in self._shapes.items()}
        self.tiles = sum(size.numel() for size in self._size.values())
        self.patterns: dict[str, Pattern] = {}  # the result, once every weight was added
        self.free_mass = self.mass = 0.0  # sum of |scores| of the choice

    def add(self, name: str, scores: Tensor) -> None:
        """Take one weight's scores (fp32 or fp64, of the weight's shape); the last one triggers the choice."""
        by_row = _sum_lines(scores.reshape(self._shapes[name]).abs().cpu(), self._tile[0])
        self._mass[name] = _sum_lines(by_row.T, self._tile[1]).T
        self._device = scores.device
        if len(self._mass) == len(self._shapes):
            self._choose()

    def _choose(self) -> None:
        mass = torch.cat([self._mass[name].reshape(-1) for name in self._shapes])
        size = torch.cat([self._size[name].reshape(-1) for name in self._shapes])
        keep = closest(mass / size, size, self._k)
        self.free_mass = self.mass = float(mass[keep].sum())
        for name, part in zip(self._shapes, keep.split([s.numel() for s in self._size.values()]), strict=True):
            if part.any():
                self.patterns[name] = self._pattern(self._shapes[name], part.view(self._size[name].shape))

    def _pattern(self, shape: tuple[int, int], keep: Tensor) -> Pattern:
        """Rows and columns in their own order, so that blocks are tiles."""
        down, across = (torch.arange(n) // edge for n, edge in zip(shape, self._tile, strict=True))
        rows, columns = (keep.any(1)[down].nonzero().squeeze(1), keep.any(0)[across].nonzero().squeeze(1))
        mask = keep[down[rows]][:, across[columns]]
        row, column = mask.nonzero().unbind(1)
        indices = (rows[row] * shape[1] + columns[column]).to(self._device)
        return Pattern.from_indices(indices, shape, tile=self._tile, row_order=rows.to(self._device),
                                    col_order=columns.to(self._device))  # fmt: skip


class SubnetBudget:
    """As Budget, but of every weight a set of rows times a set of columns is chosen: LoSiA (Wang et al., 2025).

    The k entries are shared by the weights' sizes; a weight gets the same share of its rows and of its columns, at
    least one, so the number of entries is k but for rounding. Of three choices the one with the largest sum of |score|
    is taken: the rows with the largest sums, then the columns with the largest sums over these rows; the same, columns
    first; both on their own. No score is kept.

    Args:
        shapes, k, tile: as in Budget.
    """

    waits = False

    def __init__(self, shapes: Mapping[str, Sequence[int]], k: int, tile: tuple[int, int]):
        self._shapes = {name: matrix_shape(shape) for name, shape in shapes.items()}
        self._tile = tile
        self._side = (k / sum(n * m for n, m in self._shapes.values())) ** 0.5  # share of the rows, and of the columns
        self.tiles = sum(-(-n // tile[0]) * -(-m // tile[1]) for n, m in self._shapes.values())
        self.patterns: dict[str, Pattern] = {}
        self.free_mass = self.mass = 0.0  # sum of |scores| of the choice

    def add(self, name: str, scores: Tensor) -> None:
        """Take one weight's scores (fp32 or fp64, of the weight's shape) and choose in it."""
        shape = self._shapes[name]
        rows, columns, mass = subnet(scores.reshape(shape).abs(), *(max(1, round(self._side * n)) for n in shape))
        indices = (rows[:, None] * shape[1] + columns).reshape(-1)
        self.patterns[name] = Pattern.from_indices(indices, shape, tile=self._tile)
        self.free_mass = self.mass = self.mass + mass


def subnet(scores: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, float]:
    """The best of LoSiA's three choices of so many rows and columns: ascending int64 positions, and the score mass.

    Args:
        scores: [N, K], not negative. Sums are taken in fp64; ties go to the lower row or column, the earlier choice.
    """
    of_rows, of_columns = scores.sum(1, dtype=torch.float64), scores.sum(0, dtype=torch.float64)
    best_rows, best_columns = _largest(of_rows, rows), _largest(of_columns, columns)
    inside = scores[best_rows].sum(0, dtype=torch.float64)
    beside = scores[:, best_columns].sum(1, dtype=torch.float64)
    choices = [(best_rows, _largest(inside, columns)), (_largest(beside, rows), best_columns),
               (best_rows, best_columns)]  # fmt: skip
    masses = [float(scores[r][:, c].sum(dtype=torch.float64)) for r, c in choices]
    at = masses.index(max(masses))
    return *choices[at], masses[at]


@dataclass(frozen=True)
class Couple:
    """A weight whose output rows and one whose input columns are the same heads or channels.

    Attributes:
        producer, consumer: parameter names. `units`: heads or channels; each has the same number of the producer's
            rows, and of the consumer's columns, side by side.
    """

    producer: str
    consumer: str
    units: int


COUPLES = {"v_proj": "o_proj", "up_proj": "down_proj"}  # as in Llama and its relatives


def couples(model: nn.Module, weights: Mapping[str, Tensor]) -> list[Couple]:
    """The couples among some weights of a model: value heads, each with the query heads that read it, and channels.

    Raises:
        ValueError: there is none, or the heads do not divide a weight.
    """
    found = []
    for producer in weights:
        kind = re.fullmatch(r"(.*?)(\w+)\.weight", producer)
        if kind is None or kind[2] not in COUPLES:
            continue
        consumer = f"{kind[1]}{COUPLES[kind[2]]}.weight"
        if consumer not in weights:
            continue
        rows, columns = weights[producer].shape[0], weights[consumer].shape[1]
        units = rows
        if kind[2] == "v_proj":
            config = getattr(model, "config", None)
            units = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
        if not units or rows % units or columns % units:
            raise ValueError(f"structure 'channels': {units} heads do not divide the {rows} rows of {producer} and the "
                             f"{columns} columns of {consumer}")  # fmt: skip
        found.append(Couple(producer, consumer, units))
    if not found:
        told = ", ".join(f"{a} with {b}" for a, b in COUPLES.items())
        raise ValueError(f"structure 'channels' needs weights named {told}; there are {list(weights)[:3]} and so on")
    return found


class ChannelBudget:
    """As Budget, but heads and channels are chosen whole, in both weights of a couple: S2FT (Yang et al., 2024).

    A unit (head or channel) is all of its rows of the producer and its columns of the consumer; its score is the mean
    |score| of these entries. The best are taken as long as that brings the number of entries closer to k. No score
    is kept.

    Args:
        shapes, k, tile: as in Budget. `couples`: every weight of the group is in one.
    """

    waits = False

    def __init__(self, shapes: Mapping[str, Sequence[int]], k: int, tile: tuple[int, int], couples: Sequence[Couple]):
        self._shapes = {name: matrix_shape(shape) for name, shape in shapes.items()}
        self._k, self._tile, self._couples = k, tile, couples
        self._units = {c.producer: (c.units, 0) for c in couples} | {c.consumer: (c.units, 1) for c in couples}
        self._mass: dict[str, Tensor] = {}  # fp64 [units]
        self._missing = set(shapes)
        self.tiles = sum(-(-n // tile[0]) * -(-m // tile[1]) for n, m in self._shapes.values())
        self.patterns: dict[str, Pattern] = {}
        self.free_mass = self.mass = 0.0

    def add(self, name: str, scores: Tensor) -> None:
        """Take one weight's scores (fp32 or fp64, of the weight's shape); the last one triggers the choice."""
        self._missing.remove(name)
        units, along = self._units[name]
        lines = scores.reshape(self._shapes[name]).abs().sum(1 - along, dtype=torch.float64)
        self._mass[name] = lines.view(units, -1).sum(1).cpu()
        self._device = scores.device
        if not self._missing:
            self._choose()

    def _choose(self) -> None:
        mass = torch.cat([self._mass[c.producer] + self._mass[c.consumer] for c in self._couples])
        entries = [sum(n * m for n, m in (self._shapes[c.producer], self._shapes[c.consumer])) for c in self._couples]
        size = torch.cat([torch.full((c.units,), n // c.units) for c, n in zip(self._couples, entries, strict=True)])
        keep = closest(mass / size, size, self._k)
        self.free_mass = self.mass = float(mass[keep].sum())
        for couple, part in zip(self._couples, keep.split([c.units for c in self._couples]), strict=True):
            if part.any():
                for name in (couple.producer, couple.consumer):
                    self.patterns[name] = self._pattern(name, part)

    def _pattern(self, name: str, keep: Tensor) -> Pattern:
        shape, (units, along) = self._shapes[name], self._units[name]
        lines = keep.repeat_interleave(shape[along] // units).nonzero().squeeze(1).to(self._device)
        across = torch.arange(shape[1 - along], device=lines.device)
        row, column = (lines[:, None], across) if along == 0 else (across[:, None], lines)
        return Pattern.from_indices((row * shape[1] + column).reshape(-1), shape, tile=self._tile)


def closest(score: Tensor, size: Tensor, k: int) -> Tensor:
    """bool: the largest scores, taken in turn as long as that brings the sum of their sizes closer to k.

    Ties go to the lower position.
    """
    order = torch.argsort(score, descending=True, stable=True)
    after = size[order].cumsum(0)
    keep = torch.zeros(len(score), dtype=torch.bool)
    keep[order[(after - k).abs() < (after - size[order] - k).abs()]] = True
    return keep


def _largest(mass: Tensor, count: int) -> Tensor:
    """Ascending positions of the largest; ties to the lower."""
    return mass.argsort(descending=True, stable=True)[:count].sort().values


def _lengths(size: int, edge: int) -> Tensor:
    """How many of 0..size-1 each stretch of `edge` holds."""
    return torch.bincount(torch.arange(size) // edge)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[:, None] * columns


def _sum_lines(matrix: Tensor, edge: int) -> Tensor:
    """[blocks, columns] in fp64: the sums of every `edge` rows."""
    number = torch.arange(len(matrix)) // edge
    return torch.zeros(int(number[-1]) + 1, matrix.shape[1], dtype=torch.float64).index_add_(0, number, matrix.double())
