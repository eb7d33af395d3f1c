"""Arena: the optimizer's flat buffers over many leaves: a step is one operation, whatever the number of layers."""

from typing import Any

import torch
from torch import Tensor, nn

from sparseft.hugepages import collapse
from sparseft.layers import Selected, refresh_values
from sparseft.ops import sparse_adamw_
from sparseft.pattern import pack
from sparseft.reference import LAYER

STATE = ("exp_avg", "exp_avg_sq")


class Arena:
    """The flat buffers of one param group's leaves (one device, dtype and tile shape); a leaf is a slice."""

    def __init__(self, group: dict[str, Any], chosen: list[Selected], state: dict[nn.Parameter, dict[str, Any]]):
        self.group, self.leaves = group, [c.values for c in chosen]
        self.weights = [c.weight for c in chosen]
        self.layout = pack([c.pattern for c in chosen])
        self.base = torch.cat([c.base for c in chosen])
        _share_memory([c.base for c in chosen], self.base)
        _share_memory([c.pattern.local for c in chosen], self.layout.local)
        dtype = self.weights[0].dtype
        self._wide = torch.promote_types(dtype, torch.float32)
        self.seed = group["rounding_seed"] if dtype.itemsize == 2 else None
        self.values = torch.cat([leaf.detach() for leaf in self.leaves])
        self.values = self.values.to(self._wide if self.seed is None else dtype)  # also after model.to(bf16)
        self.grad: Tensor | None = None  # from `collect` to the end of the step
        self.buffers = {name: _joined(self.leaves, state, name, self._wide) for name in STATE}
        zero = torch.zeros((), dtype=torch.int64)
        self.steps = torch.stack([state[leaf].get("step", zero).to(leaf.device) for leaf in self.leaves])
        aged = any("born" in state[leaf] for leaf in self.leaves)
        self.born = _joined(self.leaves, state, "born", torch.int32) if aged else None
        self._tiles: dict[tuple[bool, ...], Tensor] = {}
        self._chosen = chosen
        self._attach(state)
        for one in chosen:
            refresh_values(one)
        self._note_versions()
        collapse([*self.weights, self.values, *self.buffers.values(), self.base])

    def _attach(self, state: dict[nn.Parameter, dict[str, Any]]) -> None:
        self._addresses = []
        start = 0
        for number, leaf in enumerate(self.leaves):
            part = slice(start, start + len(leaf))
            leaf.data = self.values[part]
            state[leaf]["step"] = self.steps[number]
            for name, buffer in self.buffers.items():
                state[leaf][name] = buffer[part]
            if self.born is not None:
                state[leaf]["born"] = self.born[part]
            self._addresses.append((leaf.data_ptr(), self.weights[number].data_ptr()))
            start = part.stop

    def attached(self) -> bool:
        """Whether every leaf and weight still lies where the arena put or found it."""
        now = [(leaf.data_ptr(), weight.data_ptr()) for leaf, weight in zip(self.leaves, self.weights, strict=True)]
        return now == self._addresses

    def collect(self) -> Tensor | None:
        """Join the leaves' gradients; the worklist of the layers that have one, None if none has."""
        have = tuple(leaf.grad is not None for leaf in self.leaves)
        if not any(have):
            return None
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves]
        self.grad = torch.cat([grad.to(self._wide) for grad in grads])
        if have not in self._tiles:
            mask = torch.tensor(have, device=self.layout.tiles.device)
            self._tiles = {have: self.layout.tiles[mask[self.layout.tiles[:, LAYER]]]}
        self._having = torch.tensor(have, device=self.steps.device)
        return self._tiles[have]

    def nonfinite(self) -> Tensor:
        """0-dim fp32: 1 if a collected gradient is NaN or Inf."""
        if self.grad is None or not len(self.grad):
            return torch.zeros((), device=self.values.device)
        least, most = torch.aminmax(self.grad)  # both are NaN if anything is
        return 1 - (torch.isfinite(least) & torch.isfinite(most)).float()

    def step(self, tiles: Tensor, found_inf: Tensor, grad_scale: Tensor | None) -> None:
        """One AdamW step over a worklist; nothing happens if `found_inf` (0-dim fp32) is not zero."""
        group = self.group
        lr = torch.as_tensor(group["lr"], dtype=torch.float64)
        for one, version in zip(self._chosen, self._versions, strict=True):
            if _version(one.weight) != version:  # written by somebody else: that is where training goes on
                refresh_values(one)
        self.steps += self._having * (found_inf == 0)
        sparse_adamw_(
            self.weights, self.values, self.grad, self.buffers["exp_avg"], self.buffers["exp_avg_sq"],
            self.layout._replace(tiles=tiles),
            step=self.steps, lr=lr, betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
            base=self.base if group["decay_to"] == "pretrained" else None, born=self.born,
            maximize=group["maximize"], grad_scale=grad_scale, found_inf=found_inf, seed=self.seed,
        )  # fmt: skip
        self.grad = None
        self._note_versions()

    def _note_versions(self) -> None:
        self._versions = [_version(weight) for weight in self.weights]


def _share_memory(parts: list[Tensor], joined: Tensor) -> None:
    """Let tensors lie inside the one that they were joined to: the copies are freed."""
    for part, slice_ in zip(parts, joined.split([len(part) for part in parts]), strict=True):
        part.data = slice_


def _version(weight: Tensor) -> int:
    """How often a tensor was written in place (inference tensors do not count)."""
    return 0 if weight.is_inference() else weight._version


def _joined(
    leaves: list[nn.Parameter], state: dict[nn.Parameter, dict[str, Any]], name: str, dtype: torch.dtype
) -> Tensor:
    """One flat buffer of the leaves' states, zeros where a leaf has none yet."""
    parts = [state[leaf].get(name, torch.zeros_like(leaf, dtype=dtype)) for leaf in leaves]
    return torch.cat([part.detach().to(leaf.device, dtype) for part, leaf in zip(parts, leaves, strict=True)])
