"""The accuracy study: its scorer against naive scoring, its methods, its plan, its store, and a whole small study."""

import copy
import dataclasses
import inspect
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bench.quality import hypotheses, plan, report, tasks
from bench.quality.execute import Bench, execute, pack_hits
from bench.quality.likelihood import Tree, answer, batches_by_length, bounds, encode, text_loss, tree_likelihoods
from bench.quality.methods import METHODS, MasterAdamW, Setting, rank_density
from bench.quality.plan import Run, Scale, choose_rate, text, todo, tuning
from bench.quality.store import Store
from bench.quality.tasks import Item, Task
from bench.quality.training import Schedule, batches, loss_of, train
from bench.search import against_tests
from sparseft.layers import selected
from sparseft.optim import SparseAdamW

from . import tiny

LABELS = (" card lost", " card", " cash", " card late", " cash")


def items(count: int, seed: int = 0, labels: tuple[str, ...] = LABELS[:4]) -> list[Item]:
    mix = random.Random(seed)
    words = ["where", "is", "my", "card?", "money", "gone", "a"]
    return [Item(" ".join(mix.choices(words, k=mix.randint(1, 9))), labels, mix.randrange(len(labels)))
            for _ in range(count)]  # fmt: skip


def task(name: str = "toy", ends: bool = True) -> Task:
    return Task(name, items(40, 1), items(8, 2), items(10, 3), ends=ends, per_character=not ends)


# ---- likelihoods ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def naive(model, prompt: list[int], label: list[int]) -> float:
    """One forward pass per label, with a plain causal mask; summed in fp64."""
    ids = torch.tensor([prompt + label])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return -F.cross_entropy(logits, torch.tensor(label), reduction="sum").item()


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("ends", [True, False])
@torch.inference_mode()
def test_a_trees_likelihoods_are_the_naive_ones(make, attention, ends):
    model, tokenizer = make(dtype=torch.float64), tiny.tokenizer()
    model.set_attn_implementation(attention)
    model.eval()
    asked = items(7, labels=LABELS)  # of different lengths: there is padding
    trees = [encode(tokenizer, item, ends=ends) for item in asked]
    found = tree_likelihoods(model, trees, pad=0)
    for item, tree, values in zip(asked, trees, found, strict=True):
        prompt = tokenizer(item.prompt, add_special_tokens=False).input_ids
        for label, value in zip(item.labels, values, strict=True):
            ids = tokenizer(label, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * ends
            # fp32 logarithms of about 100 classes: about 12 tokens, each off by a few fp32 roundings of 5
            assert value == pytest.approx(naive(model, prompt, ids), abs=12 * 4 * 5 * 2**-24)
        assert len(tree.tokens) < len(prompt) + sum(len(label) + ends for label in item.labels)  # beginnings are shared


@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_the_loss_of_plain_text_is_the_naive_one_in_any_batches(tokens):
    model, tokenizer = tiny.llama(dtype=torch.float64), tiny.tokenizer()
    model.train()
    texts = [item.prompt + item.labels[item.answer] for item in items(9)]
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert len({len(row) for row in rows}) > 1
    naive_losses = [-naive(model, row[:1], row[1:]) for row in rows]
    expected = sum(naive_losses) / sum(len(row) - 1 for row in rows)
    # fp32 logarithms of about 100 classes, each off by a few fp32 roundings of 5, and their fp32 sum
    assert text_loss(model, tokenizer, texts, tokens=tokens) == pytest.approx(expected, rel=8 * 2**-24)
    assert model.training


def test_a_tree_shares_beginnings_and_keeps_its_branches_apart():
    tree = Tree.of([7, 8], [[1, 2], [1, 3], [1], [4], [1, 2]])
    assert tree.tokens == [7, 8, 1, 2, 3, 4]
    assert tree.parents == [-1, 0, 1, 2, 2, 1]
    assert tree.depths == [0, 1, 2, 3, 3, 2]
    assert tree.labels == [[2, 3], [2, 4], [2], [5], [2, 3]]
    expected = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 5]]
    assert [row.nonzero().squeeze(1).tolist() for row in tree.visible()] == expected


