"""Modules that compute what they computed, but keep less of it for the backward pass.

A module whose forward is known to be a certain formula gets a class of its own in front of its class: same object, same
attributes, methods and name, still an instance of its class; only `forward` is another.
"""

import copy
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn


class Lean(nn.Module):
    """Base of the classes in front.

    Attributes:
        _sparseft_plain: the class that the module had, and `_sparseft_forward`, that class's forward, which was probed.
        _sparseft_fixed: what the lean forward needs to know besides.
    """

    _sparseft_plain: type[nn.Module]
    _sparseft_forward: Callable[..., Any]
    _sparseft_fixed: Any

    def __reduce_ex__(self, protocol):  # the class has no place where pickle could find it
        front = next(base for base in type(self).__bases__ if issubclass(base, Lean))
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _rebuild, (front, self._sparseft_plain, self._sparseft_fixed), state


_classes: dict[tuple[type[Lean], type[nn.Module], Callable, Hashable], type[Lean]] = {}


def _lean_class(front: type[Lean], plain: type[nn.Module], fixed: Hashable) -> type[Lean]:
    key = front, plain, plain.forward, fixed
    if key not in _classes:
        _classes[key] = _make_class(front, plain, fixed)
    return _classes[key]


def _make_class(front: type[Lean], plain: type[nn.Module], fixed: Hashable) -> type[Lean]:
    inside = {"_sparseft_plain": plain, "_sparseft_forward": plain.forward, "_sparseft_fixed": fixed}
    inside |= {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(plain.__name__, (front, plain), inside)


def _rebuild(front: type[Lean], plain: type[nn.Module], fixed: Hashable) -> Lean:
    made = _lean_class(front, plain, fixed)
    return made.__new__(made)


def make_lean(module: nn.Module, front: type[Lean], fixed: Hashable) -> None:
    """Put `front` in front of the module's class."""
    object.__setattr__(module, "__class__", _lean_class(front, type(module), fixed))


def restore(module: Lean) -> None:
    """Back to the class that the module had."""
    object.__setattr__(module, "__class__", module._sparseft_plain)


def may_become_lean(module: nn.Module) -> bool:
    """Whether a call runs its class's forward, of one argument, and nobody is in front of it yet."""
    if isinstance(module, Lean | torch.jit.ScriptModule) or "forward" in module.__dict__:
        return False
    own = {name for one in type(module).__mro__ if one not in (nn.Module, object) for name in vars(one)}
    if own & {"__call__", "__init_subclass__", "__reduce__", "__reduce_ex__"}:  # a class in front would get in the way
        return False
    arguments = list(inspect.signature(type(module).forward).parameters.values())
    return len(arguments) == 2 and arguments[1].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def same_in_both_modes(probe: nn.Module, theirs: Callable[[], Any], ours: Callable[[], Tensor]) -> bool:
    """Whether `theirs`, somebody's forward on `probe`, gives the same bits as `ours`, in training and in evaluation,
    and leaves nothing behind on the module."""
    own = vars(nn.Module()).keys()
    for name, value in vars(probe).items():
        if isinstance(value, list | dict | set) and name not in own:
            vars(probe)[name] = copy.copy(value)  # theirs may write to it
    with torch.random.fork_rng(devices=[]):  # ... or draw
        for training in (False, True):
            probe.training = training
            before = _state(probe)
            try:
                found = theirs()
            except Exception:  # somebody else's code, which may want other shapes: whatever it raises, it stays
                return False
            if not (isinstance(found, Tensor) and _same_bits(found, ours())):
                return False
            if before != _state(probe):
                return False
    return True


def _state(module: nn.Module) -> dict[str, tuple[int, int]]:
    """What of a module's attributes changes when they are replaced or grow."""
    return {name: (id(value), len(value) if isinstance(value, list | dict | set) else 0)
            for name, value in vars(module).items()}  # fmt: skip


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())
