"""select_topk: the exact k largest of any number of scores, in two reads of them, sorted, ties to the lower position.

The order of |x| is the order of its bits as an integer: the key. Every program owns one contiguous stretch of scores.

    count   each program counts its keys by their leading 15 bits, in a histogram of its own
    choose  the sum of the histograms tells in which bin the k-th largest key lies
    gather  each program walks its stretch again, in order, and writes the positions of the keys above that bin, and
            of those inside it, to places that follow from the histograms: no program waits for another
    settle  the few keys inside the bin are ranked by their remaining bits, and the two lists merged

bf16 and fp16 keys have 15 bits: a bin is one value, nothing is left to rank. Where a bin of wider keys holds very many
of them (equal scores), their next bits are counted first, at the price of another read.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from sparseft.kernels.launch import on, processors
from torch import Tensor

BITS = 15  # of a key, told apart by one histogram
BINS = 1 << BITS
BLOCK = 4096
FEW = 1 << 20  # keys of one bin (or k of them) that are ranked outside the kernels
LARGE = 1 << 24  # scores from which on a sample of one block in SAMPLE tells which keys need no counting
SAMPLE = 256


@triton.jit
def _key(score, other, begin, at, mask):
    """The bits of |score[at] * other[begin + at]|, or of |score[at]|, as an integer; its sign bit is zero."""
    x = tl.load(score + at, mask=mask)
    if other is not None:
        wide: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
        x = x.to(wide) * tl.load(other + begin + at, mask=mask).to(wide)
    if x.dtype == tl.float64:
        key = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    elif x.dtype == tl.float32:
        key = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        key = x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    return key


@triton.jit
def _segment(table, number, ALIGN: tl.constexpr):
    """Where a segment's scores and others start, its first position in the joined scores, and its length."""
    record = table + 4 * number
    return (tl.multiple_of(tl.load(record), ALIGN), tl.multiple_of(tl.load(record + 1), ALIGN),
            tl.load(record + 2), tl.load(record + 3))  # fmt: skip


@triton.jit
def _tally(histogram, key, mask, bound, lowest, shift, BITS: tl.constexpr):
    """Count the keys that begin with `bound` by the BITS bits that follow, unless these are below `lowest`."""
    digit = ((key >> shift) & ((1 << BITS) - 1)).to(tl.int32)
    tl.atomic_add(histogram + digit, 1, mask=mask & (key >> shift >> BITS == bound) & (digit >= lowest), sem="relaxed")