def test_some_labels_of_a_tree():
    tree = Tree.of([7, 8], [[1, 2], [1, 3], [4]])
    assert tree.trunk == 2
    assert tree.only([2, 1]) == Tree.of([7, 8], [[4], [1, 3]])


@pytest.mark.parametrize("ends", [True, False])
def test_bounds_hold_and_are_exact_for_the_right_label(ends):
    model, tokenizer = tiny.llama(dtype=torch.float64).eval(), tiny.tokenizer()
    asked = items(30, labels=LABELS)  # without ends, one label is the beginning of others
    trees = [encode(tokenizer, item, ends=ends) for item in asked]
    right = [item.answer for item in asked]
    exact = tree_likelihoods(model, trees, pad=0)
    found = bounds(model, trees, right, pad=0)
    off = 12 * 4 * 5 * 2**-24  # as above
    for label, values, highest in zip(right, exact, found, strict=True):
        assert highest[label] == pytest.approx(values[label], abs=off)
        assert all(bound >= value - off for bound, value in zip(highest, values, strict=True))
    assert any(
        bound > value + off for pair in zip(found, exact, strict=True) for bound, value in zip(*pair, strict=True)
    )


@pytest.mark.parametrize("rule", ["ends", "per character"])
def test_answers_follow_the_tasks_rule(rule):
    model, tokenizer = tiny.llama(dtype=torch.float64).eval(), tiny.tokenizer()
    asked = items(23)
    toy = Task("toy", [], [], asked, ends=rule == "ends", per_character=rule != "ends")
    found = answer(model, tokenizer, toy, asked, tokens=200)
    hits, losses = [], []
    for item in asked:
        prompt = tokenizer(item.prompt, add_special_tokens=False).input_ids
        sums = []
        for label in item.labels:
            ids = tokenizer(label, add_special_tokens=False).input_ids
            sums.append(naive(model, prompt, ids + [tokenizer.eos_token_id] * (rule == "ends")))
        scores = sums if rule == "ends" else [s / len(label) for s, label in zip(sums, item.labels, strict=True)]
        hits.append(scores.index(max(scores)) == item.answer)
        losses.append(-sums[item.answer])
    assert found.hits == hits
    assert 0 < found.accuracy < 1
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_batches_hold_every_item_once_and_no_more_tokens_than_allowed():
    lengths = [3, 50, 7, 7, 20, 1, 90, 12]
    made = batches_by_length(lengths, 60)
    assert sorted(itertools.chain(*made)) == list(range(8))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 60 for b in made)


# ---- methods and training ---------------------------------------------------------------------------------------


def setting(model_batches, rate: float = 1e-2, steps: int = 6) -> Setting:
    return Setting(rate, 0, lambda count: model_batches[:count], Schedule(steps))


