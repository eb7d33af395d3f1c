"""Every criterion and structure against a dense float64 reference written here, and the limits on the score buffer."""

import copy
import dataclasses
import itertools
import logging
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparseft.pattern import matrix_shape
from sparseft.selection import CRITERIA, Criterion, criteria, eligible, gallop, losia, lottery, sampled
from sparseft.selection.draw import generator, race
from tests.tiny import select_entries as select

from .test_selection import (
    MODELS,
    TILE,
    VOCAB,
    assert_same,
    choose_freely,
    digests,
    groups_of,
    make_gpt2,
    make_llama,
    make_mlp,
    make_olmoe,
    masks_of,
    mlp_batches,
    mlp_loss,
    text_batches,
)


def wide(which: str, n: int):
    """A float64 model, n batches and their loss function."""
    make, batches, loss_fn = MODELS[which]
    data = [x.double() if isinstance(x, Tensor) else x for x in batches(n)]
    return make().double(), data, loss_fn


# ---- references -------------------------------------------------------------------------------------------------


def gradients(model, batch, loss_fn) -> dict[str, np.ndarray]:
    weights = {name: model.get_parameter(name) for name in eligible(model)}
    loss = loss_fn(model, batch) if loss_fn else model(**batch).loss
    found = torch.autograd.grad(loss, list(weights.values()))
    return {name: g.double().numpy() for name, g in zip(weights, found, strict=True)}


def rows_of(batch):
    if isinstance(batch, Tensor):
        return [batch[i : i + 1] for i in range(len(batch))]
    return [{key: v[i : i + 1] for key, v in batch.items()} for i in range(len(batch["input_ids"]))]


