"""Two processes that select together get the same patterns, those of one process that sees all batches."""

import json
import os
from datetime import timedelta

import pytest
import torch
from torch import nn

from sparseft import DropAndGrow, Schedule, sparsify
from sparseft.selection.growth import drop_and_grow
from tests.tiny import select_entries as select

CRITERIA = ("grad", "sampled", "fisher", "fisher-token", "taylor", "wanda", "random", "losia", "spiel-ma", "lottery")
ADDITIVE = ("grad", "fisher", "fisher-token", "taylor", "wanda", "random")  # the state over ranks is that over batches


def make() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10, bias=False)).double()


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def batches() -> torch.Tensor:
    return torch.randn(5, 8, 20, generator=torch.Generator().manual_seed(4)).double()


def digests(model, data, criterion, **options) -> dict[str, str]:
    patterns = select(model, data, criterion=criterion, density=0.1, tile=(8, 8), loss_fn=loss, structure="entries",
                      **options)  # fmt: skip
    return {name: pattern.digest for name, pattern in patterns.items()}


def pairs() -> torch.Tensor:
    """[process, batch]: as many batches for each."""
    return batches()[:4].view(2, 2, 8, 20)


def moved(data, loss_fn, group=None) -> dict[str, dict[str, str]]:
    """Where a model trains after drop and grow."""
    found = {}
    for tiles in ("same", "free"):
        model = make()
        sparsify(model, select(model, criterion="magnitude", density=0.2, tile=(8, 8)))
        chosen = drop_and_grow(model, list(data), 0.5, tiles=tiles, loss_fn=loss_fn, group=group)
        found[tiles] = {name: pattern.digest for name, pattern in chosen.items()}
    return found


def failures(rank: int, group) -> dict[str, str]:
    """What is told where process 1 alone has no batches, one that gives no finite loss or gradient, or a wrong word."""
    model = make()
    sparsify(model, select(model, criterion="magnitude", density=0.2, tile=(8, 8)))
    data = list(batches())
    spoilt = [data[0] / 0]
    tries = {
        "no batch": lambda: digests(make(), data if rank == 0 else [], "grad", group=group),
        "infinite": lambda: digests(make(), data if rank == 0 else [data[0] / 0], "wanda", group=group),
        "nothing to grow by": lambda: drop_and_grow(model, data if rank == 0 else [], 0.5, loss_fn=loss, group=group),
        "first batch": lambda: drop_and_grow(model, data if rank == 0 else spoilt, 0.5, loss_fn=loss, group=group),
        "later batch": lambda: drop_and_grow(model, data if rank == 0 else data[:1] + spoilt, 0.5, loss_fn=loss,
                                             group=group),
        "argument": lambda: digests(make(), data, "grad" if rank == 0 else "great", group=group),
        "argument to grow": lambda: drop_and_grow(model, data, 0.5 if rank == 0 else 2, loss_fn=loss, group=group),
        "without data": lambda: digests(make(), None, "random" if rank == 0 else "grad", group=group),
        "targets": lambda: select_targets(rank, group),
        "unlike sums": lambda: digests(make(), data, "grad", group=group, include=["0.weight", "2.weight"][rank]),
        "unlike results": lambda: digests(make(), data, "grad", group=group, k=20 + rank),
        "unlike seeds": lambda: digests(make(), None, "random", group=group, seed=rank),
        "user": lambda: digests(make(), data, broken if rank == 1 else gradient_itself, group=group),
        "schedule": lambda: Schedule(model, None, DropAndGrow(every=1), 9, loss_fn=loss, group=group).step(
            lambda: data if rank == 0 else broken(None, None, None)),
        "no model": lambda: digests(make() if rank == 0 else None, data, "grad", group=group),
        "fewer sums": lambda: digests(make(), data, "grad", group=group, include=None if rank == 0 else "0.weight"),
    }  # fmt: skip
    found = {}
    for name, attempt in tries.items():
        with pytest.raises((RuntimeError, ValueError, AttributeError, TypeError)) as error:
            attempt()
        found[name] = str(error.value)
    assert digests(make(), data, "grad", group=group) == digests(make(), data, "grad")  # as if nothing had been
    return found


def gradient_itself(name, weight, gradient):
    return gradient


def broken(name, weight, gradient):
    raise ValueError("a user's mistake")


def select_targets(rank: int, group) -> None:
    """Process 1 fails while it counts labels, after a selection that needed no data."""

    def batches():
        yield {"labels": torch.ones(1, 3, dtype=torch.int64)}
        if rank == 1:
            raise ValueError("the data end here")

    model = make()
    model.get_output_embeddings = lambda: model[2]
    select(model, batches(), criterion="magnitude", density=0.2, tile=(8, 8), structure="entries", train_targets=True,
           group=group)  # fmt: skip


def on_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
                                         timeout=timedelta(seconds=60))  # fmt: skip
    group = torch.distributed.group.WORLD
    data = list(batches())
    mine = data[:1] if rank == 0 else data[1:]  # one batch here, four there
    found = {criterion: digests(make(), mine, criterion, group=group) for criterion in CRITERIA}
    found["limited"] = digests(make(), mine, "grad", group=group, memory=30 * 20 * 8)
    found["alone"] = digests(make(), mine, "grad")  # without the group: each by itself
    found["moved"] = moved(pairs()[rank], lambda model, x: loss(model, x), group)
    found["failures"] = failures(rank, group)
    with open(os.path.join(folder, f"{rank}.json"), "w") as file:
        json.dump(found, file)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_rank, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_ranks_agree(found):
    one, two = ({name: told for name, told in each.items() if name != "failures"} for each in found)
    assert one.pop("alone") != two.pop("alone")  # different data would choose differently
    assert one == two


def test_ranks_choose_what_one_process_chooses(found):
    data = list(batches())
    for criterion in ADDITIVE:
        assert found[0][criterion] == digests(make(), data, criterion), criterion
    assert found[0]["limited"] == found[0]["grad"]


def test_masks_move_alike_as_in_one_process_that_sees_all_batches(found):
    together = moved(pairs().transpose(0, 1), lambda model, both: loss(model, both[0]) + loss(model, both[1]))
    assert found[0]["moved"] == together != moved(pairs()[0], loss)


def test_what_fails_in_one_process_is_told_in_both(found):
    """The other one does not wait for it."""
    one, two = (each["failures"] for each in found)
    for name in ("fewer sums", "unlike sums", "unlike results", "unlike seeds"):
        assert "add up different things, or come to different results" in one.pop(name) == two.pop(name)
    assert set(one.values()) == {"group: another of its processes failed; the reason is in its own error"}
    assert two["user"] == two["schedule"] == "a user's mistake"
    assert two["no batch"] == two["nothing to grow by"] == "batches must hold at least one batch, got none"
    assert two["infinite"] == "batch 0: the input of 0.weight's layer is not finite"
    assert two["first batch"] == "batch 0: the gradient of 0.weight is not finite"
    assert two["later batch"] == "batch 1: the gradient of 0.weight is not finite"
    assert two["argument"].startswith("criterion must be")
    assert two["argument to grow"] == "fraction must lie in [0, 1], got 2"
    assert two["without data"].startswith("batches must be given")
    assert two["targets"] == "the data end here"