def toy_batches(count: int):
    return batches(tiny.tokenizer(), task().train, size=4, count=count, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dense", {}),
        ("lora", {"r": 2}),
        ("shira", {"r": 2}),
        ("supertuning", {"density": 0.1}),
        ("sparse", {"density": 0.1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_method_learns_and_trains_what_it_says(method, options, dtype):
    model = tiny.llama(dtype=dtype)
    data = toy_batches(12)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    linears = [p for name, p in model.named_parameters() if "proj" in name]
    trainable = METHODS[method](model, setting(data, steps=12), **options)
    expected = {
        "dense": sum(sizes.values()),
        "lora": 2 * sum(sum(p.shape) for p in linears),
        "shira": 2 * sum(sum(p.shape) for p in linears),
        "supertuning": sum(int(p.numel() * (1 - (1 - 0.1))) for p in linears),
        "sparse": round(0.1 * sum(p.numel() for p in linears)),
    }
    assert trainable.count == expected[method]
    if method != "sparse":  # adapters compute in the model's dtype, masters are fp32
        assert {p.dtype for p in trainable.parameters} == {dtype}
    assert {p.dtype for group in trainable.optimizer.param_groups for p in group["params"]} == {torch.float32}
    losses = train(trainable, data, Schedule(12))
    assert sum(losses[-3:]) < sum(losses[:3])


def test_master_adamw_is_adamw_for_fp32_parameters():
    torch.manual_seed(0)
    mine = torch.nn.Linear(5, 3)
    theirs = copy.deepcopy(mine)
    ours = MasterAdamW(list(mine.parameters()), lr=0.1, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.1)
    for x in torch.randn(5, 4, 5):
        for model, optimizer in ((mine, ours), (theirs, reference)):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert all(p.grad is None for p in mine.parameters())


def test_master_adamw_keeps_steps_that_bf16_would_lose():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], lr=1e-3, weight_decay=0.0)
    for _ in range(8):  # one step of 1e-3 is less than half a bf16 spacing at 1
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.equal(weight, torch.full_like(weight, 1 - 8e-3))


def test_a_late_mask_starts_again_from_the_pretrained_weights():
    model = tiny.llama(dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    data = toy_batches(6)
    first = METHODS["sparse"](copy.deepcopy(model), setting(data), density=0.1, tile_budget=1.0)
    late = METHODS["sparse"](model, setting(data, rate=0.1), density=0.1, tile_budget=1.0, score_after=6)
    for name, old in before.items():
        assert torch.equal(model.get_parameter(name), old), name
    masks = [torch.cat([c.pattern.indices() for c in selected(t.model).values()]) for t in (first, late)]
    assert first.count == late.count
    assert not torch.equal(*(mask.sort().values for mask in masks))


def test_options_of_the_sparse_method_reach_the_model():
    data = toy_batches(2)
    model = tiny.llama()
    made = METHODS["sparse"](model, setting(data), as_lora=2, train_norms=True, density_power=0.5, train_targets=True)
    chosen = selected(model)
    linears = [p for name, p in model.named_parameters() if name.endswith("proj.weight")]
    lora = 2 * sum(sum(p.shape) for p in linears)
    assert sum(len(c.pattern) for name, c in chosen.items() if "proj" in name) == lora
    counts = torch.bincount(torch.cat([batch["labels"][batch["labels"] != -100] for batch in data]))
    rows = counts.argsort(descending=True, stable=True)[: lora // 10 // 32]
    mask = chosen["model.embed_tokens.weight"].pattern.to_mask()
    assert mask[rows].all() and mask.sum() == 32 * len(rows) > 0
    assert len(chosen["model.norm.weight"].pattern) == 32
    scattered, whole = (group["lr"] for group in made.optimizer.param_groups)
    parts = [c for name, c in chosen.items() if "proj" in name]
    density = sum(len(c.pattern) for c in parts) / sum(c.weight.numel() for c in parts)
    assert scattered == pytest.approx(1e-2 * (0.01 / density) ** 0.5) and whole == pytest.approx(1e-3)
    assert rank_density(tiny.llama(), 2) * sum(p.numel() for p in linears) == pytest.approx(lora)


@pytest.mark.parametrize("variant", [v for v in hypotheses.variants() if v.method == "sparse"], ids=lambda v: v.name)
def test_every_sparse_variant_can_be_prepared(variant):
    options = variant.arguments() | {"tile": (8, 8)}  # (64, 64) would be one tile per weight here
    options["density"] = 10 * options.get("density", 0.01)
    options["batches"] = min(options.get("batches", 2), 3)
    options["score_after"] = min(options.get("score_after", 0), 1)
    data = toy_batches(3)
    trainable = METHODS["sparse"](tiny.llama(), setting(data), **options)
    assert trainable.count > 0
    train(trainable, data[:1], Schedule(1))


def test_a_run_that_diverges_says_so():
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.inf
    trainable = METHODS["dense"](model, setting([]))
    with pytest.raises(FloatingPointError, match="step 0: the loss is"):
        train(trainable, toy_batches(1), Schedule(1))


def test_the_loss_is_that_of_the_whole_logits():
    model, [batch] = tiny.llama(dtype=torch.float64), toy_batches(1)
    expected = model(**batch).loss
    assert float(loss_of(model, batch)) == pytest.approx(float(expected), rel=1e-6)


def test_batches_depend_on_the_seed_alone_and_give_every_row_once_an_epoch():
    rows = task().train
    tokenizer = tiny.tokenizer()
    one = batches(tokenizer, rows, size=4, count=25, seed=3)
    assert all(torch.equal(a["input_ids"], b["input_ids"])
               for a, b in zip(one, batches(tokenizer, rows, size=4, count=25, seed=3), strict=True))  # fmt: skip
    assert any(a["input_ids"].shape != b["input_ids"].shape or not torch.equal(a["input_ids"], b["input_ids"])
               for a, b in zip(one, batches(tokenizer, rows, size=4, count=25, seed=4), strict=True))  # fmt: skip

    def contents(some) -> list[tuple[int, ...]]:
        return sorted(tuple(ids[mask.bool()].tolist()) for b in some
                      for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True))  # fmt: skip

    assert contents(one[:10]) == contents(one[10:20])  # 40 rows, 4 a batch
    assert len(one) == 25


def test_the_schedule_warms_up_and_never_stands_still():
    schedule = Schedule(steps=40, warmup=0.1)
    factors = [schedule.factor(step) for step in range(40)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert all(a > b > 0 for a, b in itertools.pairwise(factors[4:]))


# ---- plan, store, report ----------------------------------------------------------------------------------------

MINI = Scale("mini", steps=4, batch=4, tune_steps=2, rates=2, extensions=1, validation_rows=0, test_rows=0,
             other_rows=5, hellaswag_rows=4, text_rows=3, seeds=(0, 1), tasks=("toy", "other"),
             claims=("sparse-1%", "lora-r8"), tuned=(), finalists=(), screen=0, hypotheses=False,
             time_of="lora-r8")  # fmt: skip


def pretend(run: Run, accuracy: float, status: str = "ok") -> dict:
    """A finished run's row, as far as the plan looks at it."""
    return {"key": run.key, "variant": run.variant.name, "task": run.task, "role": run.role, "seed": run.seed,
            "rate": run.rate, "steps": run.steps, "status": status, "validation_accuracy": accuracy,
            "validation_loss": 1 - accuracy, "prepare_cpu_s": 5.0, "train_cpu_s": 10.0 * run.steps}  # fmt: skip


def test_the_plan_ends_and_repeats_nothing():
    rows, seen = [], []
    while runs := list(todo(rows, MINI)):
        seen.append(runs[0])
        rows.append(pretend(runs[0], accuracy=0.5))
    keys = [run.key for run in seen]
    assert len(set(keys)) == len(keys)
    assert [run.role for run in seen[:2]] == ["test", "test"]  # the untrained model
    tests = [(r.variant.name, r.task, r.seed) for r in seen if r.role == "test" and r.steps]
    assert sorted(tests) == sorted(itertools.product(MINI.claims, MINI.tasks, MINI.seeds))
    first = next(i for i, r in enumerate(seen) if r.seed == 1)
    assert all(r.seed == 1 or r.role == "time" for r in seen[first:])
    timed = [r for r in seen if r.role == "time"]
    assert {(r.variant.name, r.steps) for r in timed} == {("sparse-1%", 4)}  # equal cost: equal steps
    assert len(timed) == 4


def test_hypotheses_are_screened_at_the_rate_of_the_default():
    rows, seen = [], []
    scale = dataclasses.replace(MINI, screen=2, time_of="")
    while runs := list(todo(rows, scale)):
        seen.append(runs[0])
        best = runs[0].variant.name == "sparse-1%" and text(runs[0].rate) == "0.05"  # its tuned rate
        rows.append(pretend(runs[0], accuracy=0.6 if best else 0.5))
    screened = [run for run in seen if run.role == "screen"]
    assert {text(run.rate) for run in screened} == {"0.015"}
    assert {run.steps for run in screened} == {scale.tune_steps}
    varied = {v.name for h in hypotheses.HYPOTHESES if h.base in MINI.claims for v in h.variants}
    assert {(run.variant.name, run.seed) for run in screened} >= set(itertools.product(varied, scale.seeds))
    assert {run.seed for run in screened if run.variant.name == "sparse-1%"} == {1}  # with seed 0 it was tuned so
    assert [task for task, _ in itertools.groupby(run.task for run in screened)] == ["toy", "other"]


def test_finalists_are_tested_at_the_default_rate_with_the_first_task():
    rows, seen = [], []
    while runs := list(todo(rows, dataclasses.replace(MINI, finalists=("per-row",), time_of=""))):
        seen.append(runs[0])
        rows.append(pretend(runs[0], accuracy=0.5))
    finals = [(run.task, run.role, run.seed, text(run.rate)) for run in seen if run.variant.name == "per-row"]
    assert finals == [("toy", "test", 0, "0.015"), ("toy", "test", 1, "0.015")]


def test_an_interrupted_study_goes_on_where_it_was():
    def whole(rows):
        rows = list(rows)
        while runs := list(todo(rows, MINI)):
            rows.append(pretend(runs[0], accuracy=0.5))
        return [row["key"] for row in rows]

    complete = whole([])
    rows = [pretend(next(iter(todo([], MINI))), 0.5)]
    assert whole(rows) == complete


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ({1e-3: 0.4, 3e-3: 0.6, 3e-3 * 10**0.5: 0.5}, 3e-3),  # the upper edge is better: one more beyond it
        ({1e-3: 0.6, 3e-3: 0.4, 1e-3 / 10**0.5: 0.7}, 1e-3 / 10**0.5),
        ({1e-3: 0.6, 3e-3: 0.4, 1e-3 / 10**0.5: 0.5}, 1e-3),
        ({1e-3: 0.6, 3e-3: None, 1e-3 / 10**0.5: 0.5}, 1e-3),  # None: failed
        ({1e-3: None, 3e-3: None, 1e-3 / 10**0.5: None}, None),
    ],
)
def test_the_rate_is_tuned_on_the_validation_part(accuracies, expected):
    variant = hypotheses.Variant("a", "lora", {"r": 8}, hypotheses.ADAPTER_RATES)
    rows = []
    for _ in accuracies:
        rate, missing = choose_rate(rows, MINI, variant, "toy")
        assert rate is None
        accuracy = accuracies[min(accuracies, key=lambda known: abs(known - missing))]
        status = "ok" if accuracy is not None else "failed: step 3: the loss is nan"
        rows.append(pretend(tuning(MINI, variant, "toy", missing), accuracy or 0.0, status))
    assert choose_rate(rows, MINI, variant, "toy") == (expected, None)


def test_a_single_rate_is_not_tuned():
    assert choose_rate([], MINI, hypotheses.SHIPPED, "toy") == (1.5e-2, None)
    assert hypotheses.SHIPPED.options == hypotheses.SPARSE.options
    assert inspect.signature(SparseAdamW).parameters["lr"].default == 1.5e-2


def test_variants_have_different_names_and_settings_and_known_methods():
    all_variants = list(hypotheses.variants())
    assert len({v.name for v in all_variants}) == len(all_variants)
    keys = {json.dumps([v.method, v.options, v.rates if len(v.rates) == 1 else "tuned"], sort_keys=True)
            for v in all_variants}  # fmt: skip
    assert len(keys) == len(all_variants)
    assert {v.method for v in all_variants} <= METHODS.keys()
    names = {v.name for v in all_variants}
    assert all(h.base in names for h in hypotheses.HYPOTHESES)
    assert set(hypotheses.SMALL) <= {v.name for v in hypotheses.CLAIMS}
    assert {"banking77", "arc_easy"} == set(plan.FULL.tasks)


def test_the_hypotheses_stand_in_the_documentation():
    text = (Path(__file__).parents[1] / "docs" / "quality.md").read_text()
    assert [h.name for h in hypotheses.HYPOTHESES if f"| {h.name} |" not in text] == []


def test_the_store_keeps_rows_and_refuses_what_is_not_one(tmp_path):
    store = Store(tmp_path / "deep" / "runs.csv")
    assert store.rows() == []
    store.add({"key": "a", "options": '{"a": 1, "b": "x,y"}', "rate": 1e-3, "seed": 0, "hits": "x0e1"})
    store.add({"key": "b", "status": "failed: step 1: the loss is nan"})
    assert store.rows() == [
        {"key": "a", "options": '{"a": 1, "b": "x,y"}', "rate": 1e-3, "seed": 0.0, "hits": "x0e1"},
        {"key": "b", "status": "failed: step 1: the loss is nan"},
    ]
    before = store.path.read_bytes()
    for row, message in (({"key": "a"}, "a is in .* already"), ({"key": "c", "colour": 1}, "unknown columns")):
        with pytest.raises(ValueError, match=message):
            store.add(row)
    assert store.path.read_bytes() == before
    with store.only_one(), pytest.raises(RuntimeError, match="another process"), Store(store.path).only_one():
        pass


@pytest.mark.parametrize("hits", [[True], [False, False, True], [i % 3 == 0 for i in range(801)]])
def test_hits_survive_the_csv(hits):
    assert report.unpack_hits(pack_hits(hits), len(hits)) == hits


def test_intervals():
    low, high = report.wilson(8, 10)  # Wilson's interval solves |p - 0.8| = z sqrt(p (1 - p) / 10)
    for p in (low, high):
        assert abs(p - 0.8) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 10), rel=1e-6)
    assert report.mean_and_half([0.5]) == (0.5, None)
    mean, half = report.mean_and_half([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / math.sqrt(3)))


