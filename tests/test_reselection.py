"""reselect against AdamW on dense tensors with an age per entry, deltas that know what left, and choices made late."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import sparseft
from sparseft import Delta, Pattern, SparseAdamW, densify, patterns, reselect, select_late, sparsify
from sparseft.layers import SparseLinear, selected

from .mixed import WEIGHTS, batches, bits, loss_of, make, masks_for, patterns_from, same, train


class Oracle:
    """AdamW on whole weights, from the paper's formulas; every entry has its own age, and only masked ones move."""

    def __init__(self, model: nn.Module, masks: dict[str, Tensor], lr: float, weight_decay: float):
        self.model, self.masks, self.lr, self.decay = model, dict(masks), lr, weight_decay
        self.start = {name: model.get_parameter(name).detach().clone() for name in masks}
        self.m, self.v, self.age = ({name: torch.zeros_like(w) for name, w in self.start.items()} for _ in range(3))

    @torch.no_grad()
    def reselect(self, masks: dict[str, Tensor], leaving: str) -> None:
        for name, old in self.masks.items():
            new, weight = masks.get(name, torch.zeros_like(old)), self.model.get_parameter(name)
            if leaving == "revert":
                weight.copy_(torch.where(old & ~new, self.start[name], weight))
            for state in (self.m, self.v, self.age):
                state[name] *= old & new
            self.masks[name] = new

    def train(self, data: list[Tensor]) -> None:
        for ids in data:
            weights = [self.model.get_parameter(name) for name in self.masks]
            grads = torch.autograd.grad(loss_of(self.model, ids), weights)
            with torch.no_grad():
                for (name, mask), w, g in zip(self.masks.items(), weights, grads, strict=True):
                    self.age[name] += mask
                    self.m[name] = 0.9 * self.m[name] + 0.1 * g
                    self.v[name] = 0.99 * self.v[name] + 0.01 * g**2
                    age = self.age[name].clamp(min=1)
                    step = (self.m[name] / (1 - 0.9**age)) / ((self.v[name] / (1 - 0.99**age)).sqrt() + 1e-8)
                    w.copy_(torch.where(mask, w - self.lr * (step + self.decay * (w - self.start[name])), w))
                    for state in (self.m, self.v):
                        state[name] *= mask


# ---- the rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaving", ["revert", "keep", "both"])
@pytest.mark.parametrize("grouped", [False, True])
def test_moving_masks_train_as_dense_adamw_with_an_age_per_entry(leaving, grouped):
    model = make()
    dense, options = copy.deepcopy(model), {"lr": 0.01, "weight_decay": 0.5, "betas": (0.9, 0.99)}
    masks = [masks_for(model, seed) for seed in range(4)]
    masks[2] = {name: mask for name, mask in masks[2].items() if name != "experts"}  # no entry of these for a while
    sparsify(model, patterns_from(masks[0]))
    leaves = sparseft.parameters(model)
    groups = [{"params": leaves[:1], "lr": 0.01}, {"params": leaves[1:]}] if grouped else leaves
    optimizer = SparseAdamW(groups, **options)
    oracle = Oracle(dense, masks[0], options["lr"], options["weight_decay"])
    data = batches(12)
    for phase, start in enumerate(range(0, 12, 3)):
        if phase:
            how = ("revert", "keep")[phase % 2] if leaving == "both" else leaving
            old, new = oracle.masks, {name: masks[phase].get(name, torch.zeros_like(m)) for name, m in masks[0].items()}
            moved = reselect(model, optimizer, patterns_from(masks[phase], tile=(8, 4)), leaving=how)
            assert moved == tuple(sum(int(f(old[n], new[n]).sum()) for n in old) for f in
                                  (lambda a, b: a & b, lambda a, b: b & ~a, lambda a, b: a & ~b))  # fmt: skip
            oracle.reselect(masks[phase], how)
            assert sparseft.parameters(model) == leaves  # the same objects
        train(model, optimizer, data[start : start + 3])
        oracle.train(data[start : start + 3])
        for name in WEIGHTS:  # fp64 on both sides; another order of additions, amplified where v is tiny
            torch.testing.assert_close(model.get_parameter(name), dense.get_parameter(name), rtol=0, atol=1e-9)
    assert isinstance(model.up, SparseLinear)
    assert optimizer.skipped_steps == 0