@triton.jit(do_not_specialize=["bound", "lowest", "shift"])
def _count(score, other, table, first, histograms, bound, lowest, shift,
           BITS: tl.constexpr, BINS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
           ALIGN: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    histogram = histograms + program.to(tl.int64) * BINS
    lane = tl.arange(0, BLOCK)
    for number in range(tl.load(first + program), tl.load(first + program + 1)):
        x, y, _, length = _segment(table, number, ALIGN)
        whole = length // BLOCK * BLOCK  # unmasked: 128-bit loads
        for start in range(0, whole, STEP * BLOCK):
            _tally(histogram, _key(score + x, other, y, start + lane, None), lane >= 0, bound, lowest, shift, BITS)
        if whole < length:
            mask = whole + lane < length
            _tally(histogram, _key(score + x, other, y, whole + lane, mask), mask, bound, lowest, shift, BITS)


@triton.jit
def _emit(key, mask, position, above, inside, rest, before_above, before_inside, bound, limit, shift):
    """Write the positions of one block's keys that are chosen or still in question; returns the counts so far."""
    head = key >> shift
    is_above = mask & (head > bound)
    is_inside = mask & (head == bound)
    both = is_above.to(tl.int32) * 65536 + is_inside.to(tl.int32)  # two prefix sums in one
    rank = tl.cumsum(both, 0) - both
    count = tl.sum(both, 0)
    tl.store(above + before_above + (rank >> 16), position, mask=is_above)
    rank &= 0xFFFF
    is_inside &= rank < tl.minimum(limit - before_inside, 65536).to(tl.int32)
    tl.store(inside + before_inside + rank, position, mask=is_inside)
    if rest is not None:
        tl.store(rest + before_inside + rank, key - (head << shift), mask=is_inside)
    return before_above + (count >> 16), before_inside + (count & 0xFFFF)


@triton.jit(do_not_specialize=["bound", "limit", "shift"])
def _gather(score, other, table, first, starts, above, inside, rest, bound, limit, shift,
            BLOCK: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    before_above = tl.load(starts + 2 * program)
    before_inside = tl.load(starts + 2 * program + 1)
    lane = tl.arange(0, BLOCK)
    for number in range(tl.load(first + program), tl.load(first + program + 1)):
        x, y, position, length = _segment(table, number, ALIGN)
        whole = length // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            key = _key(score + x, other, y, start + lane, None)
            before_above, before_inside = _emit(key, lane >= 0, position + start + lane, above, inside, rest,
                                                before_above, before_inside, bound, limit, shift)  # fmt: skip
        if whole < length:
            mask = whole + lane < length
            key = _key(score + x, other, y, whole + lane, mask)
            before_above, before_inside = _emit(key, mask, position + whole + lane, above, inside, rest,
                                                before_above, before_inside, bound, limit, shift)  # fmt: skip


class Stretches(NamedTuple):
    """The joined scores, cut into one contiguous stretch per program and those into segments of one tensor each."""

    score: Tensor  # the first tensor: all others are found from its address
    other: Tensor | None
    table: Tensor  # int64 [segments, 4]: start in scores and in others, elements from the first; position; length
    first: Tensor  # int32 [programs + 1]: each program's first segment
    align: int  # elements; what every segment's start is a multiple of


def _cut(scores: list[Tensor], others: list[Tensor]) -> Stretches:
    size, device = scores[0].element_size(), scores[0].device
    lengths = torch.tensor([s.numel() for s in scores])
    blocks = -(-lengths // BLOCK)
    ends = blocks.cumsum(0)
    total = int(ends[-1])
    programs = min(total, max(4 * processors(device), int(lengths.sum() >> 30)))  # a histogram's counts are int32
    borders = torch.arange(programs + 1) * total // programs
    starts = torch.unique(torch.cat([borders[:-1], ends - blocks]))  # segments begin with a program or with a tensor
    tensor = torch.searchsorted(ends, starts, right=True)
    within = (starts - (ends - blocks)[tensor]) * BLOCK
    length = torch.minimum((torch.cat([starts[1:], ends[-1:]]) - starts) * BLOCK, lengths[tensor] - within)
    position = (lengths.cumsum(0) - lengths)[tensor] + within
    columns, aligned = [], all(t[0].data_ptr() % 16 == 0 for t in (scores, others) if t)
    for several in (scores, others or scores):
        distance = torch.tensor([(t.data_ptr() - several[0].data_ptr()) // size for t in several])
        aligned &= bool((distance % 16 == 0).all())
        columns.append(distance[tensor] + within)
    table = torch.stack([*columns, position, length], 1).to(device)
    first = torch.searchsorted(starts, borders).to(device, torch.int32)
    return Stretches(scores[0], others[0] if others else None, table, first, 16 if aligned else 1)


def select_topk(scores, others, k, score):
    """See `reference.select_topk`. Waits for the device twice: which bin it is decides what to launch next."""
    device = scores[0].device
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    filled = [i for i, s in enumerate(scores) if s.numel()]
    with on(scores[0]):
        s = _cut([scores[i] for i in filled], [others[i] for i in filled] if score == "product" else [])
        return _select(s, k, sum(x.numel() for x in scores))


def _select(s: Stretches, k: int, n: int) -> Tensor:
    dtype = s.score.dtype if s.other is None else torch.promote_types(s.score.dtype, torch.float32)
    lowest = _estimate(s, k, 8 * dtype.itemsize - 1 - BITS) if n >= LARGE else 0
    shift, bound, need = 8 * dtype.itemsize - 1, 0, k  # bits not looked at yet; the k-th key's bits before them
    above = 0  # [programs], keys that are larger for sure
    while True:
        bits = min(BITS, shift)
        histograms = _histograms(s, bound, lowest, shift - bits, bits)
        place, larger, inside = _bin(histograms, need)
        if place < 0:  # the sample had promised more large keys than there are
            lowest = 0
            continue
        shift, lowest = shift - bits, 0
        above = above + histograms[:, place + 1 :].sum(1)
        bound, need = bound << bits | place, need - larger
        if shift == 0 or inside <= max(k, FEW):
            break
    counts = torch.stack([above, histograms[:, place]], 1)
    starts = counts.cumsum(0) - counts
    limit = inside if shift else need
    chosen = torch.empty(k - need, dtype=torch.int64, device=s.score.device)
    open_ = torch.empty(limit, dtype=torch.int64, device=s.score.device)
    # about 16 bytes a thread: a whole BLOCK of positions would spill registers
    block = BLOCK // (8 if s.align == 1 else 4 if s.score.element_size() > 2 else 2)
    rest = torch.empty(limit, dtype=torch.int64 if dtype.itemsize == 8 else torch.int32, device=s.score.device)
    _gather[(len(s.first) - 1,)](
        s.score, s.other, s.table, s.first, starts, chosen, open_, rest if shift else None, bound, limit, shift,
        BLOCK=block, ALIGN=s.align, num_warps=8,
    )  # fmt: skip
    if shift:
        open_ = open_[rest.argsort(descending=True, stable=True)[:need]].sort().values
    return _merge(chosen, open_)


def _histograms(s: Stretches, bound: int, lowest: int, shift: int, bits: int, step: int = 1) -> Tensor:
    """int32 [programs, BINS]: the keys that begin with `bound`, by the `bits` bits that follow it, from `shift` on."""
    programs = len(s.first) - 1
    histograms = torch.zeros(programs, BINS, dtype=torch.int32, device=s.score.device)
    _count[(programs,)](s.score, s.other, s.table, s.first, histograms, bound, lowest, shift,
                        BITS=bits, BINS=BINS, STEP=step, BLOCK=BLOCK, ALIGN=s.align, num_warps=8)  # fmt: skip
    return histograms


def _bin(histograms: Tensor, rank: int) -> tuple[int, int, int]:
    """The bin of the rank-th largest key (-1: there are fewer), how many keys lie above it and how many inside."""
    total = histograms.sum(0).flip(0)
    up_to = total.cumsum(0)
    at = torch.searchsorted(up_to, rank).clamp(max=BINS - 1)
    place, reached, inside = torch.stack([BINS - 1 - at, up_to[at], total[at]]).tolist()
    return (place if reached >= rank else -1), reached - inside, inside


def _estimate(s: Stretches, k: int, shift: int) -> int:
    """A bin that the k-th largest key is very likely not below."""
    expected = k / SAMPLE
    return max(_bin(_histograms(s, 0, 0, shift, BITS, SAMPLE), int(1.25 * expected + 8 * expected**0.5 + 64))[0], 0)


def _merge(a: Tensor, b: Tensor) -> Tensor:
    """Two ascending lists without common elements as one: an element's place is its rank in both."""
    out = a.new_empty(len(a) + len(b))
    for mine, other in ((a, b), (b, a)):
        out[torch.searchsorted(other, mine) + torch.arange(len(mine), device=mine.device)] = mine
    return out