def test_paired_differences_are_question_by_question():
    def row(seed: int, hits: list[bool]) -> dict:
        return {"seed": seed, "rows": len(hits), "hits": pack_hits(hits)}

    base = [row(0, [True, False, False, True]), row(1, [True, True, False, False])]
    better = [row(0, [True, True, True, True]), row(1, [True, True, True, False]), row(2, [True] * 4)]
    mean, half, seeds = report.paired(better, base)
    differences = [0, 0.5, 1, 0]  # averaged over the two seeds that both have
    deviation = math.sqrt(sum((d - 0.375) ** 2 for d in differences) / 3)
    assert (mean, half, seeds) == (0.375, pytest.approx(1.959964 * deviation / 2), 2)
    assert report.paired(better, [row(7, [True] * 4)]) is None


# ---- a whole study ----------------------------------------------------------------------------------------------


def test_a_whole_study_in_small(tmp_path):
    """Every role, resumed after each run as if it had been interrupted."""
    tiny_rates = dataclasses.replace(MINI, seeds=(0,))
    tokenizer = tiny.tokenizer()
    bench = Bench(lambda: (tiny.llama(), tokenizer), {"toy": task(), "other": task("other", ends=False)},
                  task("general", ends=False))  # fmt: skip
    path = tmp_path / "runs.csv"
    for _ in range(100):
        runs = list(todo(Store(path).rows(), tiny_rates))
        if not runs:
            break
        if runs[0].variant.name == "sparse-1%":  # the tiny model has few weights
            bigger = dataclasses.replace(runs[0].variant, options={"density": 0.1, "tile": (8, 8)})
            row = execute(dataclasses.replace(runs[0], variant=bigger), bench) | {"key": runs[0].key}
        else:
            row = execute(runs[0], bench)
        Store(path).add(row)
    rows = Store(path).rows()
    assert {(r["variant"], r["task"], r["role"]) for r in rows} >= set(
        itertools.product(MINI.claims, MINI.tasks, ("tune", "test"))
    )
    assert all(r["status"] == "ok" for r in rows)
    tested = [r for r in rows if r["role"] == "test"]
    assert all(r["low"] <= r["accuracy"] <= r["high"] and r["rows"] == 10 and r["other_rows"] == 5 for r in tested)
    assert all("accuracy" not in r for r in rows if r["role"] == "tune")  # tuning never sees the test part
    text = report.summary(rows)
    for name in ("untrained", "sparse-1%", "lora-r8"):
        assert f"| {name} |" in text
    assert "### toy, equal steps (mini)" in text


