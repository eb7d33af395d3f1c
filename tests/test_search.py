"""auto, ablate and sweep: their plans on made-up figures, and whole commands on a tiny model."""

import json
import math
from dataclasses import replace
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from sparseft import ablate as ablation
from sparseft import auto, cli, plot
from sparseft.cli_search import show_tries
from sparseft.finetune import RunConfig
from sparseft.journal import Journal
from sparseft.layers import selected
from sparseft.trainer import SparseConfig
from sparseft.trials import Outcome, Trials, split

from .tiny import PAIRS, llama, tokenizer, write_jsonl


class Silent:
    def stage(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...


def outcome(loss: float = 1.0, select: float = 0.0, step: float = 1.0, measure: float = 0.0) -> Outcome:
    return Outcome(loss, 0.0, 1, 1, 1.0, select, step, measure, [0.5 * loss, 0.5 * loss])


# ---- successive halving -----------------------------------------------------------------------------------------


def test_a_plan_uses_the_time_and_no_more():
    for count in (2, 3, 5, 16):
        for seconds in (30.0, 200.0, 5000.0):
            probe = outcome(select=1.5, step=0.25, measure=0.5)
            try:
                made = auto.plan(count, seconds, probe, most_steps=10**6)
            except ValueError:
                assert seconds < 2 * (1.5 + 0.5 + auto.LEAST_STEPS * 0.25) + 1e-9
                continue

            def time(steps: int, n: int = made.count) -> float:
                rounds = auto.Plan(n, steps).rounds
                return n * 1.5 + sum(size * (0.5 + 0.25 * length) for size, length in rounds)

            assert time(made.steps) <= seconds < time(made.steps + 1)
            assert made.count == count or time(auto.LEAST_STEPS, made.count + 1) > seconds


def test_the_rounds_halve_and_double():
    assert auto.Plan(16, 5).rounds == [(16, 5), (8, 10), (4, 20), (2, 40)]
    assert auto.Plan(5, 3).rounds == [(5, 3), (3, 6), (2, 12)]


def test_the_longest_trial_is_bounded():
    assert auto.plan(8, 1e9, outcome(), most_steps=30).rounds[-1] == (2, 28)
    with pytest.raises(ValueError, match=r"two settings of 4 steps need 0\.1 more, 0\.1 are left"):
        auto.plan(8, 7.9, outcome(), most_steps=30)


def halved(losses: dict[float, float], made: auto.Plan, seconds: float = 1e9, most_steps: int = 16):
    """Trials whose loss is made up by density, a second per step."""

    def trial(sparse, steps):
        return outcome(losses[sparse.density] / math.log2(1 + steps))

    candidates = [SparseConfig(density=d) for d in losses]
    tries = auto.halve(candidates, made, trial, seconds, most_steps)
    return tries, sum(one.steps for one in tries)


def test_halving_keeps_the_better_half_and_the_first_and_finds_the_best():
    tries, spent = halved({0.1: 4.0, 0.2: 1.0, 0.3: 3.0, 0.4: 2.0}, auto.Plan(4, 8))
    assert [(one.round, one.steps, one.sparse.density) for one in tries] == [
        (0, 8, 0.1), (0, 8, 0.2), (0, 8, 0.3), (0, 8, 0.4), (1, 16, 0.1), (1, 16, 0.2)
    ]  # fmt: skip
    assert auto.best(tries).sparse.density == 0.2
    assert spent == 4 * 8 + 2 * 16


def test_a_round_that_would_be_late_is_shorter_or_does_not_begin():
    losses = {0.1: 1.0, 0.2: 2.0, 0.3: 3.0, 0.4: 4.0}
    for late, steps in ((32.0, 16), (31.5, 15), (18.0, 9), (17.9, None), (0.0, None), (-5.0, None)):
        tries, spent = halved(losses, auto.Plan(4, 8), 32 + late)
        assert [one.steps for one in tries if one.round == 1] == ([] if steps is None else [steps, steps])
        assert spent == 32 + 2 * (steps or 0) and spent <= max(32, 32 + late)
        assert auto.best(tries).sparse.density == 0.1


def test_the_last_round_has_the_time_that_is_left():
    losses = dict.fromkeys((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), 1.0)
    for seconds, most, steps in ((500, 1000, 186), (500, 100, 100), (128, 1000, None)):
        tries, spent = halved(losses, auto.Plan(8, 8), seconds, most)
        assert [one.steps for one in tries if one.round == 1] == [16] * 4
        assert [one.steps for one in tries if one.round == 2] == ([] if steps is None else [steps, steps])
        assert spent <= seconds


def test_selecting_again_after_an_interruption_changes_no_round():
    """Of eight settings, the second round's trials select again in one of the two searches."""

    def rounds(again: float) -> list[int]:
        made: dict[float, int] = {}

        def trial(sparse, steps):
            made[sparse.density] = made.get(sparse.density, 0) + 1
            select = 5.0 if made[sparse.density] == 1 and sparse.density != 0.1 else again
            return outcome(sparse.density, select=select)

        candidates = [SparseConfig(density=d / 10) for d in range(1, 9)]
        return [one.steps for one in auto.halve(candidates, auto.Plan(8, 8), trial, 400.0, 1000)]

    assert rounds(0.0) == rounds(7.0) and len(rounds(0.0)) == 8 + 4 + 2
    assert rounds(0.0)[-1] == (400 - 7 * 5 - 8 * 8 - 4 * 16) // 2


def test_a_journal_of_another_version_is_refused(start, tmp_path):
    trials = Trials(config(start), str(start / "held.jsonl"), Silent(), tmp_path / "trials.jsonl")
    trials(trials.config.sparse, 1)
    head, line = (tmp_path / "trials.jsonl").read_text().splitlines()
    old = json.loads(line)
    del old["outcome"]["row_losses"]
    (tmp_path / "trials.jsonl").write_text(f"{head}\n{json.dumps(old)}\n")
    again = Trials(config(start), str(start / "held.jsonl"), Silent(), tmp_path / "trials.jsonl")
    with pytest.raises(ValueError, match=r"trials\.jsonl: its trials must have .*row_losses.*; remove it"):
        again(again.config.sparse, 1)


def test_equal_losses_go_to_the_earlier_setting():
    tries, _ = halved(dict.fromkeys((0.3, 0.1, 0.2), 1.0), auto.Plan(3, 4))
    assert [one.sparse.density for one in tries if one.round == 1] == [0.3, 0.1]
    assert auto.best(tries).sparse.density == 0.3


def test_the_first_setting_gives_way_only_to_a_clear_lead():
    def tried(*row_losses: list[float]) -> list[auto.Try]:
        return [auto.Try(SparseConfig(density=0.1 * (i + 1)), 1, 8, replace(outcome(sum(rows)), row_losses=rows))
                for i, rows in enumerate(row_losses)]  # fmt: skip

    first = [0.3, 0.2, 0.4, 0.1]
    lead, error = tried([0.1, 0.1, 0.1, 0.1])[0].outcome.lead(tried(first)[0].outcome)
    differences = torch.tensor([0.2, 0.1, 0.3, 0.0], dtype=torch.float64)
    assert lead == pytest.approx(0.6) and error == pytest.approx(4 * float(differences.std()) / 2)
    for other, clear in (([0.1, 0.1, 0.1, 0.1], True), ([0.0, 0.2, 0.4, 0.1], False), ([0.29, 0.19, 0.39, 0.09], True),
                         ([0.0, 0.0, 0.4, 0.5], False), ([math.nan] * 4, False)):  # fmt: skip
        assert (auto.best(tried(first, other)).sparse.density == 0.2) == clear
    assert auto.best(tried([0.3], [0.1])).sparse.density == 0.1  # one row says nothing about others
    assert auto.best(tried([math.nan] * 4, first)).sparse.density == 0.2


def test_what_diverged_is_the_worst_and_never_chosen():
    nan, inf = math.nan, math.inf
    tries, _ = halved({0.1: nan, 0.2: 3.0, 0.3: inf, 0.4: 2.0}, auto.Plan(4, 8))
    assert [one.sparse.density for one in tries if one.round == 1] == [0.4, 0.2]
    assert auto.best(tries).sparse.density == 0.4
    longer = [auto.Try(one.sparse, 1, 16, outcome(nan)) for one in tries if one.round == 1]
    assert auto.best([*tries[:4], *longer]).sparse.density == 0.4  # where all of a round diverged, the one before it
    with pytest.raises(ValueError, match="learning_rate: no setting's held-out loss stayed finite"):
        halved({0.1: nan, 0.2: inf}, auto.Plan(2, 8))


def test_settings_are_different_start_with_the_base_and_come_from_the_grid():
    base = SparseConfig(criterion="grad", density=0.02, tile_budget=1.0)
    grid = {"criterion": ("grad", "fisher", "random"), "tile_budget": (0.1, 1.0)}
    found = auto.settings(base, grid, 4, seed=3)
    assert found == auto.settings(base, grid, 4, seed=3)
    assert found[0] == base and len(set(found)) == 4
    ones = {replace(base, criterion="fisher"), replace(base, criterion="random"), replace(base, tile_budget=0.1)}
    assert set(found[1:]) == ones  # one change before two
    assert len({auto.settings(base, grid, 2, seed)[1] for seed in range(20)}) == 3  # the seed draws
    assert len(auto.settings(base, grid, 100, seed=3)) == 6
    assert all(s == replace(base, criterion=s.criterion, tile_budget=s.tile_budget) for s in found)
    with pytest.raises(ValueError, match="'colour' is no field"):
        auto.settings(base, {"colour": (1,)}, 4, seed=0)
    with pytest.raises(ValueError, match="but one setting"):
        auto.settings(base, {"density": (0.02,)}, 4, seed=0)
    with pytest.raises(ValueError, match="count must be at least 2, got 1"):
        auto.settings(base, grid, 1, seed=0)
    with pytest.raises(ValueError, match="grid: 'density' must have at least one value"):
        auto.settings(base, {"density": ()}, 4, seed=0)
    assert len(auto.settings(base, {"density": (0.02, 0.05, 0.05)}, 9, seed=0)) == 2


# ---- groups, splits, plots --------------------------------------------------------------------------------------


def test_groups_are_kinds_and_thirds():
    names = [f"model.layers.{i}.{part}.weight" for i in range(6)
             for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]  # fmt: skip
    found = ablation.groups([*names, "project.weight"])
    assert list(found) == ["q", "o", "down", "project", "early", "middle", "late"]
    assert found["q"] == [n for n in names if "q_proj" in n]
    assert found["early"] == names[:6] and found["middle"] == names[6:12] and found["late"] == names[12:]
    assert ablation.groups(["layers.0.q_proj.weight", "layers.0.k_proj.weight"]).keys() == {"q", "k"}


def test_names_that_stand_in_several_places_of_a_layer_are_apart():
    gpt2 = [f"transformer.h.{i}.{part}.weight" for i in range(2)
            for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]  # fmt: skip
    found = ablation.groups(gpt2)
    assert list(found) == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "early", "middle"]
    assert found["attn.c_proj"] == [gpt2[1], gpt2[5]]
    moe = ["layers.0.mlp.gate_proj.weight", "layers.1.mlp.experts.gate_up_proj",
           "layers.1.mlp.shared.gate_proj.weight", "layers.1.mlp.experts.3.gate_proj.weight"]  # fmt: skip
    assert list(ablation.groups(moe))[:4] == ["mlp.gate_proj", "gate_up", "mlp.shared.gate_proj", "gate_proj"]


