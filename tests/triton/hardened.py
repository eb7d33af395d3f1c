"""Triton's interpreter, made strict: it computes what a GPU computes and refuses what a GPU would silently corrupt.

Import it before any kernel module. The stock interpreter (triton 3.6 to 3.9) computes bf16 wrongly, checks no bounds
and runs programs in order, which hides races. Here, in every launch:

    bf16 is bf16 (ml_dtypes); a "tf32" product rounds its fp32 operands to tf32, a "tf32x3" one sums three of these
    an access outside the tensors of the launch, or a misaligned one, raises IndexError
    lanes that a load masks out without giving `other` hold NaN (or a huge integer), not zero
    a false `tl.multiple_of` raises, and so does a store that writes one address from two lanes
    programs run in a shuffled order; memory that one program writes and another one touches raises (a race)
    so does memory that a program stores and touches again without a barrier: its threads do not wait for each other
    an atomic operation on floats raises: the order of the programs would show in its bits
    the bytes moved are counted, per launch and per argument

Tensors that a kernel reaches through a table of addresses are announced with `reachable`.
"""

import inspect
import os

os.environ["TRITON_INTERPRET"] = "1"

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

if not isinstance(tl.zeros, interpreter.InterpretedFunction):
    raise ImportError("triton was imported before TRITON_INTERPRET=1 was set: import tests.triton.hardened earlier")

Builder = interpreter.InterpreterBuilder
BF16 = np.dtype(ml_dtypes.bfloat16)
NATIVE = (tl.float16, tl.float32, tl.float64, tl.bfloat16)
SECTOR = 32  # bytes: what memory moves at least

seed = 0  # of the programs' order


# ---- what was moved -------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """Bytes of one argument in one launch."""

    requested: int = 0  # by all lanes of all programs
    sectors: int = 0  # in distinct 32-byte sectors of each program: what passes its first-level cache
    distinct: int = 0  # at distinct addresses in the whole launch


