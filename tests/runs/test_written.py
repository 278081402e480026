"""What a run of each kind of stage writes, what it refuses, and what may change when it goes on."""

import fcntl
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from cases import ROOT, differing, last_checkpoint, logged
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.evaluation.afterwards import run_evaluations


def test_run_writes_what_it_promises(case, undisturbed):
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "report.html", "heartbeat.json"):
        assert (undisturbed / name).stat().st_size > 0, name
    summary = json.loads((undisturbed / "summary.json").read_text())
    rows, samples = logged(undisturbed)
    trained = [row["step"] for row in rows if "loss" in row]
    if case.kind == "rl":
        assert {f"{x}_{when}" for x in ("pass_at_1", "format", "length") for when in ("before", "after")} < set(summary)
        assert summary["logp_diff_max"] < 1e-4  # generator and trainer agree in float32
        assert trained == [2, 4, 6, 8] and samples
        assert all(row["grad_norm"] > 0 for row in rows if row["step"] > 4 and "loss" in row)  # resume may go wrong
    elif case.kind == "reward_model":
        assert summary["accuracy_after"] == 1.0 and summary["length_correlation"] > 0.9  # the chosen text is longer
        assert summary["probe_score"] == [row["eval/probe_score"] for row in rows if "eval/probe_score" in row][-1]
        assert trained == list(range(1, 9))
        ratings = json.loads((undisturbed / "ratings.json").read_text())
        assert {name: sum(counts) for name, counts in ratings["counts"].items()} == {"chosen": 8, "rejected": 8}
        assert len(ratings["scores"]) == 16 and sum(count for *_, count in ratings["calibration"]) == 8
    else:
        assert summary["loss_after"] < summary["loss_before"] - 0.5
        assert trained == list(range(1, 9))
        assert [row["epoch"] for row in rows if "epoch" in row][3::4] == [1.0, 2.0]
    evaluated = [row["step"] for row in rows if any(key.startswith("eval/") for key in row)]
    assert evaluated == [0, 4, 8]
    kind = AutoModelForSequenceClassification if case.kind == "reward_model" else AutoModelForCausalLM
    after = kind.from_pretrained(undisturbed / "model").state_dict()
    before = AutoModelForCausalLM.from_pretrained(case.model).state_dict()
    assert not torch.equal(after["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"])
    assert AutoTokenizer.from_pretrained(undisturbed / "model").eos_token == "<|end|>"


def test_benchmarks_beside_the_training_change_no_bit_of_it_and_are_stored_as_an_evaluation(case, undisturbed):
    if case.kind != "rl":
        return
    folder, heldout = case.folder / "benchmarks", case.model.parents[1] / "tiny" / "heldout.jsonl"
    asked = f"evaluation.benchmarks={{sums: {{kind: questions, file: {heldout}, samples: 2, consensus: true}}}}"
    done = case.run(folder, more=(asked,))
    assert done.returncode == 0, done.stderr[-3000:]
    rows, samples = logged(folder)
    others = [{key: value for key, value in row.items() if not key.startswith("eval/sums/")} for row in rows]
    assert (others, samples) == logged(undisturbed)
    assert differing(last_checkpoint(undisturbed), last_checkpoint(folder)) == []
    evaluated = [row for row in rows if "eval/sums/truncated" in row]
    assert [row["step"] for row in evaluated] == [0, 4, 8]
    assert all(row["eval/sums/pass_at_1_low"] <= row["eval/sums/pass_at_1"] for row in evaluated)
    assert [step for step, _ in run_evaluations(folder)] == [0, 4, 8]
    board = CliRunner().invoke(app, ["evaluate", "board", str(folder)])
    assert board.exit_code == 0 and "last (step 8) minus first (step 0)" in " ".join(board.output.split())


SECTIONS = {"rl": "Reinforcement learning", "sft": "Supervised", "reward_model": "Reward model"}