def test_what_stays_keeps_its_state_to_the_bit_and_what_enters_has_none():
    model = make(torch.bfloat16)
    first, second = masks_for(model, 1), masks_for(model, 2)
    sparsify(model, patterns_from(first))
    optimizer = SparseAdamW(model, lr=0.01)
    train(model, optimizer, batches(3))

    def spread() -> dict[str, dict[str, Tensor]]:
        """Each leaf's state, laid out over its weight; NaN where there is none."""
        out: dict[str, dict[str, Tensor]] = {}
        for name, chosen in selected(model).items():
            state = dict(optimizer.state[chosen.values])
            state["age"] = state["step"] - state.pop("born", torch.zeros(len(chosen.values)))
            state["values"] = chosen.values.detach()
            full = {key: torch.full((chosen.weight.numel(),), torch.nan) for key in state if key != "step"}
            for key, tensor in full.items():
                tensor[chosen.pattern.indices()] = state[key].float()
            out[name] = {key: tensor.view(chosen.weight.shape) for key, tensor in full.items()}
        return out

    before = spread()
    leaf = selected(model)["up.weight"].values
    leaf.grad = torch.ones_like(leaf)
    reselect(model, optimizer, patterns_from(second))
    assert leaf.grad is None
    after = spread()
    for name in WEIGHTS:
        both, newcomers = first[name] & second[name], second[name] & ~first[name]
        assert both.any() and newcomers.any()
        for key in ("values", "exp_avg", "exp_avg_sq", "age"):
            assert torch.equal(after[name][key][both], before[name][key][both]), (name, key)
            assert after[name][key][~second[name]].isnan().all()
        for key in ("exp_avg", "exp_avg_sq", "age"):
            assert (after[name][key][newcomers] == 0).all()
        weight = model.get_parameter(name).detach()
        assert torch.equal(after[name]["values"][newcomers], weight[newcomers].float())
    train(model, optimizer, batches(1))
    later = spread()
    assert all((later[n]["age"][second[n] & ~first[n]] == 1).all() for n in WEIGHTS)


def test_the_same_patterns_change_nothing():
    model = make(torch.bfloat16)
    sparsify(model, patterns_from(masks_for(model, 1)))
    optimizer = SparseAdamW(model, lr=0.01)
    twin, data = copy.deepcopy(model), batches(6)
    other = SparseAdamW(twin, lr=0.01)
    train(model, optimizer, data[:3])
    train(twin, other, data[:3])
    assert reselect(model, optimizer, patterns(model)) == (sum(map(len, patterns(model).values())), 0, 0)
    train(model, optimizer, data[3:])
    train(twin, other, data[3:])
    assert same(bits(model), bits(twin))


def test_a_loss_that_is_still_referenced_does_not_disturb():
    model = make()
    sparsify(model, patterns_from(masks_for(model, 1, 0.2)))
    optimizer = SparseAdamW(model)
    loss = loss_of(model, batches(1)[0])
    loss.backward()
    optimizer.step()
    reselect(model, optimizer, patterns_from(masks_for(model, 2, 0.4)))
    again = loss_of(model, batches(1)[0])
    again.backward()
    assert all(len(c.values.grad) == len(c.pattern) for c in selected(model).values())
    assert loss.isfinite()


def test_without_an_optimizer():
    model = make()
    start = bits(model)
    sparsify(model, patterns_from(masks_for(model, 1)))
    second = patterns_from(masks_for(model, 2))
    reselect(model, None, second)
    assert patterns(model) == second
    assert same(bits(model), start)


