"""Processes that work together fail together."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Team:
    """The processes of a group, or this one alone.

    Args:
        group: None: this process is alone.
        device: where the group can reduce.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device):
        self._group, self._device = group, device
        self._parted = False  # nobody waits for a vote any more

    @property
    def alone(self) -> bool:
        return self._group is None

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place.

        Raises:
            RuntimeError: another process failed before it came here, or does not come.
        """
        if self._group is not None:
            self._vote()
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def _vote(self, failed: bool = False, finished: bool = False) -> None:
        """Every process votes before every sum and at its end, so each knows what the others are about to do."""
        if self._group is None or self._parted:
            return
        votes = torch.tensor([failed, finished], dtype=torch.int64, device=self._device)
        dist.all_reduce(votes, group=self._group)
        failures, ends = votes.tolist()
        self._parted = failed or failures > 0 or ends > 0
        if failed:
            return
        if failures:
            raise RuntimeError(f"group: {failures} of its processes failed; the reason is in their own errors")
        if 0 < ends < dist.get_world_size(self._group):
            raise RuntimeError(f"group: {ends} of its processes are done where others have more to add up; all must "
                               "get the same arguments and reach the same weights")  # fmt: skip


@contextmanager
def together(group: dist.ProcessGroup | None, model: nn.Module) -> Iterator[Team]:
    """What fails in one process of the group raises in all of them: the others would wait for it without end.

    Args:
        group: all of its processes enter; None: this one is alone.
        model: on the device where the group can reduce.

    Raises:
        RuntimeError: another process failed in here.
    """
    team = Team(group, next((p.device for p in model.parameters()), torch.device("cpu")))
    try:
        yield team
    except Exception:
        team._vote(failed=True)
        raise
    team._vote(finished=True)