@dataclass
class Launch:
    """What one launch did to each argument; stores and loads apart. Arguments are named as in the kernel."""

    kernel: str
    programs: int
    loads: dict[str, Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    stores: dict[str, Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    rewritten: set[str] = field(default_factory=set)
    """Where a program stored what it had loaded, without a barrier: right if the new value depends on the old one."""

    def total(self, measure: str = "requested") -> int:
        return sum(getattr(t, measure) for t in [*self.loads.values(), *self.stores.values()])


_recorded: list[Launch] | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches inside the with block, with their traffic."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


# ---- memory: bounds, alignment, races -------------------------------------------------------------------------

_reachable: list[torch.Tensor] = []


def reachable(tensors: Sequence[torch.Tensor]) -> None:
    """Tensors that the next launches reach through addresses in a table, until the next call."""
    _reachable[:] = tensors


class Memory:
    """The memory of the running launch, and who touched what."""

    def __init__(self, kernel: str, arguments: dict[str, object]):
        named = [(name, t) for name, t in arguments.items() if isinstance(t, torch.Tensor)]
        named += [("reachable", t) for t in _reachable]
        spans = sorted((*_extent(t), name) for name, t in named if t.numel())
        self.kernel, self.program = kernel, 0
        self.first = np.array([s[0] for s in spans], np.uint64)
        self.end = np.maximum.accumulate(np.array([s[1] for s in spans], np.uint64)) if spans else self.first
        self.names = [s[2] for s in spans]
        self.log: list[tuple[str, int, np.ndarray, int, int]] = []  # kind, argument, addresses, size, program
        self.rewritten: set[str] = set()
        self.meet()

    def meet(self) -> None:
        """All threads of a program reach a barrier, or its beginning."""
        self.recent: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)  # addresses by kind and argument

    def access(self, kind: str, pointers: TensorHandle, mask: TensorHandle | None) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at = pointers.data.ravel()
        if mask is not None:
            at = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
            at = at[np.broadcast_to(mask.data, at.shape)]
        if not at.size:
            return
        where = np.searchsorted(self.first, at, side="right") - 1
        bad = (where < 0) | (at + np.uint64(size) > self.end[where]) if len(self.first) else np.ones(at.shape, bool)
        if bad.any():
            raise IndexError(f"{self.kernel}: {kind} out of bounds, {int(bad.sum())} of {at.size} lanes")
        if (at % np.uint64(size)).any():
            raise IndexError(f"{self.kernel}: misaligned {kind}")
        if kind == "store" and np.unique(at).size != at.size:
            raise RuntimeError(f"{self.kernel}: one store writes an address from several lanes")
        for argument in np.unique(where):
            self.log.append((kind, int(argument), at[where == argument], size, self.program))
            self._order(*self.log[-1][:3])

    def _order(self, kind: str, argument: int, at: np.ndarray) -> None:
        """Without a barrier, another thread of the program may not have done yet what the code did before."""

        def touched(before: str) -> bool:
            return any(np.isin(at, addresses).any() for addresses in self.recent[before, argument])

        if touched("store"):
            raise RuntimeError(
                f"{self.kernel}: a program {kind}s what it stored, without a barrier: {self.names[argument]!r}"
            )
        if kind == "store" and touched("load"):
            self.rewritten.add(self.names[argument])
        self.recent[kind, argument].append(at)

    def check_races(self) -> None:
        touched = defaultdict(list)
        for kind, argument, at, _, program in self.log:
            touched[argument].append((kind, np.unique(at), program))
        for argument, accesses in touched.items():
            for writing in ("store", "atomic"):
                written = [(at, program) for kind, at, program in accesses if kind == writing]
                if not written:
                    continue
                at = np.concatenate([a for a, _ in written])
                by = np.concatenate([np.full(a.size, p) for a, p in written])
                order = np.lexsort((by, at))
                at, by = at[order], by[order]
                if writing == "store":
                    twice = (at[1:] == at[:-1]) & (by[1:] != by[:-1])
                    self._refuse(twice, argument, "two programs store the same address")
                for kind, a, program in accesses:
                    if kind != writing:
                        first = np.minimum(np.searchsorted(at, a), at.size - 1)
                        last = np.searchsorted(at, a, side="right") - 1
                        other = (by[first] != program) | (by[last] != program)
                        self._refuse((at[first] == a) & other, argument,
                                     f"one program {kind}s what another one {writing}s")  # fmt: skip

    def _refuse(self, wrong: np.ndarray, argument: int, what: str) -> None:
        if wrong.any():
            raise RuntimeError(f"{self.kernel}: race on {self.names[argument]!r}: {what}, {int(wrong.sum())} addresses")

    def record(self, launch: Launch) -> None:
        """Add up the log; atomics count as stores."""
        parts = defaultdict(list)  # (stored?, argument) -> accesses
        for kind, argument, at, size, program in self.log:
            parts[kind != "load", argument].append((at, size, program))
        for (stored, argument), accesses in parts.items():
            traffic = (launch.stores if stored else launch.loads)[self.names[argument]]
            size = accesses[0][1]
            programs = defaultdict(list)
            for at, _, program in accesses:
                programs[program].append(at)
            lists = {program: np.concatenate(ats) for program, ats in programs.items()}
            traffic.requested += size * sum(at.size for at in lists.values())
            traffic.sectors += SECTOR * sum(np.unique(at // np.uint64(SECTOR)).size for at in lists.values())
            traffic.distinct += size * np.unique(np.concatenate(list(lists.values()))).size


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and the one after the last, of the view itself, not of its storage."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


_memory = Memory("", {})


class Grid(interpreter.GridExecutor):
    """A launch: its memory is known before it, its races and traffic are examined after it."""

    def __call__(self, *args, **kwargs):
        global _memory
        names = [n for n in self.arg_names if n not in kwargs]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        _memory = Memory(self.fn.__name__, arguments)
        types = inspect.get_annotations(self.fn)
        arguments = {n: _scalar(x, types.get(n)) if type(x) is float else x for n, x in arguments.items()}
        with np.errstate(all="ignore"):
            super().__call__(**arguments)
        _memory.check_races()
        if _recorded is not None:
            launch = Launch(self.fn.__name__, int(np.prod(interpreter.interpreter_builder.grid_dim)))
            launch.rewritten = _memory.rewritten
            _memory.record(launch)
            _recorded.append(launch)


interpreter.GridExecutor = Grid


class Unpatched:
    """Stands for what a launch would restore."""

    def restore(self) -> None:
        pass


_patch_lang = interpreter._patch_lang
_patched: set[str] = set()


def patch_lang(function) -> Unpatched:
    """Make the language that a kernel's module sees the interpreter's; once and for good: the stock code does it, at
    3 ms, for every launch and for every call inside a kernel."""
    if function.__module__ not in _patched:
        _patched.add(function.__module__)
        _patch_lang(function)
        tl.tensor.__index__ = lambda self: self.handle.data.item()  # triton 3.6 fails at it beside numpy 2.4
    return Unpatched()


interpreter._patch_lang = patch_lang


def _scalar(value: float, annotation: str | None) -> tl.tensor:
    """A float argument as the compiler passes it: fp32, unless annotated tl.float64."""
    dtype = tl.float64 if annotation == "tl.float64" else tl.float32
    return tl.tensor(TensorHandle(np.array([value], _np_dtype(dtype)), dtype), dtype)


_load, _store, _rmw = Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw


def create_masked_load(self, pointers, mask, other, *policy):
    _memory.access("load", pointers, mask)
    dtype = pointers.get_element_ty()
    kind = interpreter._get_np_dtype(dtype)
    if other is None:
        poison = np.nan if dtype.is_floating() else kind == np.bool_ or np.iinfo(kind).max // 3
        other = TensorHandle(np.full(pointers.data.shape, poison, kind), dtype)
    if kind != BF16:
        return _load(self, pointers, mask, other, *policy)
    bits = np.ascontiguousarray(other.data).view(np.uint16)  # the C++ side knows no bf16
    return TensorHandle(interpreter._interpreter.load(pointers.data, mask.data, bits, bits.dtype).view(BF16), dtype)


def create_masked_store(self, pointers, value, mask, *policy):
    _memory.access("store", pointers, mask)
    if value.data.dtype == BF16:
        value = TensorHandle(np.ascontiguousarray(value.data).view(np.uint16), tl.uint16)
    return _store(self, pointers, value, mask, *policy)


def create_atomic_rmw(self, operation, pointers, value, mask, *order):
    if value.dtype.scalar.is_floating():
        raise RuntimeError(f"{_memory.kernel}: an atomic operation on floats: its bits depend on the programs' order")
    _memory.access("atomic", pointers, mask)
    return _rmw(self, operation, pointers, value, mask, *order)


Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
Builder.create_atomic_rmw = create_atomic_rmw
Builder.create_barrier = lambda self: _memory.meet()

_set_grid_dim, _set_grid_idx = Builder.set_grid_dim, Builder.set_grid_idx


def set_grid_dim(self, *shape):
    _set_grid_dim(self, *shape)
    self.order = np.random.default_rng(seed).permutation(int(np.prod(shape)))


def set_grid_idx(self, x, y, z):
    _memory.program = int(self.order[np.ravel_multi_index((x, y, z), self.grid_dim)])
    _memory.meet()
    _set_grid_idx(self, *map(int, np.unravel_index(_memory.program, self.grid_dim)))


Builder.set_grid_dim, Builder.set_grid_idx = set_grid_dim, set_grid_idx

_set_attr = TensorHandle.set_attr


def set_attr(self, key, value):
    if key == "tt.divisibility" and (self.data.ravel()[:1] % value[0]).any():
        raise RuntimeError(f"tl.multiple_of({value}) is false for {self.data.ravel()[0]}")
    _set_attr(self, key, value)


TensorHandle.set_attr = set_attr


# ---- arithmetic -----------------------------------------------------------------------------------------------

_np_dtype, _cast, _convert = interpreter._get_np_dtype, Builder.cast_impl, Builder.create_fp_to_fp
_dot = Builder.create_dot


@cache  # the stock one builds a table at every call
def _scalar_dtype(dtype) -> np.dtype:
    return BF16 if dtype == tl.bfloat16 else _np_dtype(dtype)


def get_np_dtype(dtype):
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _scalar_dtype(scalar)


def cast_impl(self, source, dtype):
    if tl.bfloat16 not in (source.dtype.scalar, dtype.scalar):
        return _cast(self, source, dtype)
    data = source.data.astype(np.float32) if source.data.dtype == np.float64 else source.data
    return TensorHandle(data.astype(get_np_dtype(dtype)), dtype.scalar)


def create_fp_to_fp(self, source, dtype, rounding):
    plain = rounding in (None, interpreter._ir.ROUNDING_MODE.RTNE)
    if plain and source.dtype.scalar in NATIVE and dtype.scalar in NATIVE:
        return cast_impl(self, source, dtype)
    return _convert(self, source, dtype, rounding)


def create_dot(self, a, b, acc, precision, imprecise):
    modes = interpreter._ir.INPUT_PRECISION

    def product(x, y, total):
        return _dot(self, TensorHandle(x, tl.float32), TensorHandle(y, tl.float32), total, modes.IEEE, imprecise)

    if a.data.dtype == BF16:
        return product(a.data.astype(np.float32), b.data.astype(np.float32), acc)
    if a.data.dtype != np.float32 or precision not in (modes.TF32, modes.TF32x3):
        return _dot(self, a, b, acc, precision, imprecise)
    x, y = _tf32(a.data), _tf32(b.data)
    if precision == modes.TF32x3:
        small = product(_tf32(a.data - x), y, TensorHandle(np.zeros_like(acc.data), tl.float32))
        small = product(x, _tf32(b.data - y), small).data
        acc = TensorHandle(acc.data + np.where(np.isnan(small), np.float32(0), small), tl.float32)  # inf - inf
    return product(x, y, acc)


def _tf32(x: np.ndarray) -> np.ndarray:
    """fp32 to nearest with 10 bits of mantissa, ties away from zero, as PTX's cvt.rna.tf32.f32."""
    nearest = ((np.ascontiguousarray(x).view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), nearest, x)


interpreter._get_np_dtype = get_np_dtype
Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot = cast_impl, create_fp_to_fp, create_dot
Builder.create_fp_trunc = Builder.create_fp_ext = lambda self, source, dtype: self.cast_impl(source, dtype)
Builder.get_bf16 = lambda self, value: TensorHandle(np.array([value], BF16), tl.bfloat16)