@pytest.mark.parametrize("named", [False, True])
def test_a_weight_without_a_leaf_gets_one_in_model_order(named):
    model = make()
    everything = patterns_from(masks_for(model, 1))
    sparsify(model, {name: everything[name] for name in ("embed.weight", "down.weight")})
    leaves = {name: chosen.values for name, chosen in selected(model).items()}
    optimizer = SparseAdamW(list(leaves.items()) if named else model, lr=0.01)
    train(model, optimizer, batches(2))
    moved = reselect(model, optimizer, everything)
    assert moved.entered == len(everything["up.weight"]) + len(everything["experts"])
    assert optimizer.param_groups[0]["params"] == sparseft.parameters(model)
    if named:
        assert optimizer.param_groups[0]["param_names"] == list(patterns(model))
    before = bits(model)
    train(model, optimizer, batches(1))
    assert all(not torch.equal(bits(model)[name], before[name]) for name in WEIGHTS)
    plain = densify(copy.deepcopy(model))
    assert type(plain.up) is nn.Linear and same(bits(plain), bits(model))


# ---- the delta ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaving", ["revert", "keep"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_delta_describes_every_weight_that_differs(dtype, leaving, tmp_path):
    model = make(dtype)
    with torch.no_grad():
        model.experts[0, 0, :4] = torch.tensor([-0.0, 0.0, 1e-7, -1.0]).to(dtype)
    plain, start = copy.deepcopy(model), bits(model)
    sparsify(model, patterns_from(masks_for(model, 1)))
    optimizer = SparseAdamW(model, lr=0.02)
    for seed in (2, 3, 1, 4):  # the first entries come back once
        train(model, optimizer, batches(2, seed))
        reselect(model, optimizer, patterns_from(masks_for(model, seed)), leaving=leaving)
    if leaving == "revert":  # nothing but the newcomers' start is left to compare with
        masks = masks_for(model, 4)
        for name in WEIGHTS:
            weight, old = model.get_parameter(name), plain.get_parameter(name)
            assert torch.equal(weight[~masks[name]].view(torch.uint8), old[~masks[name]].view(torch.uint8))
            assert selected(model)[name].left is None
    else:
        assert all(chosen.left is not None for chosen in selected(model).values())
    train(model, optimizer, batches(2))
    end = bits(model)
    Delta.from_model(model).save(tmp_path / "delta.safetensors")
    delta = Delta.load(tmp_path / "delta.safetensors")
    assert same(bits(delta.apply_(plain)), end)
    assert same(bits(delta.revert_(plain)), start)
    assert same(bits(delta.revert_(model)), start)


def test_entries_that_left_unchanged_are_not_remembered():
    model = make()
    sparsify(model, patterns_from(masks_for(model, 1)))
    reselect(model, None, patterns_from(masks_for(model, 2)), leaving="keep")
    assert all(chosen.left is None for chosen in selected(model).values())