def documented(section: str) -> set[str]:
    """The keys of a section of docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))


def test_every_key_of_the_log_is_documented_and_every_documented_key_is_logged(case, undisturbed):
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    logged_keys = {re.sub(r"(logp_ratio)/.*", r"\1/<bin>", key) for row in rows for key in row}
    logged_keys = {re.sub(r"(eval/accuracy)/.*", r"\1/<domain>", key) for key in logged_keys}
    promised = documented("Every stage") | documented(SECTIONS[case.kind])
    assert promised - logged_keys == set()
    assert logged_keys - promised - documented("Only with a setting or a device") == set()


REFUSED = {
    "rl": [
        ("seed=5", "seed: found 5, but the run began with 0"),
        ("checkpoint.resume=false", "holds checkpoints up to step_00000008"),
        ("grpo.kl_coef=0", "grpo.kl_coef: found 0.0, but the run began with 0.01"),
        ("data.max_prompt_tokens=3", "prompts have more than max_prompt_tokens = 3 tokens"),
        ("steps=4", "steps: found 4, required at least the 8 of step_00000008"),
        ("model.rope_theta=7", "with model.max_positions and model.rope_theta, is not the one that the run began"),
    ],
    "sft": [
        ("seed=5", "seed: found 5, but the run began with 0"),
        ("sft.batch_size=12", "sft.batch_size: found 12, but the run began with 24"),
        ("data.template=none", "template none and max_tokens 64, but the run began with"),
        ("data.max_tokens=9", "84 of 84 texts (100.0%): 84 have more than data.max_tokens = 9 tokens"),
        ("sft.epochs=1", "steps: found 4, required at least the 8 of step_00000008"),
        ("model.max_positions=99", "with model.max_positions and model.rope_theta, is not the one that the run began"),
    ],
    "reward_model": [
        ("seed=5", "seed: found 5, but the run began with 0"),
        ("reward_model.batch_size=6", "reward_model.batch_size: found 6, but the run began with 12"),
        ("reward_model.sees=response", "template r1_zero and max_tokens 160, but the run began with"),
        ("data.max_tokens=9", "42 of 42 pairs (100.0%): 42 have more than data.max_tokens = 9 tokens"),
        ("reward_model.epochs=1", "steps: found 4, required at least the 8 of step_00000008"),
        ("model.rope_theta=7", "with model.max_positions and model.rope_theta, is not the one that the run began"),
    ],
}


@pytest.mark.rotating
@pytest.mark.parametrize("number", range(6))
def test_a_changed_run_is_refused_by_name_and_nothing_on_disk_changes(case, undisturbed, number):
    override, message = REFUSED[case.kind][number]
    before = contents(undisturbed)
    done = case.run(undisturbed, more=(override,))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(undisturbed) == before


def test_a_checkpoint_names_the_model_as_the_user_does(case, undisturbed):
    checkpoints = undisturbed / "checkpoints"
    state = json.loads((checkpoints / (checkpoints / "latest").read_text().strip() / "state.json").read_text())
    assert state["identity"]["model.path"][1] == str(case.model)


def contents(folder: Path) -> dict[Path, bytes]:
    """Of every file of a run but its lock, which names the last process, and the tokens that it keeps of its data."""
    files = [path for path in folder.rglob("*") if path.is_file() and not {".lock", "tokens"} & {*path.parts}]
    return {path: path.read_bytes() for path in files}


def test_a_run_that_goes_on_differently_tells_what_changed_and_ends_at_its_last_step(case, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    if case.kind == "rl":  # 3 steps of the 4 of a rollout
        more = ("steps=11", "grpo.minibatches=4", "optimizer.lr=1e-4")
        changed = ["grpo.minibatches 2 -> 4", "optimizer.lr 0.01 -> 0.0001", "steps 8 -> 11"]
    else:
        more = (f"{case.kind}.epochs=3", "optimizer.lr=1e-4")
        changed = ["optimizer.lr 0.01 -> 0.0001", f"{case.kind}.epochs 2 -> 3"]
    last = 11 if case.kind == "rl" else 12
    done = case.run(tmp_path / "run", ranks=2, more=(*more, "evaluation.every=0", "checkpoint.every=100"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(line in done.stdout for line in changed)
    starts = json.loads((tmp_path / "run" / "provenance.json").read_text())["starts"]
    assert set(changed) < set(starts[1]["changed"])
    assert [start["config"] for start in starts] == ["config.1.yaml", "config.yaml"]
    assert "lr: 0.01\n" in (tmp_path / "run" / "config.1.yaml").read_text()
    assert "lr: 0.0001\n" in (tmp_path / "run" / "config.yaml").read_text()
    rows, _ = logged(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row][-1] == last
    assert [row["step"] for row in rows if any(key.startswith("eval/") for key in row)][-1] == last
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{last:08d}\n"
    if case.kind == "rl":  # 3 of 4 mini-batches, 3 of 4 questions
        consumed = [row["questions/consumed"] for row in rows if "loss" in row]
        assert consumed[-1] - consumed[-2] == 3


def test_two_runs_in_one_folder_are_refused(case, undisturbed):
    with open(undisturbed / ".lock", "r+b") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        done = case.run(undisturbed)
    assert done.returncode == 2
    assert f"run_dir: {undisturbed} is in use by process " in done.stderr


def test_layout_that_does_not_fit_the_processes_is_refused(case, tmp_path):
    done = case.run(tmp_path, more=("parallel.tensor=2",))
    assert done.returncode == 2
    assert "tensor 2 x pipeline 1 = 2 does not divide the world size 1" in done.stderr
