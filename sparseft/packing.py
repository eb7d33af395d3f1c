"""A Pattern as a byte string for files: about 1.2 bytes per entry."""

import torch
from torch import Tensor

from sparseft.pattern import Pattern
from sparseft.reference import COL0, ENTRY0, ENTRY1, ROW0


def pack_pattern(pattern: Pattern) -> Tensor:
    """A pattern as a uint8 string: a list of numbers, each in LEB128 (7 bits a byte, the lowest first).

    The numbers: R, the R active rows; C, the C active columns; n, the n active tiles' numbers (row-major in the
    grid of tiles) and their entry counts; the k entries' positions inside their tiles. Tile numbers and positions
    ascend (positions anew in each tile) and are stored as the gap to the one before, which starts at -1; gaps
    and counts are at least 1 and stored less 1.
    """
    tiles = pattern.tiles
    across = -(-max(len(pattern.cols), 1) // pattern.tile[1])
    number = tiles[:, ROW0] // pattern.tile[0] * across + tiles[:, COL0] // pattern.tile[1]
    position = pattern.local.long() & 0xFFFF
    before = position.roll(1)
    before[tiles[:, ENTRY0]] = -1
    parts = []
    for numbers in (pattern.rows, pattern.cols, torch.diff(number, prepend=number.new_tensor([-1])) - 1):
        parts += [torch.tensor([len(numbers)]), numbers.long()]
    return to_leb128(torch.cat([*parts, tiles[:, ENTRY1] - tiles[:, ENTRY0] - 1, position - before - 1]))


def unpack_pattern(data: Tensor, shape: tuple[int, int], tile: tuple[int, int]) -> Pattern:
    """The inverse of `pack_pattern`, validated.

    Raises:
        ValueError: the string is broken or describes no pattern of this shape.
    """
    numbers = from_leb128(data)
    parts = []
    for what in ("rows", "columns", "tiles"):
        count = int(numbers[0]) if len(numbers) else 0
        if not 0 <= count < len(numbers):
            raise ValueError(f"the packed pattern ends before its {what}")
        parts.append(numbers[1 : 1 + count])
        numbers = numbers[1 + count :]
    rows, cols, gaps = parts
    counts, steps = numbers[: len(gaps)] + 1, numbers[len(gaps) :] + 1
    impossible = (counts < 1) | (counts > len(steps))
    if len(counts) < len(gaps) or bool(impossible.any()) or int(counts.sum()) != len(steps):
        raise ValueError(f"the packed pattern's tiles must hold {len(steps)} entries")
    if len(tile) != 2 or min(tile) < 1:
        raise ValueError(f"tile must be two positive sizes, got {tile}")
    end = counts.cumsum(0)
    walked = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    position = walked[1:] - torch.repeat_interleave(walked[end - counts], counts) - 1
    number = (gaps + 1).cumsum(0) - 1
    across = -(-max(len(cols), 1) // tile[1])
    table = [torch.zeros_like(number), number // across * tile[0], number % across * tile[1], end - counts, end]
    for what, part, limit in (("row", rows, shape[0]), ("column", cols, shape[1]), ("position", position, 1 << 16)):
        bad = part[(part < 0) | (part >= limit)]  # before the casts, which would wrap
        if len(bad):
            raise ValueError(f"the packed pattern's {what} {int(bad[0])} must lie in [0, {limit})")
    return Pattern(shape, tile, rows.int(), cols.int(), torch.stack(table, 1), position.to(torch.int16)).validate()


def to_leb128(numbers: Tensor) -> Tensor:
    """Non-negative int64 -> uint8."""
    length = torch.ones_like(numbers)
    for bits in range(7, 63, 7):
        length += numbers >= 1 << bits
    start = length.cumsum(0) - length
    data = torch.empty(int(length.sum()), dtype=torch.uint8)
    for byte in range(int(length.max())):
        there = length > byte
        more = (length[there] > byte + 1).long() << 7
        data[start[there] + byte] = ((numbers[there] >> 7 * byte) & 0x7F | more).to(torch.uint8)
    return data


def from_leb128(data: Tensor) -> Tensor:
    """uint8 -> non-negative int64."""
    if len(data) and data[-1] > 0x7F:
        raise ValueError("the packed pattern ends inside a number")
    end = (data <= 0x7F).nonzero().squeeze(1)
    length = torch.diff(end, prepend=end.new_tensor([-1]))
    if len(length) and int(length.max()) > 9:
        raise ValueError("the packed pattern holds a number of more than 63 bits")
    numbers = torch.zeros_like(end)
    for byte in range(int(length.max()) if len(length) else 0):
        there = length > byte
        numbers[there] |= (data[end[there] - length[there] + 1 + byte].long() & 0x7F) << 7 * byte
    return numbers
