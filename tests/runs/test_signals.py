"""A signal ends a run with a checkpoint, a failure tells where it happened and what is saved."""

import json
import os
import random
import signal

import pytest
from cases import same_run

MOMENTS = int(os.environ.get("R1_FAULT_TRIALS", "5"))  # more of them take longer


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
    case, undisturbed, tmp_path, number, ranks, at
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
    same_run(reference, tmp_path)
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


def test_a_failed_run_tells_once_where_it_failed_and_what_is_saved(case, tmp_path):
    done = case.run(tmp_path, ranks=2, kill=-1, at=6)  # an exception on the last rank
    assert done.returncode == 1
    assert done.stderr.count("the run failed on rank 1 of 2") == 1
    assert "error: OSError: a node is ill" in done.stderr and "last good checkpoint: step_00000004" in done.stderr
    told = json.loads((tmp_path / "failure.json").read_text())
    assert (told["rank"], told["checkpoint"]) == (1, "step_00000004") and "a node is ill" in told["traceback"][-1]