def squares_per_token(model, batch, loss_fn) -> dict[str, np.ndarray]:
    """Every token gets a copy of every weight; the squared gradients of the copies, summed."""
    names = {w.data_ptr(): name for name, w in eligible(model).items()}
    copies: dict[str, Tensor] = {}

    class Copies(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is nn.functional.linear and args[1].data_ptr() in names:
                x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else (kwargs or {}).get("bias")
                own = weight.detach().expand(*x.shape[:-1], *weight.shape).clone().requires_grad_()
                copies[names[weight.data_ptr()]] = own
                y = (own @ x[..., None])[..., 0]
                return y if bias is None else y + bias
            if function is torch.addmm and args[2].data_ptr() in names:
                bias, x, weight = args
                own = weight.detach().expand(len(x), *weight.shape).clone().requires_grad_()
                copies[names[weight.data_ptr()]] = own
                return (x[:, None] @ own)[:, 0] + bias
            return function(*args, **(kwargs or {}))

    with Copies():
        loss = loss_fn(model, batch) if loss_fn else model(**batch).loss
    found = torch.autograd.grad(loss, list(copies.values()))
    return {n: (g.flatten(0, -3) ** 2).sum(0).numpy() for n, g in zip(copies, found, strict=True)}


def after_training(model, data, loss_fn, lr: float) -> dict[str, np.ndarray]:
    trained = copy.deepcopy(model)
    weights = eligible(trained)
    optimizer = torch.optim.AdamW(list(weights.values()), lr=lr, weight_decay=0.0)
    for batch in data:
        trained.zero_grad()
        (loss_fn(trained, batch) if loss_fn else trained(**batch).loss).backward()
        optimizer.step()
    return {name: (w - model.get_parameter(name)).detach().numpy() for name, w in weights.items()}


def sm3(gradient_list: list[np.ndarray]) -> np.ndarray:
    rows, columns = (np.zeros(n) for n in gradient_list[0].shape)
    for g in gradient_list:
        seen = np.array([[min(r, c) for c in columns] for r in rows]) + g**2
        rows, columns = seen.max(1), seen.max(0)
    return np.outer(rows, columns)


def evenly_spread(n: int, m: int) -> np.ndarray:
    def order(size: int) -> list[int]:
        """Lines in the order of van der Corput's sequence: t's binary digits behind the point, mirrored."""
        found: list[int] = []
        for t in range(2 * size):
            line = int(size * sum((t >> d & 1) / 2 ** (d + 1) for d in range(t.bit_length())))
            found += [line] if line not in found else []
        return found

    rows, columns = order(n), order(m)
    score = np.array([[1 / (1 + min(rows.index(i), columns.index(j))) for j in range(m)] for i in range(n)])
    for step in range(max(n, m)):
        score[step * n // max(n, m), step * m // max(n, m)] = 2
    return score


def reference(criterion: str, model, data, loss_fn) -> dict[str, np.ndarray]:
    weights = {name: w.detach().numpy() for name, w in eligible(model).items()}
    if criterion == "lottery":
        return {name: np.abs(d) for name, d in after_training(model, data, loss_fn, 1e-4).items()}
    if criterion == "fisher-token":
        parts = [squares_per_token(model, batch, loss_fn) for batch in data]
        return {name: sum(part[name] for part in parts) for name in weights}
    if criterion == "fisher-sample":
        parts = [gradients(model, row, loss_fn) for batch in data for row in rows_of(batch)]
        return {name: sum(part[name] ** 2 for part in parts) for name in weights}
    if criterion == "pafi":
        return {name: 1 / np.abs(w) for name, w in weights.items()}
    if criterion == "shira-struct":
        return {name: evenly_spread(*matrix_shape(w.shape)).reshape(w.shape) for name, w in weights.items()}
    parts = [gradients(model, batch, loss_fn) for batch in data]
    each = {name: [part[name] for part in parts] for name in weights}
    if criterion == "spiel-ma":
        return {name: sm3([g.reshape(-1, g.shape[-1]) for g in each[name]]).reshape(w.shape)
                for name, w in weights.items()}  # fmt: skip
    if criterion == "losia":
        scores = {}
        for name, w in weights.items():
            importance = uncertainty = np.zeros_like(w)
            for g in each[name]:
                s = np.abs(w * g - (w * g) ** 2 / 2)
                importance = 0.85 * importance + 0.15 * s
                uncertainty = 0.85 * uncertainty + 0.15 * np.abs(s - importance)
            scores[name] = importance * uncertainty
        return scores
    if criterion == "sampled":
        scores = reference("balanced", model, data, loss_fn)
        for name, score in scores.items():  # over waiting times, by the inverse of their distribution
            uniform = torch.rand(score.shape, generator=generator(name, 0), dtype=torch.float64).numpy()
            scores[name] = score / np.maximum(-np.log1p(-uniform), 2.0**-25)
        return scores
    if criterion == "balanced":
        scores = {}
        for name, w in weights.items():
            g = sum(each[name]).reshape(matrix_shape(w.shape))
            spread = np.sqrt(np.outer((g**2).sum(1), (g**2).sum(0)) / (g**2).sum())
            scores[name] = np.abs(np.divide(g, spread, out=np.zeros_like(g), where=spread > 0)).reshape(w.shape)
        return scores
    by_sum = {"grad": lambda g, w: g, "sift": lambda g, w: g, "taylor": lambda g, w: g * w,
              "snip": lambda g, w: g * w, "gallop": lambda g, w: g / (np.abs(w) + 1e-8)}  # fmt: skip
    return {name: np.abs(by_sum[criterion](sum(each[name]), w)) for name, w in weights.items()}


# ---- criteria ---------------------------------------------------------------------------------------------------

# the others: test_selection.py
NEW = (
    "sift",
    "balanced",
    "sampled",
    "snip",
    "gallop",
    "pafi",
    "shira-struct",
    "fisher-sample",
    "spiel-ma",
    "losia",
    "lottery",
)
CASES = [(which, criterion) for criterion in NEW for which in ("mlp", "llama", "olmoe")]
CASES += [(which, "fisher-token") for which in ("mlp", "llama", "gpt2")]


@pytest.mark.parametrize(("which", "criterion"), CASES)
def test_a_criterion_is_the_dense_reference(which, criterion):
    model, data, loss_fn = wide(which, 3)
    scores = reference(criterion, model, data, loss_fn)
    for allocation in ("global", "layer"):
        patterns = select(model, data, criterion=criterion, density=0.07, allocation=allocation, tile=TILE,
                          tile_budget=1.0, structure="entries", loss_fn=loss_fn)  # fmt: skip
        chosen = [choose_freely(group, 0.07) for group in groups_of(scores, allocation)]
        assert_same(patterns, {name: mask for group in chosen for name, mask in group.items()})


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_race_is_won_with_chances_in_proportion(k):
    """How often each set of k comes first, against the chances of a draw without replacement, in 4,000 races."""
    weights, races = np.array([1.0, 2.0, 0.0, 5.0, 0.5]), 4000
    scores = torch.tensor(weights, dtype=torch.float32) * torch.tensor([1, -1, 1, -1, 1])
    chances: dict[frozenset, float] = {}
    for order in itertools.permutations(range(5), k):
        chance, left = 1.0, weights.sum()
        for i in order:
            chance, left = chance * weights[i] / left, left - weights[i]
        chances[frozenset(order)] = chances.get(frozenset(order), 0.0) + chance
    found = dict.fromkeys(chances, 0)
    for seed in range(races):
        found[frozenset(race(scores, "w", seed).abs().topk(k).indices.tolist())] += 1
    for winners, chance in chances.items():  # 5 standard deviations: one of 30 in 60,000 such tests lies outside
        assert abs(found[winners] - races * chance) <= 5 * (races * chance * (1 - chance)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_race_has_no_place_for_zeros_and_no_infinite_score(dtype):
    most = torch.finfo(dtype).max
    scores = torch.tensor([0.0, most, -most, torch.finfo(dtype).tiny] * 250, dtype=dtype)
    kept = scores.clone()
    found = race(scores, "w", 3)
    assert torch.equal(scores, kept) and found.dtype == dtype
    assert bool(found.isfinite().all()) and not found[::4].any()
    assert bool((found[1::4] > 0).all() and (found[2::4] < 0).all() and (found[3::4] > 0).all())
    assert not torch.equal(found, race(scores, "w", 4)) and not torch.equal(found, race(scores, "v", 3))
    assert torch.equal(found, race(scores, "w", 3))


@pytest.mark.parametrize("structure", ["rows", "columns", "rows-and-columns", "blocks", "channels", "subnet"])
def test_only_entries_are_drawn(structure):
    model, data, _ = wide("llama", 2)
    settings = {"density": 0.1, "tile": TILE, "structure": structure}
    drawn = digests(select(model, data, criterion="sampled", **settings))
    assert drawn == digests(select(model, data, criterion="balanced", **settings))


def test_any_criterion_can_be_drawn_by():
    model, data, _ = wide("llama", 2)
    settings = {"density": 0.1, "tile": TILE}
    drawn = sampled(CRITERIA["grad"])
    found = [digests(select(model, data, criterion=rule, seed=seed, **settings))
             for rule, seed in (("grad", 0), ("sampled", 0), (drawn, 0), (drawn, 1))]  # fmt: skip
    assert all(one != two for one, two in itertools.combinations(found, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_pafi_is_the_reverse_of_magnitude_to_the_last_bit(dtype):
    tiny_bits = torch.arange(6).to(torch.int16).view(torch.bfloat16).to(dtype)  # zero and subnormals where there are
    weight = torch.cat([torch.randn(300).to(dtype), -tiny_bits, torch.tensor([torch.finfo(dtype).max], dtype=dtype)])
    weight = torch.cat([weight, torch.nextafter(weight[:20].float(), torch.tensor(9.0)).to(dtype)])
    score = CRITERIA["pafi"].score("", weight, None, 0)
    assert bool((score >= 0).all()) and bool(score.isfinite().all())
    assert torch.equal(score[:, None] > score, weight.abs()[:, None] < weight.abs())


@pytest.mark.parametrize("size", [1, 2, 7, 64, 576, 1000])
def test_any_beginning_of_the_spread_lines_is_even(size):
    order = criteria._spread(size).argsort(descending=True)
    assert sorted(order.tolist()) == list(range(size))
    for lines in (2**i for i in range(1, size.bit_length() - 1)):
        gaps = order[:lines].sort().values.diff(append=torch.tensor([size]))
        assert int(gaps.max() - gaps.min()) <= 1


def test_every_criterion_has_its_source_in_the_docstring():
    rows = [line.split("|") for line in criteria.__doc__.splitlines() if line.startswith("| ")][1:]
    told = {name.strip(): source for _, names, _, source, _ in rows for name in names.split(",")}
    assert told.keys() == CRITERIA.keys()
    assert all(re.search(r"20\d\d|SNIP|FISH", source) for source in told.values())


def test_a_batch_of_single_samples_and_per_sample_fisher_agree():
    model, data, _ = wide("llama", 2)
    rows = [row for batch in data for row in rows_of(batch)]
    settings = {"density": 0.1, "tile": TILE}
    assert digests(select(model, rows, criterion="fisher", **settings)) == digests(
        select(model, data, criterion="fisher-sample", **settings)
    )
    assert digests(select(model, data, criterion="fisher", **settings)) != digests(
        select(model, data, criterion="fisher-sample", **settings)
    )


def test_samples_of_tuples_and_of_what_is_no_batch():
    model = make_mlp().double()
    loss = lambda m, b: ((m(b[0]) - b[1]) ** 2).mean() * b[2]  # noqa: E731
    x, y = torch.randn(4, 13).double(), torch.randn(4, 5).double()
    settings = {"density": 0.1, "tile": TILE, "loss_fn": loss}
    assert digests(select(model, [(x, y, 2.0)], criterion="fisher-sample", **settings)) == digests(
        select(model, [(x[i : i + 1], y[i : i + 1], 2.0) for i in range(4)], criterion="fisher", **settings)
    )
    with pytest.raises(ValueError, match=r"batch 0 must have as many rows in every tensor, got \[3, 4\]"):
        select(model, [(x, y[:3], 2.0)], criterion="fisher-sample", **settings)
    with pytest.raises(TypeError, match="batch 0 must hold tensors"):
        select(model, ["text"], criterion="fisher-sample", **settings)


def test_samples_without_labels_are_left_out():
    """A batch's loss counts them not; alone, their loss is a mean over no token."""
    model, [batch], _ = wide("llama", 1)
    silent = {**batch, "labels": batch["labels"].clone()}
    silent["labels"][1] = -100
    settings = {"density": 0.1, "tile": TILE, "criterion": "fisher-sample"}
    assert digests(select(model, [silent], **settings)) == digests(select(model, [rows_of(batch)[0]], **settings))
    with pytest.raises(ValueError, match="batch 1 must have a row whose labels are not all -100, got none"):
        select(model, [batch, rows_of(silent)[1]], **settings)
    with pytest.raises(ValueError, match="batch 0 must have a row"):
        select(model, [{key: value[:0] for key, value in batch.items()}], **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["fisher-sample", "fisher-token", "gallop", "losia", "spiel-ma", "lottery"])
def test_narrow_weights_are_scored_in_fp32(criterion, dtype):
    """What the scores are made of is fp32 whatever the weights' dtype: the k chosen ones are not rounded to it."""
    seen: dict[str, Tensor] = {}
    rule = CRITERIA[criterion]

    def watched(name, weight, total, seed):
        seen[name] = total
        return rule.score(name, weight, total, seed)

    model = make_llama().to(dtype)
    start = {name: w.detach().clone() for name, w in model.named_parameters()}
    watching = Criterion(watched, rule.accumulate, rule.run, rule.state)
    patterns = select(model, text_batches(2), criterion=watching, density=0.05, tile=TILE)
    assert all(total.dtype == torch.float32 for total in seen.values())
    assert sum(map(len, patterns.values())) == round(0.05 * sum(w.numel() for w in eligible(model).values()))
    assert all(torch.equal(w, start[name]) for name, w in model.named_parameters())  # lottery: rewound to the bit


def test_lottery_trains_bf16_weights_by_fp32_masters():
    """A step of 1e-6 is lost in bf16 weights; twenty of them are not lost in their masters."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    changes: dict[str, Tensor] = {}
    rule = lottery(lr=1e-6)

    def watched(name, weight, total, seed):
        changes[name] = total.clone()
        return total

    data = [torch.ones(2, 8).bfloat16()] * 20
    select(model, data, criterion=Criterion(watched, rule.accumulate, rule.run), density=0.5, loss_fn=mlp_loss)
    # Adam's step on a gradient of constant sign is lr to within 1 part in 10; a master near 1 resolves 2^-24
    assert torch.all((changes["0.weight"] + 20e-6).abs() < 0.1 * 20e-6 + 20 * 2.0**-24)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: gallop(0.0), "eps must be positive, got 0.0"), (lambda: losia(1.0), r"decay must lie in \[0, 1\), got 1"),
    (lambda: losia(0.5, -1), "uncertainty_decay must lie in"), (lambda: lottery(0), "lr must be positive, got 0"),
], ids=["gallop", "losia", "losia-2", "lottery"])  # fmt: skip
def test_criteria_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("criterion", ["fisher-token", "fisher-sample", "wanda", "lottery"])
def test_gradient_checkpointing_changes_no_choice(criterion, reentrant):
    model, data = make_llama().train(), text_batches(2)
    settings = {"criterion": criterion, "density": 0.1, "tile": TILE}
    expected = digests(select(model, data, **settings))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert digests(select(model, data, **settings)) == expected


def test_per_token_fisher_needs_linear_layers_and_a_gradient():
    with pytest.raises(ValueError, match=r"gate\.weight belongs to none; exclude (\[.*\])") as error:
        select(make_olmoe(), text_batches(1), criterion="fisher-token")
    told = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"]
    assert str(error.value).endswith(str(told))
    assert select(make_olmoe(), text_batches(1), criterion="fisher-token", exclude=told)
    model = make_mlp()
    with pytest.raises(ValueError, match="batch 0: the loss gives no gradient for any layer"):
        select(model, mlp_batches(1), criterion="fisher-token", loss_fn=lambda m, x: m.norm.weight.sum())
    with pytest.raises(ValueError, match=r"batch 0: the gradient of down\.weight's output is not finite"):
        select(model, mlp_batches(1), criterion="fisher-token", loss_fn=lambda m, x: (m(x) * torch.inf).sum())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


# ---- structures -------------------------------------------------------------------------------------------------


def greedily(units: list[tuple[float, int]], k: int) -> list[int]:
    """Positions of the units (score, entries) taken, best first, while that brings the entries closer to k."""
    taken, entries = [], 0
    for i in sorted(range(len(units)), key=lambda i: -units[i][0]):
        if abs(entries + units[i][1] - k) < abs(entries - k):
            taken.append(i)
            entries += units[i][1]
        else:
            break
    return taken


@pytest.mark.parametrize("which", ["mlp", "llama", "gpt2", "olmoe"])
def test_blocks_are_the_dense_reference(which):
    model, data, loss_fn = wide(which, 2)
    scores = reference("grad", model, data, loss_fn)
    blocks, units = [], []
    for name, s in scores.items():
        s = s.reshape(matrix_shape(s.shape))
        for r in range(0, s.shape[0], TILE[0]):
            for c in range(0, s.shape[1], TILE[1]):
                block = np.s_[r : r + TILE[0], c : c + TILE[1]]
                blocks.append((name, block))
                units.append((s[block].mean(), s[block].size))
    expected = {name: np.zeros(matrix_shape(s.shape), bool) for name, s in scores.items()}
    for i in greedily(units, round(0.1 * sum(s.size for s in scores.values()))):
        expected[blocks[i][0]][blocks[i][1]] = True
    patterns = select(model, data, criterion="smt", density=0.1, tile=TILE, loss_fn=loss_fn)
    found = masks_of(patterns, scores)
    for name, mask in expected.items():
        np.testing.assert_array_equal(found[name].reshape(mask.shape), mask, err_msg=name)
        if name in patterns:  # a block is a tile
            assert len(patterns[name].tiles) == sum(
                mask[r : r + TILE[0], c : c + TILE[1]].any()
                for r in range(0, mask.shape[0], TILE[0]) for c in range(0, mask.shape[1], TILE[1])
            )  # fmt: skip


@pytest.mark.parametrize("which", ["mlp", "llama", "gpt2"])
@pytest.mark.parametrize("allocation", ["global", "layer"])
def test_subnets_are_the_dense_reference(which, allocation):
    model, data, loss_fn = wide(which, 3)
    expected = {}
    for name, s in reference("losia", model, data, loss_fn).items():
        s = s.reshape(matrix_shape(s.shape))
        n, m = (max(1, round(0.1**0.5 * size)) for size in s.shape)
        # k is rounded before it becomes a share of rows and columns; these shapes are far from a half
        rows, columns = np.argsort(-s.sum(1))[:n], np.argsort(-s.sum(0))[:m]
        tried = [(rows, np.argsort(-s[rows].sum(0))[:m]), (np.argsort(-s[:, columns].sum(1))[:n], columns),
                 (rows, columns)]  # fmt: skip
        best = max(tried, key=lambda choice: s[np.ix_(*choice)].sum())
        expected[name] = np.zeros(s.shape, bool)
        expected[name][np.ix_(*best)] = True
    patterns = select(model, data, criterion="losia", density=0.1, allocation=allocation, tile=TILE, loss_fn=loss_fn)
    assert_same(patterns, {n: mask.reshape(model.get_parameter(n).shape) for n, mask in expected.items()})


@pytest.mark.parametrize("allocation", ["global", "layer"])
@pytest.mark.parametrize("criterion", ["magnitude", "grad", "s2ft"])
def test_heads_and_channels_are_the_dense_reference(criterion, allocation):
    model, data, _ = wide("llama", 2)
    if criterion == "s2ft":
        scores = {n: CRITERIA["random"].score(n, w, None, 0).double().numpy() for n, w in eligible(model).items()}
    elif criterion == "grad":
        scores = reference("grad", model, data, None)
    else:
        scores = {n: w.detach().abs().numpy() for n, w in eligible(model).items()}
    expected = {name: np.zeros(s.shape, bool) for name, s in scores.items()}
    groups: dict[str, list] = {}
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        for kind, producer, consumer, count, rows, columns in (
            ("v", f"{attention}v_proj.weight", f"{attention}o_proj.weight", 2, 8, 16),  # two query heads read a head
            ("u", f"{mlp}up_proj.weight", f"{mlp}down_proj.weight", 44, 1, 1),
        ):
            for i in range(count):
                unit = [(producer, np.s_[i * rows : (i + 1) * rows]),
                        (consumer, np.s_[:, i * columns : (i + 1) * columns])]  # fmt: skip
                parts = [scores[name][where] for name, where in unit]
                size = sum(p.size for p in parts)
                groups.setdefault("" if allocation == "global" else f"{layer}{kind}", []).append(
                    (sum(p.sum() for p in parts) / size, size, unit))  # fmt: skip
    for units in groups.values():
        k = round(0.2 * sum(size for _, size, _ in units))
        for i in greedily([(score, size) for score, size, _ in units], k):
            for name, where in units[i][2]:
                expected[name][where] = True
    patterns = select(model, data, criterion=criterion, structure="channels", density=0.2, allocation=allocation,
                      tile=TILE)  # fmt: skip
    assert_same(patterns, expected)


def test_channels_need_couples():
    with pytest.raises(ValueError, match=r"needs weights named v_proj with o_proj, .*up\.weight"):
        select(make_mlp(), criterion="s2ft")
    model = make_llama()
    model.config.num_key_value_heads = 3
    with pytest.raises(ValueError, match=r"3 heads do not divide the 16 rows of model\.layers\.0\.self_attn\.v_proj"):
        select(model, criterion="s2ft")


# ---- exact k ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["global", "layer", "kind", "mixed"])
@pytest.mark.parametrize("k", [1, 17, 997, 5000])
def test_k_is_exact(allocation, k):
    model = make_llama()
    weights = eligible(model)
    patterns = select(model, criterion="magnitude", k=k, allocation=allocation, tile=TILE)
    assert sum(map(len, patterns.values())) == k
    if allocation == "layer":  # shares by size, rounded by largest remainder: never a whole entry away
        total = sum(w.numel() for w in weights.values())
        assert all(abs(len(patterns.get(n, ())) - k * w.numel() / total) < 1 for n, w in weights.items())


def test_k_is_checked():
    with pytest.raises(ValueError, match="k must be at most 666, the number of eligible entries, got 667"):
        select(make_mlp(), criterion="magnitude", k=667)
    with pytest.raises(ValueError, match="k must be positive, got 0"):
        select(make_mlp(), criterion="magnitude", k=0)


# ---- limited memory ---------------------------------------------------------------------------------------------

LARGEST = 44 * 32 * 4  # bytes of the largest weight's sum


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("tile_budget", [0.2, 1.0])
@pytest.mark.parametrize("criterion", ["grad", "taylor", "fisher", "fisher-sample", "fisher-token", "gallop", "losia",
                                       "spiel-ma", "wanda", "magnitude", "random", "smt"])  # fmt: skip
def test_limited_memory_changes_nothing(criterion, tile_budget, n):
    model, data = make_llama(), text_batches(n)
    settings = {"criterion": criterion, "density": 0.05, "tile": TILE, "tile_budget": tile_budget}
    allocation = {"allocation": "mixed"} if criterion in ("grad", "random") else {}
    free = select(model, data, **settings, **allocation)
    small = LARGEST * (2 if criterion == "losia" else 1)
    assert digests(select(model, data, memory=small, **settings, **allocation)) == digests(free)
    assert digests(select(model, data, memory=10**9, **settings, **allocation)) == digests(free)
    assert digests(select(model, data, **settings, **allocation)) == digests(free)  # and again the same


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_every_criterion_repeats_itself_whatever_others_do(criterion):
    """The same digests from an equal model, another state of the generators, and an iterable that is read once."""
    found = []
    for noise in (1, 2):
        model, data = make_llama().train(), text_batches(2)
        torch.manual_seed(noise)
        found.append(digests(select(model, iter(data), criterion=criterion, density=0.3, tile=TILE)))
    assert found[0] == found[1]


@pytest.mark.parametrize("criterion", [name for name, rule in CRITERIA.items() if rule.accumulate is not None])
def test_one_batch_is_chosen_from_as_it_streams_as_from_sums(criterion):
    """A run that says it does not hand over all at once has its parts summed; the same parts, one of them."""
    model, data = make_llama(), text_batches(1)
    rule, sums = CRITERIA[criterion], []

    class Summing:
        one_part = False

        def __init__(self, run):
            self._run, self.in_groups = run, run.in_groups
            self.prepared, self.shape = run.prepared, run.shape

        def __call__(self, number, batch, take):
            held = []
            self._run(number, batch, lambda *part: held.append(part))
            sums.append(len(held))
            for part in held:
                take(*part)

    summing = dataclasses.replace(rule, run=lambda *args: Summing(rule.run(*args)))
    settings = {"density": 0.3, "tile": TILE, "tile_budget": 0.5}
    assert digests(select(model, data, criterion=criterion, **settings)) == digests(
        select(model, data, criterion=summing, **settings)
    )
    assert sums[0] >= len(eligible(model))  # every part was there before the first was summed


@pytest.mark.parametrize("allocation", ["layer", "kind"])
def test_limited_memory_with_several_budgets(allocation):
    model, data = make_llama(), text_batches(2)
    settings = {"density": 0.05, "tile": TILE, "tile_budget": 0.3, "allocation": allocation}
    assert digests(select(model, data, memory=LARGEST, **settings)) == digests(select(model, data, **settings))


def test_limited_memory_bounds_the_buffer(caplog, monkeypatch):
    """Bytes of sums alive at once, and how many passes that costs."""
    model, data = make_llama(), text_batches(3)
    weights, alive, most, passes = eligible(model), {}, 0, 0
    rule = CRITERIA["grad"]

    def accumulate(total, part, weight):
        nonlocal most
        alive[id(weight.untyped_storage())] = total.numel() * 4
        rule.accumulate(total, part, weight)
        most = max(most, sum(alive.values()))

    def score(name, weight, total, seed):
        return total.clone()

    def loss(m, batch):
        nonlocal passes
        passes += 1
        if batch is data[0]:
            alive.clear()  # a new sweep
        return m(**batch).loss

    limit = 2 * LARGEST
    with caplog.at_level(logging.INFO, "sparseft"):
        select(model, data, criterion=Criterion(score, accumulate), density=0.05, tile=TILE, tile_budget=1.0,
               loss_fn=loss, memory=limit)  # fmt: skip
    assert 0 < most <= limit
    assert passes % len(data) == 0
    sweeps = passes // len(data)
    everything = 4 * sum(w.numel() for w in weights.values())
    assert everything / limit <= sweeps <= 2 * everything / limit + 1  # two groups side by side never fit together
    assert f"memory: {sweeps} sweeps over the batches" in caplog.text


def test_limited_memory_with_a_shuffling_loader():
    model, data = make_mlp().train(), torch.cat(mlp_batches(4))
    loader = torch.utils.data.DataLoader(data, batch_size=5, shuffle=True)
    settings = {"density": 0.1, "criterion": "fisher", "tile": TILE, "loss_fn": mlp_loss}
    free = select(model, loader, **settings)
    torch.manual_seed(12)
    assert digests(select(model, loader, memory=37 * 13 * 4, **settings)) == digests(free)


def test_limited_memory_refuses():
    model, data = make_llama(), text_batches(2)
    with pytest.raises(TypeError, match=r"batches must have a length where memory is limited.*got generator"):
        select(model, (b for b in data), memory=10**6)
    with pytest.raises(ValueError, match=rf"memory must be at least {LARGEST} bytes, what the sums of .*gate_proj"):
        select(model, data, memory=LARGEST - 1)
    with pytest.raises(ValueError, match=r"memory must be at least \d+ bytes: this criterion looks at all weights"):
        select(model, data, criterion="lottery", memory=LARGEST)
    with pytest.raises(ValueError, match="memory must not be negative, got -1"):
        select(model, data, memory=-1)


def test_gpt2_and_tied_layers_are_covered_by_the_per_token_run():
    """A weight used by two layers gives the sum over both uses."""
    model = make_gpt2().double()
    mlp = model.transformer.h[1].mlp
    mlp.c_fc.weight = model.transformer.h[0].mlp.c_fc.weight
    ids = torch.randint(VOCAB, (2, 7), generator=torch.Generator().manual_seed(3))
    totals: dict[str, Tensor] = {}
    rule = CRITERIA["fisher-token"]

    def watched(name, weight, total, seed):
        totals[name] = total.clone()
        return total

    select(model, [{"input_ids": ids, "labels": ids}], criterion=Criterion(watched, rule.accumulate, rule.run))
    untied = copy.deepcopy(model)
    untied.transformer.h[1].mlp.c_fc.weight = nn.Parameter(untied.transformer.h[1].mlp.c_fc.weight.detach().clone())
    parts = squares_per_token(untied, {"input_ids": ids, "labels": ids}, None)
    name = "transformer.h.{}.mlp.c_fc.weight"
    torch.testing.assert_close(totals[name.format(0)], torch.from_numpy(parts[name.format(0)] + parts[name.format(1)]))
