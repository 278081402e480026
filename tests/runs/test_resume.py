"""A killed run goes on in every bit as if nothing had happened, and it goes on in another layout and one step ahead."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from cases import differing, last_checkpoint, logged, same_run

MOMENTS = int(os.environ.get("R1_FAULT_TRIALS", "5"))  # of each kind; more of them take longer


def moments() -> list[tuple[int, int]]:
    """(ranks, update after which the run is killed): seeded points, some before the first checkpoint, some after."""
    drawn = random.Random("moments to kill at")
    five = [(1, drawn.randint(1, 4)), (2, drawn.randint(5, 8)), (1, drawn.randint(5, 8)), (2, 3), (1, 8)]
    return five + [(drawn.randint(1, 2), drawn.randint(1, 8)) for _ in range(MOMENTS - 5)]


@pytest.mark.rotating
@pytest.mark.parametrize(("ranks", "at"), moments())
def test_resume_after_a_kill_is_bit_exact(case, undisturbed, tmp_path, ranks, at):
    reference = case.undisturbed_on(ranks)
    killed = case.run(tmp_path, ranks=ranks, kill=signal.SIGKILL, at=at)
    assert killed.returncode != 0
    resumed = case.run(tmp_path, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert ("resumed from step_00000004" in resumed.stdout) == (at > 4)
    same_run(reference, tmp_path)


@pytest.mark.rotating
@pytest.mark.parametrize("is_lost", [False, True], ids=["here", "elsewhere"])
def test_a_kill_before_the_commit_leaves_the_checkpoint_before(case, undisturbed, tmp_path, is_lost):
    more = (f"checkpoint.remote=file://{tmp_path}/store",)
    killed = case.run(tmp_path / "run", kill=signal.SIGKILL, at=-2, more=more)
    assert killed.returncode != 0
    root = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == [".step_00000008.partial", "latest", "step_00000004"]
    if is_lost:
        (tmp_path / "run").rename(tmp_path / "lost")
    resumed = case.run(tmp_path / "run", more=more)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resumed from step_00000004" in resumed.stdout
    if is_lost:  # the logs before are lost, too
        assert logged(tmp_path / "run")[0] == [row for row in logged(undisturbed)[0] if row["step"] > 4]
        assert differing(last_checkpoint(undisturbed), last_checkpoint(tmp_path / "run")) == []
    else:
        same_run(undisturbed, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["latest", "step_00000004", "step_00000008"]


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