def test_a_split_is_whole_disjoint_and_seeded():
    rows = [{"n": i} for i in range(40)]
    train, out = split(rows, 1)
    assert len(out) == 8 and sorted([*train, *out], key=lambda r: r["n"]) == rows
    assert split(rows, 1) == (train, out) != split(rows, 2)
    assert len(split([{}] * 5000, 0)[1]) == 200
    with pytest.raises(ValueError, match="one row cannot be split"):
        split(rows[:1], 0)


def test_a_plot_is_svg_with_its_points(tmp_path):
    plot.save(tmp_path / "p.svg", {"a & b": [(1, 2.0), (10, 1.0)], "c": [(100, 3.0)]}, title="<t>", x="x", y="y",
              log_x=True)  # fmt: skip
    root = ElementTree.parse(tmp_path / "p.svg").getroot()
    ns = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f".//{ns}circle")) == 3 + 2
    assert {"a & b", "c", "<t>", "x", "y", "100"} <= {t.text for t in root.findall(f".//{ns}text")}
    (line,) = root.findall(f".//{ns}polyline")
    (x0, y0), (x1, y1) = (map(float, pair.split(",")) for pair in line.get("points").split())
    assert x0 < x1 and y0 < y1  # a lower loss is lower in the picture
    plot.save(tmp_path / "n.svg", {"q": [(5, 1.0)], "kk": [(5, 1.0)], "far": [(90, 1.0)]}, title="t", x="x", y="y",
              lines=False)  # fmt: skip
    texts = ElementTree.parse(tmp_path / "n.svg").getroot().findall(f".//{ns}text")
    levels = {t.text: float(t.get("y")) for t in texts if t.text in ("q", "kk", "far")}
    assert levels["kk"] == levels["q"] + plot.LINE and levels["far"] == levels["q"]  # names that would meet are apart
    for bad, message in (({}, "must hold points"), ({"a": []}, "must hold points"), ({"a": [(0, 1)]}, "log_x")):
        with pytest.raises(ValueError, match=message):
            plot.save(tmp_path / "q.svg", bad, title="", x="", y="", log_x=True)


