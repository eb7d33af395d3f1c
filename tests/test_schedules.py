"""Moving masks: drop and grow against a dense reference in numpy, and schedules in a plain loop."""

import copy
import dataclasses
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparseft import (
    Delta,
    DropAndGrow,
    Pattern,
    Schedule,
    SelectAgain,
    SparseAdamW,
    densify,
    patterns,
    sparsify,
)
from sparseft.layers import selected
from sparseft.schedules import PLANS, SPIEL
from sparseft.selection.growth import _Growth, drop_and_grow
from sparseft.selection.outer import OuterProduct

from . import tiny
from .mixed import Mixed, batches, bits, loss_of, make, masks_for, patterns_from, same, train
from .tiny import select_entries as select

TILE = (4, 8)


def sparse_model(dtype: torch.dtype = torch.float64, density: float = 0.2, steps: int = 3) -> tuple[Mixed, SparseAdamW]:
    model = make(dtype)
    sparsify(model, patterns_from(masks_for(model, 1, density), TILE))
    optimizer = SparseAdamW(model, lr=0.02)
    train(model, optimizer, batches(steps, seed=8))
    return model, optimizer


def dense_gradients(model: nn.Module, data: list[Tensor]) -> list[dict[str, np.ndarray]]:
    """Per batch the gradient of every sparsified weight, in its dtype, as fp64."""
    names = list(selected(model))
    plain = densify(copy.deepcopy(model)).requires_grad_(True)
    weights = [plain.get_parameter(name) for name in names]
    found = [torch.autograd.grad(loss_of(plain, ids), weights) for ids in data]
    return [{n: g.double().numpy().reshape(-1) for n, g in zip(names, one, strict=True)} for one in found]


def top(scores: np.ndarray, among: np.ndarray, k: int) -> np.ndarray:
    """The k positions in `among` with the largest scores; ties to the lower position."""
    among = np.sort(among)
    return np.sort(among[np.argsort(-scores[among], kind="stable")[:k]])


def in_order(first: list[int], mass: np.ndarray) -> list[int]:
    return [*first, *(i for i in np.argsort(-mass, kind="stable").tolist() if i not in first)]


def outer_of_moments(chosen, moments: np.ndarray) -> np.ndarray:
    """Dense and flat: the largest moment of the entry's row times the largest of its column."""
    n, m = chosen.pattern.shape
    dense = np.zeros(n * m)
    dense[chosen.pattern.indices().numpy()] = moments
    dense = dense.reshape(n, m)
    return np.outer(dense.max(1), dense.max(0)).reshape(-1)


def reference(model: nn.Module, data: list[Tensor], fraction: float, tiles: str, moments=None) -> dict[str, np.ndarray]:
    """Flat positions by weight, by plain loops over dense arrays."""
    gradients = dense_gradients(model, data) if moments is None else [
        {name: outer_of_moments(chosen, moments[name].numpy()) for name, chosen in selected(model).items()}
    ]  # fmt: skip
    expected = {}
    for name, chosen in selected(model).items():
        old = chosen.pattern.indices().numpy()
        k, (n, m) = len(old), chosen.pattern.shape
        moving = int(fraction * k)
        change = np.abs(chosen.values.detach().double().numpy() - chosen.base.double().numpy())
        kept = old[np.argsort(-change, kind="stable")[: k - moving]]
        open_ = np.setdiff1d(np.arange(n * m), kept)
        first = np.abs(gradients[0][name])
        if tiles == "same":
            free = top(first, open_, moving)
            mass = np.zeros((n, m))
            mass.reshape(-1)[free] = first[free]
            rows = in_order(chosen.pattern.rows.tolist(), mass.sum(1))
            cols = in_order(chosen.pattern.cols.tolist(), mass.sum(0))
            blocks = [
                np.array([r * m + c for r in rows[i : i + TILE[0]] for c in cols[j : j + TILE[1]]])
                for i in range(0, n, TILE[0])
                for j in range(0, m, TILE[1])
            ]
            held = [b for b in blocks if np.isin(b, kept).any()]
            rest = [b for b in blocks if not np.isin(b, kept).any() and np.isin(b, free).any()]
            rest.sort(key=lambda b: -mass.reshape(-1)[b].sum())
            allowed = held
            for block in rest:
                if len(allowed) < len(chosen.pattern.tiles) or sum(map(len, allowed)) < k:
                    allowed = [*allowed, block]
            open_ = np.intersect1d(open_, np.concatenate(allowed))
        candidates = top(first, open_, k)
        total = np.abs(sum(g[name] for g in gradients))
        expected[name] = np.sort(np.concatenate([kept, top(total, candidates, moving)])) if moving else np.sort(old)
    return expected


