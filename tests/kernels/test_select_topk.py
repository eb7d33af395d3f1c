"""select_topk against a stable sort of the keys by numpy: exact, including which of equal scores is taken."""

import os

import numpy
import pytest
import torch
from torch import Tensor

from sparseft import reference

from .table import FLOATS, SMALLEST, generator, rounded, special, threads_set, wide

OPERATION = "select_topk"
SIZES = (1, 2, 31, 32, 33, 127, 128, 129, 1021, 4095, 4096, 4097, 65537)


def oracle(scores: list[Tensor], others: list[Tensor], k: int, score: str) -> Tensor:
    """Descending by |key|, then ascending by position; the first k, ascending."""
    keys = []
    for i, s in enumerate(scores):
        key = s.reshape(-1).to(wide(s.dtype)).numpy()
        if score == "product":
            key = key * others[i].reshape(-1).to(wide(s.dtype)).numpy()
        keys.append(numpy.abs(key))
    order = numpy.argsort(-numpy.concatenate(keys), kind="stable")
    return torch.from_numpy(numpy.sort(order[:k]))


def check(implementation, scores: list[Tensor], k: int, others: list[Tensor] | None = None) -> None:
    score = "abs" if others is None else "product"
    others = others or []
    on_device = [[t.to(implementation.device) for t in several] for several in (scores, others)]
    got = implementation(*on_device, k, score).cpu()
    assert got.dtype == torch.int64 and got.shape == (k,)
    assert torch.equal(got, oracle(scores, others, k, score))
    if implementation.name != "reference":
        assert torch.equal(got, reference.select_topk(scores, others, k, score))


def counts(n: int) -> list[int]:
    return sorted({0, 1, n // 100, n // 2, max(n - 1, 0), n} & set(range(n + 1)))


def distribution(name: str, n: int, dtype: torch.dtype) -> Tensor:
    """[n] scores of a named kind."""
    rng = generator(name, n)
    sign = rng.choice([-1.0, 1.0], n)
    kinds = {
        "normal": lambda: rng.standard_normal(n),
        "wide_range": lambda: sign * 2.0 ** rng.uniform(-14, 14, n),
        "ties": lambda: sign * rng.integers(0, 4, n),
        "all_equal": lambda: sign * 0.75,
        "zeros": lambda: sign * 0.0,
        "mostly_zero": lambda: sign * (rng.random(n) < 0.01) * rng.random(n),
        "last_bits": lambda: sign * (1 + rng.integers(0, 64, n) * torch.finfo(dtype).eps),
        "subnormal": lambda: sign * rng.integers(0, 100, n) * SMALLEST[dtype],
        "infinite": lambda: numpy.where(rng.random(n) < 0.1, sign * numpy.inf, rng.standard_normal(n)),
        "special": lambda: rng.choice(special(dtype).numpy(), n),
        "ascending": lambda: numpy.arange(n) / n,
        "descending": lambda: -numpy.arange(n)[::-1] / n,
    }
    return rounded(torch.from_numpy(numpy.asarray(kinds[name]())), dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_sizes(implementation, n, dtype):
    for k in counts(n):
        check(implementation, [distribution("normal", n, dtype)], k)


KINDS = (
    "wide_range", "ties", "all_equal", "zeros", "mostly_zero", "last_bits", "subnormal", "infinite", "special",
    "ascending", "descending",
)  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_distributions(implementation, kind, dtype):
    scores = distribution(kind, 3001, dtype)
    for k in counts(len(scores)):
        check(implementation, [scores], k)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "all_equal"])
def test_several_tensors(implementation, kind, dtype):
    """Positions count through all tensors; ties cross their borders; empty tensors take no part."""
    scores = distribution(kind, 1200, dtype)
    several = [scores[:1], scores[1:1].view(0, 4), scores[1:301].view(3, 100), scores[301:], scores[:0]]
    for k in counts(1200):
        check(implementation, several, k)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "all_equal", "wide_range"])
def test_product(implementation, kind, dtype):
    """|score * other| in fp32 (fp64): small numbers do not underflow in the scores' own dtype."""
    n = 2003
    small = 2.0**-60 if dtype in (torch.bfloat16, torch.float64) else 2.0**-10
    scores, others = distribution(kind, n, dtype), distribution("normal", n, dtype) * small
    for k in counts(n):
        check(implementation, [scores[:700], scores[700:]], k, [others[:700], others[700:]])


def sampled(n: int) -> numpy.ndarray:
    """The positions that csrc/cpu/select_topk.cpp looks at first to guess what the k-th largest will be."""
    count = 1 << 16
    stride, i = n // count, numpy.arange(count, dtype=numpy.uint64)
    random = (i + 1) * numpy.uint64(0x9E3779B97F4A7C15) >> numpy.uint64(32)
    return (i * numpy.uint64(stride) + random % numpy.uint64(stride)).astype(numpy.int64)


MANY = ("normal", "uneven", "sample too large", "sample too small", "sample too small in a third", "many ties")


