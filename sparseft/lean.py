"""Modules that compute what they computed, but keep less of it for the backward pass.

A module whose forward is known to be a certain formula gets a class of its own in front of its class: same object, same
attributes, methods and name, still an instance of its class; only `forward` is another.
"""

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


_classes: dict[tuple[type[Lean], type[nn.Module], Hashable], type[Lean]] = {}


def _lean_class(front: type[Lean], plain: type[nn.Module], fixed: Hashable) -> type[Lean]:
    if (front, plain, fixed) not in _classes:
        _classes[front, plain, fixed] = _make_class(front, plain, fixed)
    return _classes[front, plain, fixed]


def _make_class(front: type[Lean], plain: type[nn.Module], fixed: Hashable) -> type[Lean]:
    inside = {"_sparseft_plain": plain, "_sparseft_forward": plain.forward, "_sparseft_fixed": fixed}
    inside |= {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(plain.__name__, (front, plain), inside)


def _rebuild(front: type[Lean], plain: type[nn.Module], fixed: Hashable) -> Lean:
    made = _lean_class(front, plain, fixed)
    return made.__new__(made)


def make_lean(module: nn.Module, front: type[Lean], fixed: Hashable) -> None:
    """Put `front` in front of the module's class."""
    module.__class__ = _lean_class(front, type(module), fixed)


def restore(module: Lean) -> None:
    """Back to the class that the module had."""
    module.__class__ = module._sparseft_plain


def may_become_lean(module: nn.Module) -> bool:
    """Whether a call runs its class's forward, of one argument, and nobody is in front of it yet."""
    if isinstance(module, Lean | torch.jit.ScriptModule) or "forward" in module.__dict__:
        return False
    if type(module).__call__ is not nn.Module.__call__:
        return False
    _, *arguments = inspect.signature(type(module).forward).parameters.values()
    return len(arguments) == 1 and arguments[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def same_in_both_modes(probe: nn.Module, theirs: Callable[[], Any], ours: Callable[[], Tensor]) -> bool:
    """Whether `theirs`, somebody's forward on `probe`, gives the same bits as `ours`, in training and in evaluation,
    and leaves nothing behind on the module."""
    with torch.random.fork_rng(devices=[]):  # theirs may draw
        for training in (False, True):
            probe.training = training
            before = dict(probe.__dict__)
            try:
                found = theirs()
            except Exception:  # somebody else's code, which may want other shapes: whatever it raises, it stays
                return False
            if not (isinstance(found, Tensor) and _same_bits(found, ours())):
                return False
            if before.keys() != probe.__dict__.keys() or any(
                probe.__dict__[name] is not before[name] for name in before
            ):
                return False
    return True


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())
