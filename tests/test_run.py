"""Whole runs of every kind of stage: resume after a kill or a signal is exact, wrong inputs are named."""

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import DRIVER, ROOT, Case, logged
from ranks import forked, torchrun
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.evaluation.afterwards import run_evaluations


def last_checkpoint(run_dir: Path, world) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint that `latest` names: weights, optimizer state, reference."""
    from megatron.core import dist_checkpointing

    from r1engine.model.cpu import on_cpu

    folder = run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text().strip() / "model"
    with on_cpu():
        tensors = dist_checkpointing.load_plain_tensors(str(folder))
    return {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}


def same_run(reference: Path, run_dir: Path, world) -> None:
    """Logs and the last checkpoint are equal in every bit."""
    assert logged(run_dir) == logged(reference)
    expected, found = last_checkpoint(reference, world), last_checkpoint(run_dir, world)
    assert expected.keys() == found.keys()
    assert len(expected) > 10
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


KINDS = ("rl", "sft", "reward_model")


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=pytest.mark.turn(n)) for n, kind in enumerate(KINDS)])
def case(request, tiny_base, tmp_path_factory) -> Case:
    return Case(request.param, tiny_base, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def undisturbed(case) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = case.folder / "undisturbed"
    done = case.run(folder, start=torchrun if case.kind == "sft" else forked)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_run_writes_what_it_promises(case, undisturbed):
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "curves.png", "report.html", "heartbeat.json"):
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


def test_benchmarks_beside_the_training_change_no_bit_of_it_and_are_stored_as_an_evaluation(case, undisturbed, world):
    if case.kind != "rl":
        return
    folder, heldout = case.folder / "benchmarks", case.model.parents[1] / "tiny" / "heldout.jsonl"
    asked = f"evaluation.benchmarks={{sums: {{kind: questions, file: {heldout}, samples: 2, consensus: true}}}}"
    done = case.run(folder, more=(asked,))
    assert done.returncode == 0, done.stderr[-3000:]
    rows, samples = logged(folder)
    others = [{key: value for key, value in row.items() if not key.startswith("eval/sums/")} for row in rows]
    assert (others, samples) == logged(undisturbed)
    expected, found = last_checkpoint(undisturbed, world), last_checkpoint(folder, world)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
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


MOMENTS = int(os.environ.get("R1_FAULT_TRIALS", "5"))  # of each kind; more of them take longer


def moments() -> list[tuple[int, int]]:
    """(ranks, update after which the run is killed): seeded points, some before the first checkpoint, some after."""
    drawn = random.Random("moments to kill at")
    five = [(1, drawn.randint(1, 4)), (2, drawn.randint(5, 8)), (1, drawn.randint(5, 8)), (2, 3), (1, 8)]
    return five + [(drawn.randint(1, 2), drawn.randint(1, 8)) for _ in range(MOMENTS - 5)]


@pytest.mark.rotating
@pytest.mark.parametrize(("ranks", "at"), moments())
def test_resume_after_a_kill_is_bit_exact(case, undisturbed, tmp_path, world, ranks, at):
    reference = case.undisturbed_on(ranks)
    killed = case.run(tmp_path, ranks=ranks, kill=signal.SIGKILL, at=at)
    assert killed.returncode != 0
    resumed = case.run(tmp_path, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert ("resumed from step_00000004" in resumed.stdout) == (at > 4)
    same_run(reference, tmp_path, world)


@pytest.mark.rotating
def test_torchrun_starts_a_killed_run_again_three_times(case, undisturbed, tmp_path, world):
    done = case.run(tmp_path, ranks=2, start=partial(torchrun, restarts=3), kill=signal.SIGKILL, at="3,6,2")
    assert done.returncode == 0, done.stderr[-3000:]
    same_run(case.undisturbed_on(2), tmp_path, world)
    starts = json.loads((tmp_path / "provenance.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 0, 4, 4]  # the first one was killed before a checkpoint


@pytest.mark.rotating
def test_torchrun_goes_on_with_the_node_that_is_left(case, undisturbed, tmp_path):
    """Two agents of `--nnodes 1:2` stand for two nodes. One is lost after update 6, with the rank that it started."""
    if case.kind != "sft":
        pytest.skip("minutes of waiting for launchers; one kind is enough")
    first, second = (agent(case, tmp_path, kill, at) for kill, at in ((0, 0), (signal.SIGKILL, 6)))
    try:
        (rank,) = children(second.pid)
        while Path(f"/proc/{rank}/stat").read_text().split(") ")[1][0] != "Z":
            time.sleep(0.02)
        os.killpg(second.pid, signal.SIGKILL)  # before it starts its rank again
        assert first.wait(timeout=400) == 0
    finally:
        for process in (first, second):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    starts = json.loads((tmp_path / "provenance.json").read_text())["starts"]
    assert [(start["ranks"], start["step"]) for start in starts] == [(2, 0), (1, 4)]
    found, expected = logged(tmp_path)[0], logged(undisturbed)[0]
    assert [row["step"] for row in found] == [row["step"] for row in expected]


def agent(case: Case, run_dir: Path, kill: int, at: int) -> subprocess.Popen:
    """A node's torchrun. The first of them keeps the store."""
    meeting = case.folder / "port"
    if not meeting.exists():
        with socket.create_server(("127.0.0.1", 0)) as free:
            meeting.write_text(str(free.getsockname()[1]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
    command += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{meeting.read_text()}"]
    command += ["--rdzv-conf", "last_call_timeout=20,keep_alive_interval=1", "--monitor-interval", "3"]
    command += [str(word) for word in (DRIVER, kill, at, "train", case.config, *case.settings, f"run_dir={run_dir}")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    log = (run_dir.parent / f"{run_dir.name}-{at}.log").open("w")
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=log)
    end = time.monotonic() + 120
    while at == 0 and time.monotonic() < end:  # the second one comes when the store is there
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(meeting.read_text())), 1):
            break
        time.sleep(0.1)
    return process


