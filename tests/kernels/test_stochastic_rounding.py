"""sparse_adamw_ without master values: its random bits, its rounding bit for bit, and that it is right on average."""

import math

import numpy
import pytest
import torch
from torch import Tensor

from sparseft import reference

from .table import (
    ALL,
    SMALLEST,
    UNIT,
    Case,
    Entries,
    assert_same_bits,
    assert_within,
    bits,
    by_dtype,
    entries,
    rounded,
    special,
    threads_set,
)
from .test_sparse_adamw import Held, call, copied, oracle, place, start

OPERATION = "sparse_adamw_"
HALVES = (torch.bfloat16, torch.float16)
SEED = 2**40 + 7
SMALL = [p for p in by_dtype(ALL) if p.values[1] in HALVES and not p.values[0].large]


def splitmix64(seed: int | numpy.ndarray, number: numpy.ndarray) -> numpy.ndarray:
    """Output `number` of the generator, after Vigna's splitmix64.c: the state advances before each output."""
    z = numpy.asarray(seed, numpy.uint64) + numpy.asarray(number, numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return z ^ (z >> numpy.uint64(31))


def drawn(e: Entries, step: Tensor, seed: int) -> Tensor:
    """int64 [k], the 16 random bits of every entry."""
    key = splitmix64(seed, step[e.layer].numpy())
    return torch.from_numpy((splitmix64(key, numpy.arange(len(e))) >> numpy.uint64(48)).astype(numpy.int64))


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of fp64 numbers: the next number of `dtype` towards zero, the one after it, and the part between, in spacings."""
    digits = 8 if dtype == torch.bfloat16 else 11
    exponent = torch.frexp(x.abs())[1].double() - digits
    spacing = torch.maximum(2.0**exponent, torch.tensor(SMALLEST[dtype], dtype=torch.float64))
    whole = (x.abs() / spacing).floor()
    low, high = whole * spacing, (whole + 1) * spacing
    high[high > torch.finfo(dtype).max] = math.inf
    return low.copysign(x), high.copysign(x), x.abs() / spacing - whole


def expected(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """The definition, in fp64: away from zero if floor(2^16 * part) + random >= 2^16."""
    low, high, part = neighbours(x, dtype)
    up = (part * 2.0**16).floor() + random >= 2**16
    return torch.where(up, high, low).to(dtype)


def without_masters(e: Entries, dtype: torch.dtype) -> dict:
    a = start(e, dtype)
    return a | {"values": rounded(a["values"], dtype), "seed": SEED}


def test_the_generator_is_splitmix64():
    """Its published outputs for seed 1234567, and the reference's 16 bits."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert splitmix64(1234567, numpy.arange(1, 6)).tolist() == known
    entry, step = torch.arange(1000), torch.full((1000,), 3)
    want = splitmix64(splitmix64(SEED, step.numpy()), entry.numpy()) >> numpy.uint64(48)
    assert reference.random_bits(SEED, step, entry).tolist() == want.tolist()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_reference_rounds_as_defined(dtype):
    """Every exponent, both signs, parts from nothing to all but one; and what is not finite."""
    rng = numpy.random.default_rng(0)
    x = rounded(torch.from_numpy(rng.standard_normal(200_000) * 2.0 ** rng.integers(-148, 127, 200_000)), torch.float32)
    x = torch.cat([x, special(dtype).float(), torch.tensor([65504.0, 65519.0, 65520.0, 65535.9, 3.3960e38])])
    x = x[x.abs() <= torch.finfo(dtype).max * (1 + 2 * torch.finfo(dtype).eps)]
    random = torch.from_numpy(rng.integers(0, 2**16, len(x)))
    for bits16 in (random, torch.zeros_like(random), torch.full_like(random, 2**16 - 1)):
        assert_same_bits(reference.round_stochastically(x, dtype, bits16), expected(x.double(), dtype, bits16))
    odd = torch.tensor([math.inf, -math.inf, math.nan])
    out = reference.round_stochastically(odd, dtype, torch.full((3,), 2**16 - 1))
    assert out[:2].tolist() == [math.inf, -math.inf] and out[2].isnan()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_mean_over_all_random_bits_is_the_number(dtype):
    """Not a sample: all 2^16 of them. The parts of fp32 numbers are multiples of 2^-16, so the mean is exact."""
    for x in (1.1, -0.3, 1000.7, 2.0**-13 * 1.37):
        number = torch.full((2**16,), x)
        out = reference.round_stochastically(number, dtype, torch.arange(2**16))
        assert out.double().mean() == number[0].double()


@pytest.mark.parametrize("decay", [2.0**-2, 2.0**-9, 2.0**-12])
@pytest.mark.parametrize(("case", "dtype"), SMALL)
def test_bit_for_bit(implementation, memory, case, dtype, decay):
    """A step of weight decay alone is exact in fp32: there every implementation must round to the same bits."""
    e = entries(case)
    a = without_masters(e, dtype)
    odd = special(dtype)
    odd = odd[odd.abs() < math.inf]
    a["values"][: len(odd)] = rounded(odd, dtype)[: len(e)]
    a |= {name: torch.zeros_like(a[name]) for name in ("grad", "exp_avg", "exp_avg_sq")}
    a |= {"lr": torch.tensor(0.5), "weight_decay": 2 * decay}
    placed = place(a, memory.put)
    call(implementation, placed)
    memory.check()
    w = a["values"].double()
    want = torch.where(e.present, expected(w - decay * w + 0.0, dtype, drawn(e, a["step"], SEED)), a["values"])
    assert_same_bits(placed["values"], want)
    for layer, (got, before) in enumerate(zip(placed["weights"], a["weights"], strict=True)):
        mine, now = (e.layer == layer) & e.present, before.clone()
        now[e.row[mine], e.col[mine]] = want[mine]
        assert_same_bits(got, now, f"weight {layer}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_whole_step(implementation, memory, dtype):
    """Moments within their bounds; values one of the exact result's two neighbours, and the same in the weights."""
    e = entries(Case("layers", ((13, 7), (64, 64), (1, 33), (31, 2), (65, 130)), (16, 16), 0.3, absent=0.2))
    a = without_masters(e, dtype) | {"weight_decay": 0.1, "grad_scale": torch.tensor(0.7), "maximize": True}
    a |= {"base": rounded(a["values"] * 0.5, dtype), "found_inf": torch.tensor(0.0)}
    placed, plain = place(a, memory.put), copied(a)
    call(implementation, placed)
    memory.check()
    call(reference.sparse_adamw_, plain)
    exact, bounds = oracle(e, a | {"values": a["values"].float()})
    here = e.present
    for name in ("exp_avg", "exp_avg_sq"):
        assert_within(placed[name].cpu()[here], exact[name][here], bounds[name][here], name)
    for who in (placed, plain):
        got, x, slack = who["values"].cpu().double()[here], exact["values"][here], bounds["values"][here]
        corners = torch.stack([y for end in (x - slack, x + slack) for y in neighbours(end, dtype)[:2]])
        assert ((corners.amin(0) <= got) & (got <= corners.amax(0))).all()
    for layer, weight in enumerate(placed["weights"]):
        mine = (e.layer == layer) & here
        assert_same_bits(weight.cpu()[e.row[mine], e.col[mine]], placed["values"].cpu()[mine], f"weight {layer}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_steps_too_small_for_the_dtype_add_up(implementation, dtype):
    """16 updates of 1/16 of a spacing, from 1 downwards (rounding to nearest would not move): on average one spacing.

    Betas and eps of zero make the update exactly lr. The differences of a step from its expectation lie within one
    spacing u and are uncorrelated from step to step; by the Azuma-Hoeffding inequality the mean of N entries after n
    steps is off by more than u sqrt(n log(2 / p) / (2 N)) with a probability of at most p.
    """
    e, n = entries(Case("full", ((64, 64),), (64, 64), "full")), 16
    spacing = UNIT[dtype]  # of the numbers below 1
    zero, one = torch.zeros(len(e)), torch.ones(len(e))
    a = without_masters(e, dtype) | {"values": one.to(dtype), "grad": one, "exp_avg": zero, "exp_avg_sq": zero.clone()}
    a |= {"lr": torch.tensor(spacing / n), "betas": (0.0, 0.0), "eps": 0.0}
    placed = place(a, Held(implementation.device).put)
    for step in range(1, n + 1):
        placed["step"].fill_(step)
        call(implementation, placed)
    got = placed["values"].cpu().double()
    assert abs(got.mean() - (1 - spacing)) <= spacing * math.sqrt(n * math.log(2 / 1e-12) / (2 * len(e)))
    assert len(got.unique()) > 2, "every entry was rounded alike"


def test_bits_depend_on_seed_and_step_and_nothing_else(implementation):
    """The same on every run and any number of threads; other ones for another seed or step."""
    e = entries(Case("large", ((300, 290), (200, 310)), (64, 64), 0.4))
    runs = []
    for seed, later, threads in ((SEED, 0, 1), (SEED, 0, 2), (SEED + 1, 0, 1), (SEED, 1, 1)):
        a = without_masters(e, torch.bfloat16) | {"seed": seed, "weight_decay": 0.5, "lr": torch.tensor(0.25)}
        a |= {name: torch.zeros_like(a[name]) for name in ("grad", "exp_avg", "exp_avg_sq")}
        placed = place(a | {"step": a["step"] + later}, Held(implementation.device).put)
        with threads_set(threads):
            call(implementation, placed)
        runs.append(placed["values"].cpu())
    assert_same_bits(runs[1], runs[0])
    for other in runs[2:]:
        share = (bits(other) != bits(runs[0])).double().mean()
        assert 0.1 < share < 0.5  # of an eighth's three bits cut off, up in half the cases where they are not zero


def test_found_inf_changes_nothing(implementation, memory):
    e = entries(Case("layers", ((13, 7), (64, 64)), (16, 16), 0.3))
    a = without_masters(e, torch.bfloat16) | {"found_inf": torch.tensor(1.0), "weight_decay": 0.1}
    placed = place(a, memory.put)
    call(implementation, placed)
    memory.check()
    for name in ("values", "exp_avg", "exp_avg_sq"):
        assert_same_bits(placed[name], a[name], name)
    for got, before in zip(placed["weights"], a["weights"], strict=True):
        assert_same_bits(got, before, "weight")
