"""The command line from files to files, its errors (one line, exit code 2, nothing made) and its help."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sparseft import cli, finetune
from sparseft.data import IGNORE, Encoder
from sparseft.evaluation import continuations
from sparseft.trainer import SparseTrainingArguments

from .tiny import PAIRS, llama, tokenizer, write_jsonl

COMMANDS = ("train", "eval", "inspect", "apply", "revert", "doctor")
HELD_OUT = [{**PAIRS[3], "keys": [[PAIRS[3]["completion"]]]}, {"question": "q", "choices": ["a", "b"], "answer": 1}]


def call(*arguments: object) -> str:
    """Output of a command that must succeed."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def error(*arguments: object) -> str:
    """The one line on stderr of a command that must fail on bad input."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder with a saved model, training rows, rows to evaluate on, and a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    llama(dtype=torch.bfloat16).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "NOTES.txt").write_text("kept")
    write_jsonl(folder / "train.jsonl", PAIRS)
    write_jsonl(folder / "held.jsonl", HELD_OUT)
    call(*train(folder))
    return folder


def train(folder: Path, *options: object, name: str = "run") -> list[object]:
    return ["train", folder / "model", folder / "train.jsonl", "--eval", folder / "held.jsonl",
            "--runs", folder / "runs", "--name", name, "--density", 0.1, "--tile", 8, "--steps", 6,
            "--batch-size", 4, "--max-new-tokens", 3, "--device", "cpu", "--train-targets", *options]  # fmt: skip


def test_a_run_folder_tells_the_whole_story(start):
    run = start / "runs" / "run"
    metrics, config = (json.loads((run / name).read_text()) for name in ("metrics.json", "config.json"))
    model = AutoModelForCausalLM.from_pretrained(start / "model")
    eligible = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    assert metrics["model_weights"] == sum(p.numel() for p in model.parameters())
    assert metrics["eligible_weights"] == eligible
    entries = round(0.1 * eligible)
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    width = model.config.hidden_size
    rows, rest = divmod(metrics["selected_weights"] - entries - norms, width)
    assert rest == 0 and 0 < rows <= 0.1 * entries / width  # those of the answers' most frequent tokens
    assert 0 < metrics["changed_weights"] <= metrics["selected_weights"]
    assert metrics["delta_bytes"] == (run / "delta.safetensors").stat().st_size
    assert metrics["steps"] == 6
    assert set(metrics["evals"]["held"]["after"]) == {"key_fact_accuracy", "edit_distance", "loss", "choice_accuracy"}
    assert sum(metrics["seconds_by_stage"].values()) <= metrics["seconds"]
    assert metrics["peak_memory_bytes"] > 0
    assert config["sparse"]["tile"] == [8, 8]
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    (sample,) = finetune.samples(run)
    assert sample["reference"] == PAIRS[3]["completion"]
    assert {"before", "after", "set", "prompt", "keys"} <= sample.keys()
    assert not (run / "checkpoints").exists()


def test_apply_and_revert_are_exact_and_leave_a_plain_model(start, tmp_path):
    delta = start / "runs" / "run" / "delta.safetensors"
    made = tmp_path / "made"
    call("apply", delta, start / "model", "--output", made)
    before, after = weights(start / "model"), weights(made)
    changed = sum(int((before[name] != after[name]).sum()) for name in before)
    assert changed == json.loads(delta.with_name("metrics.json").read_text())["changed_weights"]
    assert (made / "NOTES.txt").read_text() == "kept"
    plain = AutoModelForCausalLM.from_pretrained(made)
    assert plain.dtype == torch.bfloat16

    call("revert", delta, made, "--in-place")
    assert_same(weights(made), before)
    call("apply", delta, made, "--in-place")
    assert_same(weights(made), after)
    assert list(tmp_path.iterdir()) == [made]


def test_rehearsal_adds_the_models_own_answers(start):
    rows = [{"prompt": "Why?"}, {"question": "a"}]
    questions = write_jsonl(start / "questions.jsonl", rows)
    model, t = llama(dtype=torch.bfloat16), tokenizer()
    own = finetune.rehearsal(model, Encoder(t), rows, 5)
    for item, prompt in zip(own, ("<user>Why?<eos>\n<assistant>", "Question: a\nAnswer:"), strict=True):
        length = len(t(prompt).input_ids)
        assert t.decode(item["input_ids"][:length]) == prompt
        assert item["labels"] == [IGNORE] * length + item["input_ids"][length:]
        assert 1 <= len(item["input_ids"]) - length <= 5
        assert continuations(model, t, [item["input_ids"][:length]], 5) == [item["input_ids"][length:]]
    output = call(*train(start, "--rehearse", questions, name="rehearsed"))
    assert "2 of the model's own answers" in output
    assert "broken.jsonl, line 2" in error(
        *train(start, "--rehearse", write_jsonl(start / "broken.jsonl", [*rows[:1], {"text": "a"}]), name="bad")
    )


def test_inspect_shows_the_change_and_its_making(start):
    run = start / "runs" / "run"
    output = call("inspect", run / "delta.safetensors", "--top", 3)
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"{metrics['selected_weights']:,}" in output
    assert metrics["data_sha256"] in output


def test_eval_with_a_delta_gives_the_runs_figures(start, tmp_path):
    run = start / "runs" / "run"
    output = tmp_path / "metrics.json"
    call("eval", start / "model", start / "held.jsonl", "--delta", run / "delta.safetensors", "--output", output,
         "--max-new-tokens", 3)  # fmt: skip
    (found,) = json.loads(output.read_text()).values()
    assert found == json.loads((run / "metrics.json").read_text())["evals"]["held"]["after"]


def test_the_same_seed_gives_the_same_delta_and_resume_continues(start):
    call(*train(start, "--save-steps", 4, name="again"))
    again, run = start / "runs" / "again", start / "runs" / "run"
    (change, same) = (load_file(folder / "delta.safetensors") for folder in (run, again))
    assert_same(change, same)
    call(*train(start, "--save-steps", 4, "--resume", name="again"))
    assert_same(change, load_file(again / "delta.safetensors"))
    line = error(*train(start, "--save-steps", 4, "--resume", "--criterion", "taylor", name="again"))
    assert "'criterion': 'sampled'" in line and "'criterion': 'taylor'" in line
    assert_same(change, load_file(again / "delta.safetensors"))


@pytest.mark.parametrize("options", [
    ["--refresh", "spiel", "--refresh-every", 2, "--leaving", "keep", "--allocation", "row"],
    ["--refresh", "select", "--refresh-every", 2, "--structure", "rows-and-columns", "--score-after", 3],
], ids=["grow", "again"])  # fmt: skip
def test_moving_entries_and_late_selection_leave_an_exact_delta(start, options, tmp_path):
    call(*train(start, *options, "--save-steps", 4, name="moving"))
    run = start / "runs" / "moving"
    sparse = json.loads((run / "config.json").read_text())["sparse"]
    assert sparse["refresh"]["every"] == 2 and sparse["refresh"]["leaving"] == "keep"
    change = load_file(run / "delta.safetensors")
    call(*train(start, *options, "--save-steps", 4, "--resume", name="moving"))
    assert_same(change, load_file(run / "delta.safetensors"))
    made = tmp_path / "made"
    call("apply", run / "delta.safetensors", start / "model", "--output", made)
    call("revert", run / "delta.safetensors", made, "--in-place")
    assert_same(weights(made), weights(start / "model"))
    shutil.rmtree(run)


def test_evaluation_files_of_one_name_are_refused(start):
    (start / "other").mkdir()
    other = write_jsonl(start / "other" / "held.jsonl", HELD_OUT)
    assert "names must differ" in error(*train(start, "--eval", start / "held.jsonl", "--eval", other, name="twice"))
    assert not (start / "runs" / "twice").exists()


@pytest.mark.parametrize(("options", "message"), [
    (["--density", 0], "density"), (["--density", 1.5], "density"), (["--criterion", "luck"], "criterion"),
    (["--allocation", "luck"], "allocation"), (["--include", "nothing"], "nothing"), (["--dtype", "int3"], "dtype"),
    (["--device", "tpu9"], "device"), (["--tile", 1000], "tile"), (["--eval", "absent.jsonl"], "absent.jsonl"),
    (["--decay-to", "x"], "decay_to"), (["--max-length", 2], "max_length"), (["--name", "run"], "exists already"),
    (["--resume"], "no run to resume"), (["--structure", "rings"], "structure"), (["--refresh", "x"], "--refresh must"),
    (["--refresh-every", 3], "go with --refresh"), (["--leaving", "keep"], "go with --refresh"),
    (["--refresh", "rigl", "--leaving", "x"], "leaving"), (["--refresh", "rigl", "--structure", "rows"], "refresh"),
], ids=str)  # fmt: skip
def test_bad_options_end_in_one_line_and_make_nothing(start, options, message):
    before = sorted((start / "runs").rglob("*"))
    assert message in error(*train(start, *options, name="bad"))
    assert sorted((start / "runs").rglob("*")) == before


def test_a_broken_line_is_named(start):
    path = write_jsonl(start / "broken.jsonl", [*PAIRS[:2], {"prompt": "a"}])
    line = error("train", start / "model", path, "--runs", start / "none")
    assert "broken.jsonl, line 3" in line
    assert not (start / "none").exists()


def test_bad_deltas_and_models_leave_everything_as_it_was(start, tmp_path):
    good = start / "runs" / "run" / "delta.safetensors"
    model = tmp_path / "model"
    shutil.copytree(start / "model", model)
    llama(seed=7, dtype=torch.bfloat16).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    content = good.read_bytes()
    for name, bad in {"cut": content[:-5], "tampered": content[:-1] + bytes([content[-1] ^ 1]), "empty": b""}.items():
        (tmp_path / name).write_bytes(bad)
        assert name in error("apply", tmp_path / name, model, "--in-place")
        assert name in error("inspect", tmp_path / name)
    assert "another model" in error("apply", good, tmp_path / "other", "--in-place")
    assert "not applied" in error("revert", good, model, "--in-place")
    assert "either --output" in error("apply", good, model)
    assert "either --output" in error("apply", good, model, "--in-place", "--output", tmp_path / "x")
    assert "exists already" in error("apply", good, model, "--output", tmp_path / "other")
    assert "model folder" in error("apply", good, "some/name", "--in-place")
    assert "absent" in error("inspect", tmp_path / "absent")
    assert_same(weights(model), weights(start / "model"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "empty", "model", "other", "tampered"]


def test_debug_shows_where_an_error_came_from(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEFT_DEBUG", "1")
    result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "absent")])
    assert isinstance(result.exception, FileNotFoundError)


def test_the_commands_defaults_are_those_of_the_trainer():
    arguments = SparseTrainingArguments(output_dir="x")
    assert (cli.LEARNING_RATE, cli.WARMUP) == (arguments.learning_rate, arguments.warmup_steps)


def test_doctor_names_versions_and_kernels():
    output = call("doctor")
    for word in (torch.__version__, "masked_grad_", "scatter_delta_", "sparse_adamw_", "select_topk", "reference"):
        assert word in output


def test_python_dash_m_prints_the_doctors_report_without_transformers():
    code = "import runpy, sys\ntry: runpy.run_module('sparseft', run_name='__main__')\n" \
           "except SystemExit: pass\nprint('transformers' in sys.modules)"  # fmt: skip
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "masked_grad_" in run.stdout
    assert run.stdout.strip().endswith("False")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_command(command):
    output = call(command, "--help")
    assert "Example:" in output
    assert command in call("--help")