# ---- drop and grow ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("tiles", ["same", "free"])
@pytest.mark.parametrize("density", [0.05, 0.3])
def test_drop_and_grow_is_the_dense_reference(tiles, count, fraction, density):
    model, _ = sparse_model(density=density)
    data, now = batches(count, seed=3), patterns(model)
    expected = reference(model, data, fraction, tiles)
    found = drop_and_grow(model, data, fraction, tiles=tiles, loss_fn=loss_of)
    assert list(found) == list(now)
    for name, pattern in found.items():
        np.testing.assert_array_equal(pattern.validate().indices().sort().values.numpy(), expected[name], err_msg=name)
        assert len(pattern) == len(now[name])
        assert tiles == "free" or len(pattern.tiles) <= len(now[name].tiles) or fraction == 1.0


@pytest.mark.parametrize("fraction", [0.3, 1.0])
@pytest.mark.parametrize("tiles", ["same", "free"])
@pytest.mark.parametrize("density", [0.05, 0.3])
def test_growing_by_moments_is_the_dense_reference(tiles, fraction, density):
    model, optimizer = sparse_model(density=density)
    moments = {name: optimizer.state[c.values]["exp_avg_sq"].clone() for name, c in selected(model).items()}
    expected = reference(model, [], fraction, tiles, moments)
    found = drop_and_grow(model, [], fraction, tiles=tiles, second_moments=moments)
    for name, pattern in found.items():
        np.testing.assert_array_equal(pattern.validate().indices().sort().values.numpy(), expected[name], err_msg=name)
    plan = DropAndGrow(every=1, fraction=fraction, decay="constant", tiles=tiles, grow="moments")
    Schedule(model, optimizer, plan, 10).step(lambda: [])
    assert patterns(model) == found