def test_a_plot_labels_points_and_leaves_out_what_is_not_finite(tmp_path):
    series = {"a": [(1.0, 2.0), (2.0, math.nan), (3.0, 1.0)], "b": [(1.0, math.inf)]}
    plot.save(tmp_path / "p.svg", series, title="t", x="x", y="y", labels={"a": ["one", "two", "three"], "b": ["four"]})
    root = ElementTree.parse(tmp_path / "p.svg").getroot()
    ns = "{http://www.w3.org/2000/svg}"
    texts = {t.text for t in root.findall(f".//{ns}text")}
    assert {"one", "three", "a", "b"} <= texts and not {"two", "four"} & texts
    assert len(root.findall(f".//{ns}circle")) == 2 + 2  # and the legend's
    plot.save(tmp_path / "n.svg", {"a": [(1.0, math.nan)]}, title="t", x="x", y="y", log_x=True)
    ElementTree.parse(tmp_path / "n.svg")


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.3, 5.1), (0.0123, 0.0131), (7e5, 8e6), (2.0, 5.0)])
def test_ticks_are_round_and_inside(low, high):
    found = plot.ticks(low, high)
    assert 3 <= len(found) <= 7 and all(low - 1e-12 <= value <= high + 1e-12 for value in found)
    step = found[1] - found[0]
    assert f"{step:.1e}"[:3] in ("1.0", "2.0", "5.0")
    assert plot.ticks(2.5, 2.5) == [2.5]