# ---- state dicts, copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leaving", ["revert", "keep"])
def test_a_resumed_run_continues_bit_for_bit(dtype, leaving):
    model = make(dtype)
    fresh, options = copy.deepcopy(model), {"lr": 0.01, "weight_decay": 0.3}
    sparsify(model, patterns_from(masks_for(model, 1)))
    optimizer = SparseAdamW(model, **options)
    train(model, optimizer, batches(3))
    reselect(model, optimizer, patterns_from(masks_for(model, 2)), leaving=leaving)
    train(model, optimizer, batches(2, seed=5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    sparsify(fresh, patterns(model))
    resumed = SparseAdamW(fresh, **options)
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for one, its in ((model, optimizer), (fresh, resumed)):
        train(one, its, batches(2, seed=6))
        reselect(one, its, patterns_from(masks_for(one, 3)), leaving=leaving)
        train(one, its, batches(2, seed=7))
    assert same(bits(model), bits(fresh))
    mine, theirs = Delta.from_model(model), Delta.from_model(fresh)
    assert mine.fingerprint == theirs.fingerprint and len(mine) == len(theirs)
    for name, change in mine.changes.items():
        assert all(torch.equal(t, theirs.changes[name].tensors()[key]) for key, t in change.tensors().items())


def test_copies_and_other_dtypes_remember_what_left():
    model = make(torch.float32)
    sparsify(model, patterns_from(masks_for(model, 1)))
    optimizer = SparseAdamW(model, lr=0.05)
    train(model, optimizer, batches(2))
    reselect(model, optimizer, patterns_from(masks_for(model, 2)), leaving="keep")
    twin = copy.deepcopy(model)
    assert len(Delta.from_model(twin)) == len(Delta.from_model(model)) > sum(map(len, patterns(model).values()))
    twin.to(torch.bfloat16)
    delta = Delta.from_model(twin)
    start = make(torch.float32).to(torch.bfloat16)
    assert same(bits(delta.apply_(start)), bits(twin))


# ---- a late choice -----------------------------------------------------------------------------------------------


def test_a_late_choice_is_made_on_the_trained_model_which_then_starts_afresh():
    model = make(torch.bfloat16)
    start, seen = bits(model), []

    def choose() -> dict[str, Pattern]:
        seen.append(bits(model))
        return patterns_from(masks_for(model, len(seen)))

    def short_training() -> None:
        optimizer = SparseAdamW(model, lr=0.1)
        train(model, optimizer, batches(2))
        reselect(model, optimizer, patterns_from(masks_for(model, 9)), leaving="keep")
        train(model, optimizer, batches(2))

    late = select_late(model, choose, short_training)
    assert len(seen) == 2 and same(seen[0], start) and not same(seen[1], start)
    assert late == patterns_from(masks_for(model, 2))
    assert same(bits(model), start) and type(model.up) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_a_late_choice_that_fails_leaves_the_pretrained_model():
    model = make()
    start = bits(model)

    def failing() -> None:
        train(model, SparseAdamW(model, lr=0.1), batches(1))
        raise FloatingPointError("diverged")

    with pytest.raises(FloatingPointError, match="diverged"):
        select_late(model, lambda: patterns_from(masks_for(model, 1)), failing)
    assert same(bits(model), start) and type(model.up) is nn.Linear


# ---- errors --------------------------------------------------------------------------------------------------------


def _two_groups(model: nn.Module) -> SparseAdamW:
    return SparseAdamW([{"params": [leaf]} for leaf in sparseft.parameters(model)])


WRONG = {
    "leaving": (lambda m, o, p: reselect(m, o, p, leaving="stay"), ValueError, "leaving must be one of"),
    "nothing": (lambda m, o, p: reselect(m, o, {}), ValueError, "at least one weight"),
    "unknown name": (lambda m, o, p: reselect(m, o, p | {"x": p["up.weight"]}), ValueError, "no parameter 'x'"),
    "shape": (lambda m, o, p: reselect(m, o, p | {"up.weight": p["embed.weight"]}), ValueError, "is for shape"),
    "no pattern": (lambda m, o, p: reselect(m, o, {"up.weight": 3}), TypeError, "must be a Pattern, got int"),
    "plain model": (lambda m, o, p: reselect(make(), o, p), ValueError, "must be sparsified"),
    "torch's optimizer": (
        lambda m, o, p: reselect(m, torch.optim.AdamW(sparseft.parameters(m)), p), TypeError, "must be a SparseAdamW"),
    "another model's": (
        lambda m, o, p: reselect(m, SparseAdamW(sparsify(make(), p)), p), ValueError, "trains none"),
    "drop-in": (
        lambda m, o, p: reselect(m, SparseAdamW(make(), density=0.1), p), ValueError, "drop-in door"),
    "several groups": (lambda m, o, p: reselect(m, _two_groups(m), p), ValueError, "'down.weight' has no leaf yet"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors_change_nothing(case):
    call, kind, match = WRONG[case]
    model = make()
    everything = patterns_from(masks_for(model, 1))
    sparsify(model, {name: everything[name] for name in WEIGHTS[:3]})
    optimizer = SparseAdamW(model, lr=0.01)
    train(model, optimizer, batches(2))
    before, now = bits(model), patterns(model)
    with pytest.raises(kind, match=match):
        call(model, optimizer, patterns_from(masks_for(model, 2)))
    assert same(bits(model), before) and patterns(model) == now
