"""SparseTrainer: the plain Trainer's loss, exact resumption, and nothing but the selected entries changed."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

import sparseft
from sparseft.data import IGNORE, Collator, Encoder, Examples, tokenize
from sparseft.delta import Delta
from sparseft.layers import selected
from sparseft.schedules import DropAndGrow, SelectAgain
from sparseft.trainer import SparseConfig, SparseTrainer, SparseTrainingArguments

from .tiny import PAIRS, VOCABULARY, gpt2, llama, tokenizer

SPARSE = SparseConfig(density=0.1, tile=(8, 8), tile_budget=0.5, batches=2)


def examples(rows=PAIRS) -> Examples:
    return tokenize(rows, Encoder(tokenizer()))


def trainer(model, folder: Path, sparse: SparseConfig = SPARSE, callbacks=(), data=None, **options) -> SparseTrainer:
    defaults = {"per_device_train_batch_size": 4, "max_steps": 4, "save_strategy": "no", "disable_tqdm": True,
                "use_cpu": True, "seed": 3}  # fmt: skip
    arguments = SparseTrainingArguments(output_dir=str(folder), **{**defaults, **options})
    data = examples() if data is None else data
    return SparseTrainer(model, arguments, sparse=sparse, train_dataset=data, eval_dataset=data,
                         data_collator=Collator.of(tokenizer()), callbacks=list(callbacks))  # fmt: skip


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Catch(TrainerCallback):
    """Keeps the leaves' gradients as the optimizer would see them."""

    def __init__(self):
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({name: chosen.values.grad.clone() for name, chosen in selected(model).items()})


# ---- loss ---------------------------------------------------------------------------------------------------------

# The loss is computed in fp32 from the model's logits: the same terms in the same way, summed in another order. With
# n terms that differ by at most n roundings each, the relative difference stays below 2 n 2^-24; 2^-16 for n = 128.
RELATIVE = 2.0**-16


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("count", [None, 57])
def test_the_loss_is_the_models_own_from_all_logits(make, count, tmp_path):
    model = make()
    batch = Collator.of(tokenizer())(list(examples(PAIRS[:6])))
    one = trainer(model, tmp_path)
    items = None if count is None else torch.tensor(count)
    loss = one.compute_loss(model, dict(batch), num_items_in_batch=items)
    extra = {} if count is None else {"num_items_in_batch": items}
    torch.testing.assert_close(loss, model(**batch, **extra).loss, rtol=RELATIVE, atol=0)


def test_logits_exist_only_where_there_is_a_loss(tmp_path):
    model, shapes = llama(), []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    one = trainer(model, tmp_path)
    data = examples(PAIRS[:6])
    batch = Collator.of(tokenizer())(list(data))
    one.compute_loss(model, dict(batch))
    _, outputs = one.compute_loss(model, dict(batch), return_outputs=True)
    assert shapes[0] == (data.answer_tokens, VOCABULARY)
    assert outputs.logits.shape == (*batch["labels"].shape, VOCABULARY)


def test_label_smoothing_falls_back_to_all_logits(tmp_path):
    model = llama()
    batch = Collator.of(tokenizer())(list(examples(PAIRS[:6])))
    smooth = trainer(model, tmp_path, label_smoothing_factor=0.1).compute_loss(model, dict(batch))
    logits = model(**{**batch, "labels": None}).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    wanted = labels != IGNORE
    true = -logits[wanted].gather(1, labels[wanted][:, None]).mean()
    torch.testing.assert_close(smooth, 0.9 * true - 0.1 * logits[wanted].mean(), rtol=RELATIVE, atol=0)


def test_evaluation_loss_is_the_mean_over_batches_of_the_models_own(tmp_path):
    model = llama()
    one = trainer(model, tmp_path, per_device_eval_batch_size=25)
    batch = Collator.of(tokenizer())(list(examples()))
    with torch.no_grad():
        torch.testing.assert_close(one.evaluate()["eval_loss"], float(model(**batch).loss), rtol=RELATIVE, atol=0)


def test_predictions_get_all_logits(tmp_path):
    data = examples(PAIRS[:4])
    logits = trainer(llama(), tmp_path).predict(data).predictions
    assert logits.shape == (4, max(len(item["input_ids"]) for item in data), VOCABULARY)


# ---- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"activation_checkpointing": True}, {"bf16": True}, {"lr_scheduler_type": "linear", "warmup_steps": 2},
    {"max_grad_norm": 0.01}, {"train_sampling_strategy": "random"}, {"gradient_accumulation_steps": 3},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("make", [llama, gpt2])