# ---- on a tiny model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    llama(dtype=torch.bfloat16).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "train.jsonl", PAIRS)
    write_jsonl(folder / "held.jsonl", PAIRS[:6])
    return folder


def config(start: Path, **fields) -> RunConfig:
    sparse = SparseConfig(density=0.1, tile=(8, 8), batches=2, train_norms=False, train_targets=False)
    return RunConfig(**({"model": str(start / "model"), "data": str(start / "train.jsonl"), "device": "cpu",
                         "batch_size": 4, "sparse": sparse} | fields))  # fmt: skip


def test_trials_start_from_the_same_weights_and_repeat(start):
    trials = Trials(config(start), str(start / "held.jsonl"), Silent())
    before = {name: w.clone() for name, w in trials.model.state_dict().items()}
    normed = replace(trials.config.sparse, train_norms=True, include=["mlp"])
    first, other, again = trials(trials.config.sparse, 5), trials(normed, 3), trials(trials.config.sparse, 5)
    assert not selected(trials.model)
    after = trials.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name].view(torch.uint8), w.view(torch.uint8)) for name, w in before.items())
    assert (first.loss, first.changed, first.entries) == (again.loss, again.changed, again.entries)
    assert first.loss != other.loss
    assert again.select_seconds == 0 < first.select_seconds
    assert 0 < first.changed <= first.entries == sum(round(0.1 * w.numel()) for w in trials.weights.values())
    assert first.gain == trials.start - first.loss > 0
    with pytest.raises(ValueError, match="matches no weight"):  # what fails leaves the model as it was
        trials(replace(trials.config.sparse, include="nothing"), 1)
    assert not selected(trials.model)