# ---- the data ---------------------------------------------------------------------------------------------------


def test_missing_data_are_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEFT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"missing: banking77/train.csv.*set SPARSEFT_DATA"):
        tasks.data_folder()


def test_a_split_is_a_partition_and_always_the_same():
    rows = items(50)
    train_part, validation = tasks.split(rows)
    assert len(validation) == 5
    assert sorted(map(str, train_part + validation)) == sorted(map(str, rows))
    assert tasks.split(rows) == (train_part, validation)
    assert tasks.sample(rows, 7) == tasks.sample(rows, 20)[:7]


def test_the_real_data(data_folder):
    root = data_folder("banking77").parent
    bank = tasks.banking77(root)
    assert (len(bank.train) + len(bank.validation), len(bank.test)) == (2511, 800)
    assert len(set(bank.test[0].labels)) == 20
    assert {item.answer for item in bank.test} == set(range(20))
    data_folder("arc_easy")
    arc = tasks.arc_easy(root)
    assert (len(arc.train) + len(arc.validation), len(arc.test)) == (2251, 2376)
    for item in arc.train + arc.validation + arc.test:
        assert 3 <= len(item.labels) <= 5
        assert 0 <= item.answer < len(item.labels)
        assert all(label.strip() for label in item.labels)
    data_folder("hellaswag")
    assert len(tasks.hellaswag(root).test) == 10042


