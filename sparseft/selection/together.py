"""Processes that work together fail together."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def together(group: dist.ProcessGroup | None, device: torch.device) -> Iterator[None]:
    """What fails in one process of the group raises in all of them: the others would wait for it without end.

    Args:
        group: all of its processes enter; None: this one is alone.
        device: where the group can reduce.

    Raises:
        RuntimeError: another process failed in here.
    """
    failure = None
    try:
        yield
    except Exception as error:
        if group is None:
            raise
        failure = error
    if group is None:
        return
    failed = torch.tensor(int(failure is not None), device=device)
    dist.all_reduce(failed, group=group)
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(f"group: {int(failed)} of its processes failed; the reason is in their own errors")