def children(pid: int) -> list[str]:
    """Processes that it has started, once there are some."""
    end = time.monotonic() + 300
    while not (found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def test_a_run_goes_on_in_another_layout(case, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    shutil.rmtree(root / "step_00000008")
    (root / "latest").write_text("step_00000004\n")
    done = case.run(tmp_path / "run", ranks=2, more=("parallel.tensor=2",))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from step_00000004" in done.stdout
    (expected, expected_samples), (found, samples) = logged(undisturbed), logged(tmp_path / "run")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        row.pop("padding_share", None), wanted.pop("padding_share", None)  # rows are padded for the ranks of a tensor
        assert row == pytest.approx(wanted, rel=1e-2, abs=1e-4)
    assert [s["completion"] for s in samples] == [s["completion"] for s in expected_samples]


def signals() -> list[tuple[int, int, int]]:
    """(signal, ranks, update after which it comes), seeded; the first is tried every day, the others in turn."""
    drawn = random.Random("moments to end at")
    kinds = [(signal.SIGTERM, 1), (signal.SIGINT, 2), (signal.SIGUSR1, 2), (signal.SIGINT, 1), (signal.SIGTERM, 2)]
    five = [(number, ranks, drawn.randint(1, 7)) for number, ranks in kinds]
    return five + [(*drawn.choice(kinds), drawn.randint(1, 7)) for _ in range(MOMENTS - 5)]


@pytest.mark.parametrize(
    ("number", "ranks", "at"),
    [pytest.param(*drawn, marks=[pytest.mark.rotating] if i else []) for i, drawn in enumerate(signals())],
)
def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_goes_on_exactly(
    case, undisturbed, tmp_path, world, number, ranks, at
):
    reference = case.undisturbed_on(ranks)
    ended = case.run(tmp_path, ranks=ranks, kill=number, at=at)
    assert ended.returncode == (130 if number == signal.SIGINT else 143), ended.stderr[-3000:]
    step = at + at % 2 if case.kind == "rl" else at  # a stride of reinforcement learning has two updates
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step_{step:08d}\n"
    assert f"at step {step} of 8: step_{step:08d} is saved, and the same command goes on from there" in ended.stderr
    assert ended.stderr.count("ended by") == 1 and "Traceback" not in ended.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == step
    assert (tmp_path / "report.html").is_file() and not (tmp_path / "model").exists()
    resumed = case.run(tmp_path, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"resumed from step_{step:08d}" in resumed.stdout
    same_run(reference, tmp_path, world)
    starts = json.loads((tmp_path / "provenance.json").read_text())["starts"]
    assert [(start["step"], start["changed"]) for start in starts] == [(0, []), (step, [])]


@pytest.mark.rotating
def test_a_signal_during_a_save_finds_it_finished(case, tmp_path):
    ended = case.run(tmp_path, kill=signal.SIGTERM, at=-1)
    assert ended.returncode == 143
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000004"]
    assert "at step 4 of 8: step_00000004 is saved" in ended.stderr


def test_a_second_signal_and_one_before_training_end_at_once(case, tmp_path):
    twice = case.run(tmp_path / "twice", kill=signal.SIGTERM, at=-3)
    assert twice.returncode == 143 and "ended at once" in twice.stderr
    before = case.run(tmp_path / "before", kill=signal.SIGINT, at=0)
    assert before.returncode == 130 and "ended outside of training" in before.stderr
    assert not (tmp_path / "twice" / "checkpoints").exists() and not (tmp_path / "before" / "checkpoints").exists()


REFUSED = {
    "rl": [
        ("seed=5", "seed: found 5, but the run began with 0"),
        ("checkpoint.resume=false", "holds checkpoints up to step_00000008"),
        ("grpo.kl_coef=0", "grpo.kl_coef: found 0.0, but the run began with 0.01"),
        ("data.max_prompt_tokens=3", "prompts have more than max_prompt_tokens = 3 tokens"),
        ("steps=4", "steps: found 4, required at least the 8 of step_00000008"),
    ],
    "sft": [
        ("seed=5", "seed: found 5, but the run began with 0"),
        ("sft.batch_size=12", "sft.batch_size: found 12, but the run began with 24"),
        ("data.template=none", "template none and max_tokens 64, but the run began with"),
        ("data.max_tokens=9", "84 of 84 texts (100.0%): 84 have more than data.max_tokens = 9 tokens"),
        ("sft.epochs=1", "steps: found 4, required at least the 8 of step_00000008"),
    ],
    "reward_model": [
        ("seed=5", "seed: found 5, but the run began with 0"),
        ("reward_model.batch_size=6", "reward_model.batch_size: found 6, but the run began with 12"),
        ("reward_model.sees=response", "template r1_zero and max_tokens 160, but the run began with"),
        ("data.max_tokens=9", "42 of 42 pairs (100.0%): 42 have more than data.max_tokens = 9 tokens"),
        ("reward_model.epochs=1", "steps: found 4, required at least the 8 of step_00000008"),
    ],
}


@pytest.mark.rotating
@pytest.mark.parametrize("number", range(5))
def test_a_changed_run_is_refused_by_name_and_nothing_on_disk_changes(case, undisturbed, number):
    override, message = REFUSED[case.kind][number]
    before = contents(undisturbed)
    done = case.run(undisturbed, more=(override,))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(undisturbed) == before


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


def test_a_failed_run_tells_once_where_it_failed_and_what_is_saved(case, tmp_path):
    done = case.run(tmp_path, ranks=2, kill=-1, at=6)  # an exception on the last rank
    assert done.returncode == 1
    assert done.stderr.count("the run failed on rank 1 of 2") == 1
    assert "error: OSError: a node is ill" in done.stderr and "last good checkpoint: step_00000004" in done.stderr
    told = json.loads((tmp_path / "failure.json").read_text())
    assert (told["rank"], told["checkpoint"]) == (1, "step_00000004") and "a node is ill" in told["traceback"][-1]


def test_layout_that_does_not_fit_the_processes_is_refused(case, tmp_path):
    done = case.run(tmp_path, more=("parallel.tensor=2",))
    assert done.returncode == 2
    assert "tensor 2 x pipeline 1 = 2 does not divide the world size 1" in done.stderr


draws_ahead = pytest.mark.parametrize("case", ["rl"], indirect=True)  # supervised training draws nothing
AHEAD = ("rollout.max_staleness=2", "rollout.oversample=1.5")


@draws_ahead
def test_a_run_one_step_ahead_loses_and_doubles_no_question_when_it_is_killed(case, tmp_path):
    killed = case.run(tmp_path, ranks=2, kill=signal.SIGKILL, at=6, more=AHEAD)
    assert killed.returncode != 0
    resumed = case.run(tmp_path, ranks=2, more=AHEAD)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resumed from step_00000004" in resumed.stdout
    rows = [row for row in logged(tmp_path)[0] if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for iteration, row in enumerate(rows, start=1):
        assert row["questions/consumed"] == 4 * iteration
        dropped = row.get("questions/dropped_end_of_run", 0)
        assert row["questions/issued"] == row["questions/consumed"] + row["questions/carried"] + dropped
        assert row["staleness/max"] <= 2
    assert sum(row["tokens_ahead"] for row in rows) > 0
    state = json.loads((tmp_path / "checkpoints" / "step_00000008" / "state.json").read_text())["prompts"]
    assert state["epoch"] * state["count"] + state["position"] == rows[-1]["questions/issued"]


@draws_ahead
def test_an_on_policy_run_goes_on_one_step_ahead_and_back(case, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    for steps, staleness in ((16, 1), (24, 0)):
        done = case.run(tmp_path / "run", more=(f"steps={steps}", f"rollout.max_staleness={staleness}"))
        assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in logged(tmp_path / "run")[0] if "loss" in row]
    assert [row["step"] for row in rows] == list(range(2, 26, 2))
    assert all(row["staleness/max"] <= (1 if 8 < row["step"] <= 16 else 0) for row in rows)
    assert rows[-1]["questions/consumed"] == 4 * len(rows)


INTERLEAVED = ("parallel.pipeline=2", "parallel.virtual=2", "rollout.max_staleness=2", "rollout.oversample=1.5")


@draws_ahead
def test_interleaved_stages_train_one_step_ahead(case, tiny_base, tmp_path):
    # Rows are filled up to the longest there, every field of them; and the metrics see every row.
    model = tmp_path / "four_layers"
    deep_model(tiny_base / "tiny" / "model", model)
    settings = (*INTERLEAVED, f"model.path={model}", "max_row_tokens=64", "grpo.minibatches=1", "steps=4")
    done = case.run(tmp_path / "run", ranks=2, more=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in logged(tmp_path / "run")[0] if "loss" in row]
    assert len(rows) == 4
    assert rows[0]["logp_diff/max"] < 1e-4 and sum(v for k, v in rows[0].items() if k.startswith("logp_ratio")) == 1.0


def deep_model(folder: Path, target: Path) -> None:
    """The tiny model's folder with four layers of random weights."""
    from safetensors.torch import save_file

    from r1engine.demo.tiny import init_weights
    from r1engine.hf.architecture import read_architecture

    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | {"num_hidden_layers": 4}
    (target / "config.json").write_text(json.dumps(config))
    save_file(init_weights(read_architecture(target), seed=0), target / "model.safetensors", {"format": "pt"})