class Cut(Exception):
    """Stands for an interruption."""


@pytest.mark.parametrize("command", ["auto", "ablate", "sweep"])
def test_an_interrupted_search_goes_on_where_it_was(start, tmp_path, monkeypatch, command):
    options = {"auto": ["--minutes", 60, "--settings", 3, "--criterion", "grad", "--criterion", "random",
                        "--allocation", "layer", "--epochs", 2],
               "ablate": ["--steps", 2, "--include", "self_attn", "--density", 0.1],
               "sweep": ["--steps", 2, "--density", 0.1, "--tile-budget", 0.3, "--tile-budget", 0.6, "--tile-budget",
                         1.0]}[command]  # fmt: skip
    made: list[int] = []
    train = Trials._train

    def counted(self, sparse, steps, most):
        if len(made) == most:
            raise Cut
        made.append(steps)
        return train(self, sparse, steps)

    def go(output: Path, most: int, *more: str):
        monkeypatch.setattr(Trials, "_train", lambda self, sparse, steps: counted(self, sparse, steps, most))
        arguments = [command, *common(start, "unused"), *options, "--output", output, *more]
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

    assert go(tmp_path / "whole", 1000).exit_code == 0
    whole, total = json.loads((tmp_path / "whole" / f"{command}.json").read_text()), len(made)
    made.clear()
    assert isinstance(go(tmp_path / "cut", 2).exception, Cut)
    half = json.loads((tmp_path / "cut" / f"{command}.json").read_text())
    assert whole["finished"] and not half["finished"]
    ElementTree.parse(tmp_path / "cut" / f"{command}.svg")
    with (tmp_path / "cut" / "trials.jsonl").open("a") as file:
        file.write('{"setting": {"den')  # killed in the middle of a line
    assert "exists already" in go(tmp_path / "cut", 1000).stderr
    assert "its trials had seed=0, now it is 1" in go(tmp_path / "cut", 1000, "--resume", "--seed", "1").stderr
    data = start / "train.jsonl"
    whole_data = data.read_text()
    data.write_text(whole_data.split("\n", 1)[1])
    assert "its trials had rows_sha256=" in go(tmp_path / "cut", 1000, "--resume").stderr  # the rows were edited
    data.write_text(whole_data)
    assert go(tmp_path / "cut", 1000, "--resume").exit_code == 0
    assert len(made) == total  # none was made twice
    resumed = json.loads((tmp_path / "cut" / f"{command}.json").read_text())

    def told(report: dict) -> list:
        rows = next(report[name] for name in ("trials", "groups", "points") if name in report)
        return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]

    assert resumed["finished"] and told(resumed) == told(whole) and resumed.get("chosen") == whole.get("chosen")
    assert resumed["seconds"] > half["seconds"] > 0
    again = (tmp_path / "cut" / "trials.jsonl").read_text()
    assert go(tmp_path / "cut", 0, "--resume").exit_code == 0
    assert (tmp_path / "cut" / "trials.jsonl").read_text() == again


@pytest.mark.parametrize("kept", ["", '{"model": "me', "whole"])
def test_a_journal_that_was_killed_in_its_first_line_begins_anew(tmp_path, kept):
    """Also with the first line whole and no trial after it."""
    path, sparse = tmp_path / "trials.jsonl", SparseConfig()
    settings = RunConfig(model="me", data="rows")
    Journal(path, settings, {"held_out": None}).add(sparse, 3, {"loss": 1.0}, 2.0, 1.0)
    expected = path.read_text()
    path.write_text(expected.splitlines(keepends=True)[0] if kept == "whole" else kept)
    journal = Journal(path, settings, {"held_out": None})
    assert journal.find(sparse, 3) is None and journal.seconds == 0
    journal.add(sparse, 3, {"loss": 1.0}, 2.0, 1.0)
    assert path.read_text() == expected
    assert Journal(path, settings, {"held_out": None}).find(sparse, 3) == {"loss": 1.0}


