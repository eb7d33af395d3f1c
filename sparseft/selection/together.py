"""Processes that work together fail together, and do the same."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparseft.pattern import Pattern


class Team:
    """The processes of a group, or this one alone.

    Every process votes before every sum and at its end: whether it failed, and what it is about to do. So none adds up
    something else than the others do, and none waits for one that does not come.

    Args:
        group: None: this process is alone.
        device: where the group can reduce.

    Raises:
        ValueError: this process is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device):
        self._group, self._device = group, device
        self._parted = False  # nobody waits for a vote any more
        self._result = ""
        if group is not None and dist.get_rank(group) < 0:
            self._parted = True
            raise ValueError("group must hold this process")

    @property
    def alone(self) -> bool:
        return self._group is None

    def add_up(self, tensor: Tensor, what: str) -> Tensor:
        """The sum over all processes, in place; `what` names it.

        Raises:
            RuntimeError: another process failed before it came here, or adds up something else.
        """
        if self._group is not None:
            self._vote(f"sum {what} {tuple(tensor.shape)} {tensor.dtype}")
            self._reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def conclude(self, result: str) -> None:
        """What all processes must have come to in the end."""
        self._result = result

    def finish(self) -> None:
        """
        Raises:
            RuntimeError: another process failed, has more to add up, or came to another result.
        """
        if self._group is not None and not self._parted:
            self._vote(f"result {self._result}")
            self._parted = True

    def fail(self) -> None:
        """Tell the others, if they wait."""
        if self._group is not None and not self._parted:
            self._parted = True
            self._reduce(torch.tensor([1, *_NOTHING], device=self._device), dist.ReduceOp.MAX)

    def _vote(self, intent: str) -> None:
        number = int.from_bytes(hashlib.sha256(intent.encode()).digest()[:7], "big")
        votes = torch.tensor([0, number, -number], device=self._device)
        self._reduce(votes, dist.ReduceOp.MAX)
        failed, most, least = votes.tolist()
        if failed:
            self._parted = True
            raise RuntimeError("group: another of its processes failed; the reason is in its own error")
        if most != -least:
            self._parted = True
            raise RuntimeError(
                "group: its processes add up different things, or come to different results; all must get the same "
                "arguments and models, and reach the same weights in the same order"
            )

    def _reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        try:
            dist.all_reduce(tensor, op, group=self._group)
        except Exception:
            self._parted = True  # the connection is gone
            raise


_NOTHING = (-(2**62), -(2**62))  # the vote of a process that failed: below every number and its negative


def agree(team: Team, patterns: Mapping[str, Pattern]) -> None:
    """All processes must come to these patterns."""
    if not team.alone:
        team.conclude(" ".join(f"{name} {pattern.digest}" for name, pattern in patterns.items()))


@contextmanager
def together(group: dist.ProcessGroup | None, model: nn.Module) -> Iterator[Team]:
    """What fails in one process of the group raises in all of them: the others would wait for it without end.

    An interrupt (KeyboardInterrupt, SystemExit) is not told to the others: it must not wait for them.

    Args:
        group: all of its processes enter; None: this one is alone.
        model: on the device where the group can reduce.

    Raises:
        RuntimeError: another process failed in here, or did something else.
        ValueError: this process is not in the group.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    team = Team(group, next((p.device for p in parameters), torch.device("cpu")))
    try:
        yield team
    except Exception:
        team.fail()
        raise
    team.finish()