def test_training_changes_selected_entries_only(make, options, tmp_path):
    model = make()
    before = state(model)
    one = trainer(model, tmp_path, **options)
    one.train()
    chosen = selected(model)
    assert chosen
    for name, weight in model.state_dict().items():
        changed = weight != before[name]
        mask = chosen[name].pattern.to_mask() if name in chosen else torch.zeros(1, dtype=torch.bool)
        assert not (changed.reshape(-1, changed.shape[-1]) & ~mask).any() or "lm_head" in name
        if name in chosen:
            assert changed.any(), name
    assert one.delta().metadata["skipped_steps"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss(dtype, tmp_path):
    model = llama(dtype=dtype)
    one = trainer(model, tmp_path, max_steps=60, learning_rate=0.03, per_device_eval_batch_size=25)
    before = one.evaluate()["eval_loss"]
    one.train()
    assert one.evaluate()["eval_loss"] < before - 1  # nat


def test_accumulated_batches_give_the_gradient_of_one_large_batch(tmp_path):
    rows = [
        *PAIRS[:5],
        {"prompt": "Why?", "completion": "A long answer, which a mean of means would weigh too little."},
    ]
    caught = {}
    for size, accumulate in ((6, 1), (2, 3)):
        catch = Catch()
        model = llama(dtype=torch.float64)
        one = trainer(model, tmp_path, sparse=SparseConfig(density=0.1, tile=(8, 8), criterion="magnitude"),
                      callbacks=[catch], data=examples(rows), per_device_train_batch_size=size, max_steps=1,
                      gradient_accumulation_steps=accumulate, train_sampling_strategy="sequential",
                      max_grad_norm=0.0)  # fmt: skip
        one.train()
        (caught[size],) = catch.gradients
    norm = sum(float(g.square().sum()) for g in caught[6].values()) ** 0.5
    for name, gradient in caught[6].items():
        # d loss / d logits is a softmax in fp32 (VOCABULARY additions); all else is linear in it, in fp64
        assert float((gradient - caught[2][name]).norm()) <= VOCABULARY * 2.0**-23 * norm


def test_selection_is_the_same_every_time_and_leaves_the_random_state(tmp_path):
    patterns = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = llama()
        one = trainer(model, tmp_path)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        patterns.append(one.select())
        assert torch.equal(torch.get_rng_state(), before)
    assert patterns[0] == patterns[1]


def test_a_sparsified_model_keeps_its_patterns(tmp_path):
    model = llama()
    name = "model.layers.1.mlp.up_proj.weight"
    mask = torch.rand(model.get_parameter(name).shape) < 0.3
    sparseft.sparsify(model, {name: sparseft.Pattern.from_mask(mask, tile=(8, 8))})
    trainer(model, tmp_path).train()
    assert list(selected(model)) == [name]
    assert torch.equal(selected(model)[name].pattern.to_mask(), mask)


def test_a_nonfinite_gradient_skips_the_step_and_is_counted(tmp_path):
    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                next(iter(selected(model).values())).values.grad[0] = float("nan")

    one = trainer(llama(), tmp_path, callbacks=[Spoil()], max_grad_norm=0.0)
    one.train()
    assert one.delta().metadata["skipped_steps"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in one.model.state_dict().values())


# ---- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampling", ["group_by_length", "random"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(dtype, sampling, tmp_path):
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4, "train_sampling_strategy": sampling}
    whole = trainer(llama(dtype=dtype), tmp_path, **options)  # 7 steps an epoch: checkpoint 4 lies inside the first
    whole.train()
    for checkpoint in ("checkpoint-4", "checkpoint-8"):
        resumed = trainer(llama(dtype=dtype), tmp_path / "resumed", **{**options, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / checkpoint))
        assert resumed.state.global_step == 9
        assert_same_state(state(resumed.model), state(whole.model))
        for name, chosen in selected(whole.model).items():
            other = selected(resumed.model)[name]
            assert torch.equal(chosen.values, other.values)
            assert torch.equal(chosen.base, other.base)