def test_the_widest_trials_fit_80_columns():
    wide = SparseConfig(criterion="fisher-sample", allocation="global", density=0.0025, tile_budget=0.05)
    text = StringIO()
    show_tries(Console(width=80, file=text), [auto.Try(wide, 1, 1000, outcome(12.34567, step=123.456))])
    assert "fisher-sample" in text.getvalue() and "…" not in text.getvalue()
    assert all(title in text.getvalue() for title in ("criterion", "allocation", "density", "s/step"))


def test_there_must_be_something_to_resume(start, tmp_path):
    result = CliRunner().invoke(cli.app, ["sweep", *map(str, common(start, "none")), "--resume"])
    assert result.exit_code == 2 and "holds no trials" in result.stderr


def call(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def common(start: Path, output: str) -> list[object]:
    return [start / "model", start / "train.jsonl", "--held-out", start / "held.jsonl", "--output", start / output,
            "--tile", 8, "--batch-size", 4, "--selection-batches", 2, "--device", "cpu"]  # fmt: skip


def test_auto_tries_reports_and_chooses(start):
    shown = call("auto", *common(start, "auto"), "--minutes", 60, "--settings", 4, "--criterion", "grad",
                 "--criterion", "random", "--allocation", "layer", "--density", 0.1, "--epochs", 4)  # fmt: skip
    told = json.loads((start / "auto" / "auto.json").read_text())
    assert told["config"]["batch_size"] == 4 and told["held_out_rows"] == 6 and 0 < told["cpu_seconds"]
    assert told["start_loss"] == pytest.approx(told["trials"][0]["loss"] + told["trials"][0]["gain"])
    assert told["chosen"] in [one["setting"] for one in told["trials"]]
    last = max(one["round"] for one in told["trials"])
    assert told["loss"] == min(one["loss"] for one in told["trials"] if one["round"] == last)
    first = [one["setting"] for one in told["trials"] if one["round"] == 0]
    assert {(s["criterion"], s["tile_budget"]) for s in first} <= {
        (c, t) for c in ("grad", "random") for t in (0.1, 1.0)
    }
    assert f"--criterion {told['chosen']['criterion']} --allocation layer --density 0.1" in shown
    assert "…" not in shown  # the table has room in 80 columns
    starters = len([one for one in told["trials"] if one["round"] == 0])
    assert ("no more: with" in shown) == (starters < 4)
    ElementTree.parse(start / "auto" / "auto.svg")


def test_train_with_criterion_auto_chooses_first(start):
    shown = call("train", start / "model", start / "train.jsonl", "--runs", start / "runs", "--density", 0.1, "--tile",
                 8, "--steps", 8, "--batch-size", 4, "--device", "cpu", "--criterion", "auto", "--auto-minutes", 60,
                 "--selection-batches", 1)  # fmt: skip
    # neither hour is used up: the longest trial has as many steps as the run
    told = json.loads((start / "runs" / "run" / "auto.json").read_text())
    sparse = json.loads((start / "runs" / "run" / "config.json").read_text())["sparse"]
    assert sparse == json.loads(json.dumps(told["chosen"]))
    assert sparse["density"] == 0.1 and f"--criterion {sparse['criterion']}" in shown
    result = CliRunner().invoke(cli.app, ["train", str(start / "model"), str(start / "train.jsonl"), "--runs",
                                          str(start / "runs"), "--criterion", "auto", "--resume"])  # fmt: skip
    assert result.exit_code == 2 and "the run has chosen already" in result.stderr


def test_ablate_ranks_groups(start):
    shown = call("ablate", *common(start, "ablate"), "--steps", 3, "--density", 0.1)
    rows = json.loads((start / "ablate" / "ablate.json").read_text())["groups"]
    assert {row["group"] for row in rows} == {"q", "k", "v", "o", "gate", "up", "down", "early", "middle"}
    ranks = [row["gain_per_million"] for row in rows]
    assert ranks == sorted(ranks, reverse=True)
    model = llama()
    for row in rows:
        assert row["entries"] == pytest.approx(0.1 * row["weights"], abs=len(model.model.layers) * 4)  # rounded each
        assert row["gain_per_million"] == pytest.approx(1e6 * row["gain"] / row["changed"])
        if len(row["group"]) == 1:
            kind = f"{row['group']}_proj.weight"
            assert row["weights"] == sum(w.numel() for name, w in model.named_parameters() if name.endswith(kind))
        assert row["group"] in shown


def test_sweep_goes_over_all_pairs(start):
    call("sweep", *common(start, "sweep"), "--steps", 2, "--density", 0.05, "--density", 0.2, "--tile-budget", 0.3,
         "--tile-budget", 1.0)  # fmt: skip
    points = json.loads((start / "sweep" / "sweep.json").read_text())["points"]
    assert [(p["density"], p["tile_budget"]) for p in points] == [(0.05, 0.3), (0.05, 1.0), (0.2, 0.3), (0.2, 1.0)]
    norms = sum(w.numel() for w in llama().parameters() if w.dim() == 1)
    assert len({p["entries"] for p in points}) == 2
    for point in points:  # the rows of the answers' words are a tenth at most, or none
        chosen = sum(round(point["density"] * w.numel()) for n, w in llama().named_parameters() if "_proj" in n)
        assert chosen <= point["entries"] - norms <= 1.1 * chosen
    assert all(0 < p["tile_share"] <= 1 for p in points)
    texts = [t.text for t in ElementTree.parse(start / "sweep" / "sweep.svg").iter() if t.tag.endswith("text")]
    assert texts.count("0.05") >= 2 and texts.count("0.2") >= 2  # a density beside each point


def test_a_search_survives_trainings_that_diverge(start):
    """Every group's loss is NaN: the weights' values overflow."""
    shown = call("ablate", *common(start, "wild"), "--steps", 3, "--density", 0.1, "--include", "self_attn", "--lr",
                 "1e38")  # fmt: skip
    rows = json.loads((start / "wild" / "ablate.json").read_text())["groups"]
    assert all(math.isnan(row["loss"]) for row in rows) and "nan" in shown
    result = CliRunner().invoke(cli.app, ["auto", *map(str, common(start, "wilder")), "--minutes", "60", "--settings",
                                          "2", "--lr", "1e38"])  # fmt: skip
    assert result.exit_code == 2 and "learning_rate: no setting's held-out loss stayed finite" in result.stderr


@pytest.mark.parametrize(("command", "options", "message"), [
    ("auto", ["--minutes", 0], "minutes must be positive"), ("auto", ["--criterion", "luck"], "criterion"),
    ("auto", ["--criterion", "grad", "--allocation", "layer", "--density", 0.1, "--tile-budget", 1], "but one setting"),
    ("ablate", ["--density", 2], "density"), ("sweep", ["--density", 0], "density"),
    ("sweep", ["--output", "."], "exists already"), ("ablate", ["--held-out", "absent.jsonl"], "absent.jsonl"),
], ids=str)  # fmt: skip
def test_bad_options_end_in_one_line_and_make_nothing(start, command, options, message):
    before = sorted(start.rglob("*"))
    result = CliRunner().invoke(cli.app, [command, *map(str, common(start, "bad")), *map(str, options)])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert sorted(start.rglob("*")) == before


def test_a_bar_of_trials_of_different_lengths_is_never_more_than_full():
    with cli.RichDisplay(Console(quiet=True)) as display:
        for total in (2, 5):
            for done in range(1, total + 1):
                display.progress("steps", done, total)
            (bar,) = display._bars.tasks
            assert (bar.completed, bar.total) == (total, total)


def test_the_commands_defaults_are_those_of_train():
    from sparseft import cli_search

    assert cli_search.LEARNING_RATE == cli.LEARNING_RATE
    for command in ("auto", "ablate", "sweep"):
        assert "Example:" in call(command, "--help")
        assert command in call("--help")