def test_a_choice_is_held_against_the_best_tested_setting_over_common_seeds():
    def tested(options: dict, rate: float, seed: int, right: int, **fields) -> dict:
        row = {"method": "sparse", "role": "test", "status": "ok", "options": json.dumps(options, sort_keys=True),
               "steps": plan.FULL.steps, "batch": plan.FULL.batch}  # fmt: skip
        hits = pack_hits([question < right for question in range(100)])
        return {**row, "rate": rate, "seed": seed, "rows": 100, "hits": hits, **fields}

    mine, other = {"criterion": "grad"}, {"criterion": "random"}
    rows = [tested(mine, 0.1, 0, 90), tested(mine, 0.1, 1, 80), tested(other, 0.1, 1, 95), tested(other, 0.2, 0, 92),
            tested(other, 0.2, 1, 80), tested(other, 0.3, 2, 99), tested(other, 0.4, 0, 100, method="lora"),
            tested(other, 0.4, 0, 100, role="tune"), tested(other, 0.4, 0, 100, steps=24.0)]  # fmt: skip
    found = against_tests(mine, 0.1, rows)
    assert found["points_below"] == pytest.approx(1.0)  # 92 and 80 against 90 and 80; a single seed does not count
    assert (found["settings"], found["seeds"], found["best"]) == (2, 2, '{"criterion": "random"} at 0.2')
    assert 0 < found["half_interval"] < 2
    assert against_tests(other, 0.2, rows)["points_below"] == pytest.approx(0.0)
    assert against_tests(mine, 0.2, rows) is None
    assert against_tests(mine, 0.1, [*rows, rows[0]]) == found  # a run that is there twice is one