def test_resuming_from_another_model_is_refused(tmp_path):
    trainer(llama(), tmp_path, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="pretrained model of the first run"):
        trainer(llama(seed=5), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resuming_without_the_optimizer_is_refused(tmp_path):
    trainer(llama(), tmp_path, save_strategy="steps", save_steps=2, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"optimizer\.pt"):
        trainer(llama(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_is_a_plain_model(tmp_path):
    model = llama()
    trainer(model, tmp_path, save_strategy="steps", save_steps=4).train()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert_same_state(state(plain), state(model))
    ids = torch.arange(10)[None]
    assert torch.equal(plain.eval()(ids).logits, model.eval()(ids).logits)


def test_early_stopping_brings_back_the_best_model(tmp_path):
    model = llama()
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    options = {"learning_rate": 0.3, "warmup_steps": 0, "lr_scheduler_type": "constant", "max_steps": 60}
    every = {
        f"{what}_{how}": value for what in ("eval", "save") for how, value in (("strategy", "steps"), ("steps", 5))
    }
    one = trainer(model, tmp_path, callbacks=[stop], load_best_model_at_end=True, **options, **every)
    one.eval_dataset = examples([{**row, "completion": row["completion"][::-1] + "."} for row in PAIRS])
    one.train()
    assert one.state.global_step < 60
    assert one.state.best_global_step < one.state.global_step
    best = AutoModelForCausalLM.from_pretrained(one.state.best_model_checkpoint)
    assert_same_state(state(best), state(model))
    assert one.evaluate()["eval_loss"] == pytest.approx(one.state.best_metric, rel=RELATIVE)


# ---- masks that move ----------------------------------------------------------------------------------------------

MOVING = {
    "grow": DropAndGrow(every=2, until=1.0, fraction=0.5, batches=2),
    "grow, kept": DropAndGrow(every=2, until=1.0, fraction=0.5, leaving="keep"),
    "again": SelectAgain(every=3, batches=2),
    "again, reverted": SelectAgain(every=3, batches=2, leaving="revert"),
}


def moving(name: str) -> SparseConfig:
    return dataclasses.replace(SPARSE, refresh=MOVING[name])


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_with_moving_entries_ends_as_the_uninterrupted_one(name, dtype, tmp_path):
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4}
    whole = trainer(llama(dtype=dtype), tmp_path, sparse=moving(name), **options)
    first = whole.select()
    whole.train()
    assert sparseft.patterns(whole.model) != first
    for checkpoint in ("checkpoint-4", "checkpoint-8"):
        resumed = trainer(llama(dtype=dtype), tmp_path / "r", sparse=moving(name), **{**options, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / checkpoint))
        assert_same_state(state(resumed.model), state(whole.model))
        assert sparseft.patterns(resumed.model) == sparseft.patterns(whole.model)
        mine, theirs = resumed.delta(), whole.delta()
        for weight, change in theirs.changes.items():
            for part, tensor in change.tensors().items():
                assert torch.equal(mine.changes[weight].tensors()[part], tensor), (weight, part)


@pytest.mark.parametrize("name", MOVING)
def test_the_delta_of_moving_entries_undoes_the_training(name, tmp_path):
    model = llama(dtype=torch.bfloat16)
    start = copy.deepcopy(model)
    one = trainer(model, tmp_path, sparse=moving(name), max_steps=8, bf16=True)
    one.train()
    trained = state(model)
    one.delta().save(tmp_path / "delta.safetensors")
    delta = Delta.load(tmp_path / "delta.safetensors")
    assert delta.metadata["sparse"]["refresh"] == dataclasses.asdict(MOVING[name])
    assert_same_state(state(delta.apply_(start)), trained)
    assert_same_state(state(delta.revert_(model)), state(llama(dtype=torch.bfloat16)))


@pytest.mark.parametrize("name", MOVING)
def test_the_best_model_comes_back_with_its_entries(name, tmp_path):
    model = llama()
    every = {
        f"{what}_{how}": value for what in ("eval", "save") for how, value in (("strategy", "steps"), ("steps", 1))
    }
    # the highest loss counts as best: that of an early step, after which entries have moved
    one = trainer(model, tmp_path, sparse=moving(name), load_best_model_at_end=True, greater_is_better=True,
                  metric_for_best_model="eval_loss", max_steps=6, learning_rate=0.03, **every)  # fmt: skip
    one.train()
    assert one.state.best_global_step < 4
    best = AutoModelForCausalLM.from_pretrained(one.state.best_model_checkpoint)
    assert_same_state(state(best), state(model))
    one.delta().apply_(plain := llama())
    assert_same_state(state(plain), state(best))
    one.model(torch.arange(10)[None], labels=torch.arange(10)[None]).loss.backward()
    assert all(len(c.values.grad) == len(c.pattern) for c in selected(model).values())


def test_scoring_batches_depend_on_the_number_alone(tmp_path):
    def ids(one: SparseTrainer, *args) -> list[list]:
        return [batch["input_ids"].tolist() for batch in one.scoring_batches(*args)]

    for sampling in ("group_by_length", "random"):
        one, other = (trainer(llama(), tmp_path, train_sampling_strategy=sampling) for _ in range(2))
        expected = [ids(one, 3, order) for order in (0, 5, 6)]
        assert [ids(other, 3, order) for order in (6, 0, 5)] == [expected[i] for i in (2, 0, 1)]
        assert expected[0] != expected[1] != expected[2]
        assert len(ids(one, 20)) == 7  # no more than an epoch has


def test_refresh_wants_what_it_needs(tmp_path):
    one = trainer(llama(), tmp_path, sparse=moving("grow"))
    sparseft.sparsify(one.model, one.select())
    one.optimizer = torch.optim.AdamW(sparseft.parameters(one.model))
    with pytest.raises(TypeError, match="needs a SparseAdamW"):
        one.train()
    with pytest.raises(ValueError, match="save_only_model"):
        trainer(llama(), tmp_path, sparse=moving("grow"), load_best_model_at_end=True, save_only_model=True,
                eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2)  # fmt: skip


# ---- selecting late -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"max_grad_norm": 0.0}], ids=str)
def test_a_late_selection_starts_from_the_pretrained_weights(options, tmp_path):
    model = llama()
    before, mode = state(model), model.training
    early = trainer(llama(), tmp_path, **options).select()
    torch.manual_seed(11)
    random = torch.get_rng_state()
    late = dataclasses.replace(SPARSE, score_after=9)  # an epoch has 7
    one = trainer(model, tmp_path, sparse=late, learning_rate=0.05, **options)
    torch.manual_seed(11)
    found = one.select()
    assert torch.equal(torch.get_rng_state(), random)
    assert_same_state(state(model), before)
    assert not selected(model) and model.training == mode
    assert found != early and sum(map(len, found.values())) == sum(map(len, early.values()))
    assert found == trainer(llama(), tmp_path, sparse=late, learning_rate=0.05, **options).select()
    one.train()
    assert sparseft.patterns(model) == found


# ---- the change ---------------------------------------------------------------------------------------------------


def test_the_delta_undoes_the_training_and_says_how_it_was_made(tmp_path):
    model = llama(dtype=torch.bfloat16)
    start = copy.deepcopy(model)
    one = trainer(model, tmp_path)
    one.train()
    trained = state(model)
    one.delta({"note": "x"}).save(tmp_path / "delta.safetensors")
    delta = Delta.load(tmp_path / "delta.safetensors")
    delta.apply_(start)
    assert_same_state(state(start), trained)
    delta.revert_(model)
    assert_same_state(state(model), state(llama(dtype=torch.bfloat16)))
    assert delta.metadata["data"] == examples().fingerprint
    assert delta.metadata["sparse"]["density"] == 0.1
    assert delta.metadata["training"]["learning_rate"] == SparseTrainingArguments.learning_rate
    assert (delta.metadata["steps"], delta.metadata["note"]) == (4, "x")
    json.dumps(delta.metadata)


# ---- settings -----------------------------------------------------------------------------------------------------


def test_a_dense_learning_rate_is_warned_about(tmp_path):
    with pytest.warns(UserWarning, match="learning_rate=5e-05"):
        trainer(llama(), tmp_path, learning_rate=5e-5)


@pytest.mark.parametrize("wrong", [
    {"density": 0.0}, {"density": 1.5}, {"tile_budget": 0}, {"criterion": "luck"}, {"allocation": "luck"},
    {"batches": 0}, {"structure": "rings"}, {"score_after": -1}, {"refresh": "rigl"},
    {"refresh": DropAndGrow(), "structure": "rows"},
], ids=str)  # fmt: skip
def test_wrong_settings_are_refused_at_once(wrong):
    name, *_ = wrong
    with pytest.raises((TypeError, ValueError), match=name):
        SparseConfig(**wrong)


def test_an_optimizer_without_the_selected_entries_is_refused(tmp_path):
    one = trainer(llama(), tmp_path)
    one.optimizer = torch.optim.AdamW(one.model.parameters())
    with pytest.raises(ValueError, match="sparsify the model first"):
        one.train()