def test_there_are_no_moments_before_the_first_step():
    model, _ = sparse_model(density=0.1)
    fresh = SparseAdamW(model)
    with pytest.raises(ValueError, match="second_moments must hold those of"):
        Schedule(model, fresh, DropAndGrow(every=1, grow="moments"), 10).step(lambda: [])
    assert not fresh.state


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 30), (33, 16)])
@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_best_of_an_outer_product(shape, levels, dtype):
    """Levels: few different values, so that products tie; zeros among them."""
    sides = [torch.randint(levels, (size,)).to(dtype) if levels else torch.rand(size, dtype=dtype) for size in shape]
    product = OuterProduct(*sides)
    dense = np.outer(*(side.double().numpy() for side in sides)).reshape(-1)
    np.testing.assert_array_equal(product.at(torch.arange(len(dense))).numpy(), dense)
    for count in {0, 1, len(dense) // 3, len(dense) - 1, len(dense), len(dense) + 5}:
        np.testing.assert_array_equal(product.best(count).numpy(), top(dense, np.arange(len(dense)), count))


@pytest.mark.parametrize("tiles", ["same", "free"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scoring_leaves_the_model_as_it_was(dtype, tiles):
    model, optimizer = sparse_model(dtype)
    loss_of(model, batches(1)[0]).backward()
    twin = copy.deepcopy(model)
    before, grads = bits(model), [c.values.grad.clone() for c in selected(model).values()]
    found = drop_and_grow(model, batches(2), 0.5, tiles=tiles, loss_fn=loss_of)
    assert found == drop_and_grow(model, batches(2), 0.5, tiles=tiles, loss_fn=loss_of)
    assert same(bits(model), before)
    assert all(torch.equal(c.values.grad, g) for c, g in zip(selected(model).values(), grads, strict=True))
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    optimizer.step()
    assert not same(bits(model), before)


def test_never_two_dense_gradients_alive(monkeypatch):
    model, _ = sparse_model()
    alive, add = [], _Growth.add

    def watched(self, gradient):
        assert all(reference() is None for reference in alive)
        alive.append(weakref.ref(gradient))
        add(self, gradient)

    monkeypatch.setattr(_Growth, "add", watched)
    drop_and_grow(model, batches(2), 0.5, loss_fn=loss_of)
    assert len(alive) == 2 * len(selected(model))


def test_whole_empty_and_unreached_weights_are_left_alone():
    model = make()
    model.extra = nn.Linear(4, 4)  # no part in the loss
    masks = masks_for(model, 1) | {"extra.weight": torch.rand(4, 4) < 0.5}
    masks["up.weight"] = torch.ones(13, 7, dtype=torch.bool)
    masks["experts"] = torch.zeros(3, 13, 9, dtype=torch.bool)
    sparsify(model, patterns_from(masks, TILE))
    before = patterns(model)
    found = drop_and_grow(model, batches(1), 0.5, loss_fn=loss_of)
    moved = [name for name, pattern in found.items() if pattern != before[name]]
    assert sorted(moved) == ["down.weight", "embed.weight"]


def test_rows_that_no_entry_needs_are_given_up():
    """Entries wander to other tiles; the pattern does not keep every row and column that it ever had."""
    layer = nn.Linear(64, 64, bias=False)
    model = nn.Sequential(layer)
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:8, :8] = True
    sparsify(model, {"0.weight": Pattern.from_mask(mask, tile=(8, 8))})
    target = torch.zeros(64, 64)
    target[40:44, 40:48] = 1.0

    def loss(model: nn.Module, _) -> Tensor:
        return (model(torch.eye(64)).T * target).sum()

    found = drop_and_grow(model, [None], 1.0, loss_fn=loss)["0.weight"]
    assert target[found.to_mask()].sum() == 32
    assert len(found) == 64 and len(found.rows) <= 16 and len(found.cols) <= 16


@pytest.mark.parametrize("wrong", [{"fraction": 1.5}, {"tiles": "few"}], ids=str)
def test_wrong_arguments_are_named(wrong):
    model, _ = sparse_model()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        drop_and_grow(model, batches(1), **{"fraction": 0.5, "loss_fn": loss_of} | wrong)


@pytest.mark.parametrize(("data", "message"), [
    ([], "batches must hold at least one batch, got none"), (None, "batches must be an iterable of batches, got None"),
    (torch.ones(2, 3), r"batches must be an iterable of batches, got Tensor; one batch: \[batch\]"),
], ids=["none", "None", "tensor"])  # fmt: skip
def test_growing_needs_batches(data, message):
    """Without one there is nothing to grow by: that entries stay must not pass for a choice."""
    model, optimizer = sparse_model()
    with pytest.raises((ValueError, TypeError), match=message):
        drop_and_grow(model, data, 0.5, loss_fn=loss_of)
    with pytest.raises((ValueError, TypeError), match=message):
        Schedule(model, optimizer, DropAndGrow(every=1), 10, loss_fn=loss_of).step(data)


def test_moments_must_fit():
    model, _ = sparse_model()
    name, chosen = next(iter(selected(model).items()))
    with pytest.raises(ValueError, match=f"second_moments must hold those of {name}, got"):
        drop_and_grow(model, [], 0.5, second_moments={})
    moments = {n: torch.ones(len(c.pattern)) for n, c in selected(model).items()} | {name: torch.ones(3)}
    with pytest.raises(ValueError, match=rf"those of {name} must have the shape \({len(chosen.pattern)},\), got \(3,"):
        drop_and_grow(model, [], 0.5, second_moments=moments)


def test_a_plain_model_has_nothing_to_drop():
    with pytest.raises(ValueError, match="must be sparsified"):
        drop_and_grow(make(), batches(1), 0.5, loss_fn=loss_of)


# ---- schedules ----------------------------------------------------------------------------------------------------


def moves(plan, steps: int) -> list[int]:
    model, optimizer = sparse_model()
    schedule = Schedule(model, optimizer, plan, steps, loss_fn=loss_of)
    return [step for step in range(1, steps + 1) if schedule.step(batches(1)) is not None]


def test_when_entries_are_exchanged():
    assert moves(DropAndGrow(every=3, until=0.75), 16) == [3, 6, 9]  # at 12 the share would be zero
    assert moves(DropAndGrow(every=4, until=1.0), 16) == [4, 8, 12]  # after the last step nothing could train
    assert moves(DropAndGrow(every=20), 16) == []


@pytest.mark.parametrize(
    ("plan", "shares"),
    [
        (DropAndGrow(), [0.3, 0.15, 0.0, 0.0]),  # RigL: a / 2 (1 + cos(pi t / T_end)), T_end = 0.75 T
        (SPIEL, [0.2, 0.2 * (1 - 0.375), 0.2 * 0.25, 0.0]),
        (DropAndGrow(decay="constant", fraction=0.5), [0.5] * 4),
    ],
)
def test_how_many_entries_are_exchanged(plan, shares):
    assert [plan.share(step, 800) for step in (0, 300, 600, 800)] == pytest.approx(shares)


def test_a_step_exchanges_as_drop_and_grow_says():
    model, optimizer = sparse_model()
    schedule = Schedule(model, optimizer, DropAndGrow(every=2, fraction=0.5, decay="constant"), 10, loss_fn=loss_of)
    now, data = patterns(model), batches(2, seed=4)
    assert schedule.step(lambda: pytest.fail("asked for batches too early")) is None
    expected = drop_and_grow(model, data, 0.5, loss_fn=loss_of)
    moved = schedule.step(lambda: data)
    assert patterns(model) == expected != now
    assert moved.entered == moved.left > 0
    assert moved.stayed + moved.entered == sum(map(len, now.values()))


@pytest.mark.parametrize("criterion", ["balanced", "sampled"])
@pytest.mark.parametrize("leaving", ["revert", "keep"])
def test_selecting_again_is_the_selection_of_the_model_as_it_is(leaving, criterion):
    model = make()
    arguments = {"density": 0.1, "tile": TILE, "tile_budget": 0.5, "include": ["up", "down"], "allocation": "global",
                 "criterion": criterion}  # fmt: skip
    first = select(model, batches(2), loss_fn=loss_of, **arguments)
    embedding = patterns_from(masks_for(model, 1), TILE)["embed.weight"]
    sparsify(model, first | {"embed.weight": embedding})  # chosen otherwise: not the schedule's to move
    optimizer = SparseAdamW(model, lr=0.05)
    plan = SelectAgain(every=1, leaving=leaving)
    schedule = Schedule(model, optimizer, plan, 10, loss_fn=loss_of, **arguments)
    train(model, optimizer, batches(3))
    expected = select(densify(copy.deepcopy(model)), batches(2), loss_fn=loss_of, **arguments)
    schedule.step(batches(2))
    assert {n: p for n, p in patterns(model).items() if len(p)} == expected | {"embed.weight": embedding}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_language_model_trains_with_moving_masks_and_its_delta_is_exact(name, dtype):
    plan = dataclasses.replace(PLANS[name], every=4)
    model = tiny.llama(dtype=dtype)
    start = copy.deepcopy(model)
    ids = torch.arange(60).view(4, 15) % tiny.VOCABULARY
    batch = {"input_ids": ids, "labels": ids}
    arguments = {"density": 0.02, "tile": (8, 8), "tile_budget": 0.3, "include": ["*_proj", "embed_tokens"]}
    sparsify(model, select(model, [batch], **arguments))
    optimizer = SparseAdamW(model, lr=0.02)
    schedule = Schedule(model, optimizer, plan, 24, **(arguments if name == "select" else {}))
    before, losses = patterns(model), []
    for _ in range(24):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step([batch])
        losses.append(loss.item())
    assert patterns(model) != before
    assert losses[-1] < losses[0] - 1  # nat
    delta = Delta.from_model(model)
    assert same(bits(delta.apply_(copy.deepcopy(start))), bits(model))
    assert same(bits(delta.revert_(model)), bits(start))


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_schedule_goes_on_as_the_uninterrupted_one(stop):
    plan, data = DropAndGrow(every=2, leaving="keep"), batches(8)

    def go_on(model, optimizer, schedule, part) -> None:
        for ids in part:
            train(model, optimizer, [ids])
            schedule.step([ids])

    pretrained = make()
    model = copy.deepcopy(pretrained)
    sparsify(model, patterns_from(masks_for(model, 1), TILE))
    optimizer = SparseAdamW(model)
    schedule = Schedule(model, optimizer, plan, 8, loss_fn=loss_of)
    go_on(model, optimizer, schedule, data[:stop])
    parts = copy.deepcopy([part.state_dict() for part in (model, optimizer, schedule)])
    sparsify(pretrained, patterns(model))
    go_on(model, optimizer, schedule, data[stop:])

    resumed = SparseAdamW(pretrained)
    other = Schedule(pretrained, resumed, plan, 8, loss_fn=loss_of)
    for part, state in zip((pretrained, resumed, other), parts, strict=True):
        part.load_state_dict(state)
    go_on(pretrained, resumed, other, data[stop:])
    assert same(bits(pretrained), bits(model)) and patterns(pretrained) == patterns(model)
    assert len(Delta.from_model(pretrained)) == len(Delta.from_model(model))


@pytest.mark.parametrize("wrong", [
    {"every": 0}, {"until": 0.0}, {"fraction": 0.0}, {"decay": "steep"}, {"tiles": "few"}, {"batches": 0},
    {"leaving": "stay"},
], ids=str)  # fmt: skip
def test_wrong_plans_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DropAndGrow(**wrong)


def test_wrong_schedules_are_refused():
    model, optimizer = sparse_model()
    with pytest.raises(TypeError, match=r"density: .*SelectAgain"):
        Schedule(model, optimizer, DropAndGrow(), 10, density=0.1)
    with pytest.raises(ValueError, match="steps"):
        Schedule(model, optimizer, DropAndGrow(), 0)