def many(name: str, n: int) -> numpy.ndarray:
    """[n] scores, enough of them for a sample."""
    scores = generator(name, n).standard_normal(n)
    if name == "uneven":
        scores[: n // 3] *= 100
    if name == "sample too large":  # fewer than k scores reach its guess
        scores[sampled(n)[::40]] += 100
    if name == "sample too small in a third":
        third = numpy.arange(n // 3, 2 * n // 3)
        scores[numpy.setdiff1d(third, sampled(n))[::7]] += 4
    if name == "sample too small":  # nearly all reach it
        scores[:] = numpy.abs(scores) + 1
        scores[sampled(n)] -= 1
    if name == "many ties":
        scores = numpy.round(scores)
    return scores


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", MANY)
def test_many(implementation, kind, dtype):
    """So many that a sample is worth its while, in tensors that no thread's part ends with."""
    if implementation.device == "cpu" and implementation.name != "cpu":
        pytest.skip("the reference takes no sample, and Triton's interpreter would take minutes")
    n = (1 << 20) + 77
    scores = rounded(torch.from_numpy(many(kind, n)), dtype)
    several = [scores[:5], scores[5 : n // 3], scores[n // 3 :]]
    check(implementation, several, n // 100, [torch.full_like(s, 0.5) for s in several])
    for k in (1, n // 1000, n // 100, n // 3):
        expected = oracle(several, [], k, "abs")
        for threads in (1, 2, 3):
            with threads_set(threads):
                got = implementation([s.to(implementation.device) for s in several], [], k, "abs")
            assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing(implementation, dtype):
    check(implementation, [torch.zeros(0, dtype=dtype)], 0)
    check(implementation, [torch.zeros(0, 3, dtype=dtype), torch.zeros(0, dtype=dtype)], 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number(implementation, dtype):
    """All values of the dtype but NaN: ordered by magnitude, x and -x by position."""
    scores = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    scores = scores[~scores.isnan()]
    for k in counts(len(scores)):
        check(implementation, [scores], k)


def test_same_positions_on_every_run(implementation):
    scores = distribution("ties", 100_003, torch.float32).to(implementation.device)
    runs = []
    for threads in (1, 2, 2):
        with threads_set(threads):
            runs.append(implementation([scores], [], 12_345, "abs"))
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tensors_far_apart(implementation, dtype):
    """Their addresses differ by more than 2^31 elements (virtual memory: only the tensors' pages are touched)."""
    far = 2**31 + 129
    space = torch.empty(far + 5000, dtype=dtype, device=implementation.device)
    scores = [distribution("ties", n, dtype) for n in (777, 4500)]
    placed = [space[:777], space[far : far + 4500]]
    for place, source in zip(placed, scores, strict=True):
        place.copy_(source)
    for several, source in ((placed, scores), (placed[::-1], scores[::-1])):
        for k in (1, 1000, 5277):
            assert torch.equal(implementation(several, [], k, "abs").cpu(), oracle(source, [], k, "abs"))


@pytest.mark.slow
def test_more_than_2_31_scores(implementation):
    """2^31 + 1001 scores: 128 copies of 2^24 normal numbers and a tail, so that ties cross every border."""
    name, on_cpu = implementation.name, implementation.device == "cpu"
    if on_cpu and name != "cpu":
        pytest.skip(f"{name} would take hours or 60 GB for 2^31 scores on a CPU")
    if os.environ.get("SPARSEFT_LARGE") != "1":
        pytest.skip("takes 6 GB and a minute: set SPARSEFT_LARGE=1")
    if on_cpu and (free := os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) < 6 << 30:
        pytest.skip(f"needs 6 GB of free memory, there are {free / 2**30:.1f}")
    m, copies, k = 1 << 24, 128, 1_000_003
    chunk, tail = (distribution("normal", n, torch.bfloat16) for n in (m, 1001))
    tail[-1] = 100.0
    scores = torch.empty(copies * m + len(tail), dtype=torch.bfloat16, device=implementation.device)
    scores[: copies * m].view(copies, m)[:] = chunk.to(implementation.device)
    scores[copies * m :] = tail
    got = implementation([scores], [], k, "abs").cpu()
    keys, last = (x.view(torch.int16).numpy() & 0x7FFF for x in (chunk, tail))
    count = copies * numpy.bincount(keys, minlength=2**15) + numpy.bincount(last, minlength=2**15)
    at_least = count[::-1].cumsum()[::-1]  # keys of at least each value
    threshold = int((at_least >= k).nonzero()[0][-1])

    def places(condition) -> numpy.ndarray:
        inside = numpy.arange(copies)[:, None] * m + condition(keys).nonzero()[0]
        return numpy.concatenate([inside.ravel(), copies * m + condition(last).nonzero()[0]])

    above, equal = places(lambda x: x > threshold), places(lambda x: x == threshold)
    want = numpy.sort(numpy.concatenate([above, equal[: k - len(above)]]))
    assert want[-1] > 2**31 and len(equal) > k - len(above) > 0
    assert torch.equal(got, torch.from_numpy(want))
