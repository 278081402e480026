"""Whole runs of both kinds of stage: resume after a kill is exact, Ctrl-C is clean, wrong inputs are named."""

import json
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import forked, torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
DRIVER = Path(__file__).with_name("killed.py")
COMMON = ["threads=1", "log.tensorboard=false", "checkpoint.every=4", "evaluation.every=4"]
RL = [
    *COMMON,
    "steps=8",
    "grpo.questions=4",
    "grpo.group_size=8",
    "grpo.minibatches=2",
    "grpo.kl_coef=0.01",
    "grpo.reference_every=4",
    "optimizer.lr=1e-2",
    "optimizer.warmup_steps=0",
    "rollout.max_tokens=24",
    "evaluation.samples=2",
    "rewards.workers=1",
]
SFT = [
    *COMMON,
    "data.template=r1_zero",
    "data.max_tokens=64",
    "sft.epochs=2",
    "sft.batch_size=24",
    "max_row_tokens=256",
    "optimizer.lr=1e-2",
]


class Case:
    """A kind of stage with its model and data."""

    def __init__(self, kind: str, tiny_base: Path, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        tiny = tiny_base / "tiny"
        if kind == "rl":
            self.config = ROOT / "configs" / "tiny_r1_zero.yaml"
            model, train, heldout = tiny_base / "base" / "model", tiny / "train.jsonl", tiny / "heldout.jsonl"
            self.settings = list(RL)
        else:
            self.config = folder / "sft.yaml"
            self.config.write_text("stage: sft\n")
            lines = (tiny / "texts.jsonl").read_text().splitlines(keepends=True)
            train, heldout, model = folder / "train.jsonl", folder / "heldout.jsonl", tiny / "model"
            train.write_text("".join(lines[:84]))  # 4 batches an epoch, the last one of 12
            heldout.write_text("".join(lines[-30:]))
            self.settings = list(SFT)
        self.settings += [f"model.path={model}", f"data.train={train}", f"data.heldout={heldout}"]
        self.model = model

    def run(
        self,
        run_dir: Path,
        *,
        ranks: int = 1,
        start: Callable[..., subprocess.CompletedProcess] = forked,
        kill: int = 0,
        at: int = 0,
        more: tuple[str, ...] = (),
    ) -> subprocess.CompletedProcess:
        return start(ranks, DRIVER, kill, at, "train", self.config, *self.settings, f"run_dir={run_dir}", *more)


def logged(run_dir: Path) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl without times and telemetry, and samples.jsonl."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in r.items() if not k.startswith(("seconds/", "tokens_per", "gpu"))} for r in rows]
    return timeless, [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def last_checkpoint(run_dir: Path, world) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint that `latest` names: weights, optimizer state, reference."""
    from megatron.core import dist_checkpointing

    from r1engine.model.cpu import on_cpu

    folder = run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text().strip() / "model"
    with on_cpu():
        tensors = dist_checkpointing.load_plain_tensors(str(folder))
    return {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}


@pytest.fixture(scope="module", params=["rl", "sft"])
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
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "curves.png", "report.html"):
        assert (undisturbed / name).stat().st_size > 0, name
    summary = json.loads((undisturbed / "summary.json").read_text())
    rows, samples = logged(undisturbed)
    trained = [row["step"] for row in rows if "loss" in row]
    if case.kind == "rl":
        assert {f"{x}_{when}" for x in ("pass_at_1", "format", "length") for when in ("before", "after")} < set(summary)
        assert summary["logp_diff_max"] < 1e-4  # generator and trainer agree in float32
        assert trained == [2, 4, 6, 8] and samples
        assert all(row["grad_norm"] > 0 for row in rows if row["step"] > 4 and "loss" in row)  # resume may go wrong
    else:
        assert summary["loss_after"] < summary["loss_before"] - 0.5
        assert trained == list(range(1, 9))
        assert [row["epoch"] for row in rows if "epoch" in row][3::4] == [1.0, 2.0]
    evaluated = [row["step"] for row in rows if any(key.startswith("eval/") for key in row)]
    assert evaluated == [0, 4, 8]
    after, before = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (undisturbed / "model", case.model))
    assert not torch.equal(after["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"])
    assert AutoTokenizer.from_pretrained(undisturbed / "model").eos_token == "<|end|>"


def documented(section: str) -> set[str]:
    """The keys of a section of docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))


def test_every_key_of_the_log_is_documented_and_every_documented_key_is_logged(case, undisturbed):
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    logged_keys = {re.sub(r"(logp_ratio)/.*", r"\1/<bin>", key) for row in rows for key in row}
    promised = documented("Every stage") | documented({"rl": "Reinforcement learning", "sft": "Supervised"}[case.kind])
    assert promised - logged_keys == set()
    assert logged_keys - promised - documented("Only with a setting or a device") == set()


def moments() -> list[tuple[int, int]]:
    """(ranks, update after which the run is killed): five seeded points, each past the first checkpoint or before."""
    drawn = random.Random("moments to kill at")
    return [(1, drawn.randint(1, 4)), (2, drawn.randint(5, 8)), (1, drawn.randint(5, 8)), (2, 3), (1, 8)]


@pytest.mark.rotating
@pytest.mark.parametrize(("ranks", "at"), moments())
def test_resume_after_a_kill_is_bit_exact(case, undisturbed, tmp_path, world, ranks, at):
    reference = undisturbed
    if ranks > 1:
        reference = case.folder / "two_ranks"
        if not reference.exists():
            assert case.run(reference, ranks=ranks).returncode == 0
    killed = case.run(tmp_path, ranks=ranks, kill=signal.SIGKILL, at=at)
    assert killed.returncode != 0
    resumed = case.run(tmp_path, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert ("resumed from step_00000004" in resumed.stdout) == (at > 4)
    assert logged(tmp_path) == logged(reference)
    expected, found = last_checkpoint(reference, world), last_checkpoint(tmp_path, world)
    assert expected.keys() == found.keys()
    assert len(expected) > 10
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


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
        assert row == pytest.approx(wanted, rel=1e-2, abs=1e-4)
    assert [s["completion"] for s in samples] == [s["completion"] for s in expected_samples]


def test_ctrl_c_exits_clean_and_leaves_nothing_half_written(case, tmp_path):
    done = case.run(tmp_path / "run", kill=signal.SIGINT, at=6)
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step_00000004"]


REFUSED = {
    "rl": [
        ("seed=5", "seed was 0 when it was made, this run has 5"),
        ("checkpoint.resume=false", "holds checkpoints up to step_00000008"),
        ("grpo.kl_coef=0", "reference was True when it was made, this run has False"),
        ("data.max_prompt_tokens=3", "prompts have more than max_prompt_tokens = 3 tokens"),
    ],
    "sft": [
        ("seed=5", "seed was 0 when it was made, this run has 5"),
        ("sft.batch_size=12", "batch_size was 24 when it was made, this run has 12"),
        ("data.template=none", "dataset was"),
        ("data.max_tokens=9", "84 of 84 texts (100.0%): 84 have more than data.max_tokens = 9 tokens"),
    ],
}


@pytest.mark.parametrize("number", range(4))
def test_a_changed_run_is_refused_by_name(case, undisturbed, number):
    override, message = REFUSED[case.kind][number]
    done = case.run(undisturbed, more=(override,))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_layout_that_does_not_fit_the_processes_is_refused(case, tmp_path):
    done = case.run(tmp_path, more=("parallel.tensor=2",))
    assert done.returncode == 2
    assert "tensor 2 x pipeline 1 = 2 does not divide the world size 1" in done.stderr


AHEAD = ("rollout.max_staleness=2", "rollout.oversample=1.5")


def test_a_run_one_step_ahead_loses_and_doubles_no_question_when_it_is_killed(case, tmp_path):
    if case.kind != "rl":
        pytest.skip("only reinforcement learning draws ahead")
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


def test_an_on_policy_run_goes_on_one_step_ahead_and_back(case, undisturbed, tmp_path):
    if case.kind != "rl":
        pytest.skip("only reinforcement learning draws ahead")
    shutil.copytree(undisturbed, tmp_path / "run")
    for steps, staleness in ((16, 1), (24, 0)):
        done = case.run(tmp_path / "run", more=(f"steps={steps}", f"rollout.max_staleness={staleness}"))
        assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in logged(tmp_path / "run")[0] if "loss" in row]
    assert [row["step"] for row in rows] == list(range(2, 26, 2))
    assert all(row["staleness/max"] <= (1 if 8 < row["step"] <= 16 else 0) for row in rows)
    assert rows[-1]["questions/consumed"] == 4 * len(rows)


INTERLEAVED = ("parallel.pipeline=2", "parallel.virtual=2", "rollout.max_staleness=2", "rollout.oversample=1.5")


def test_interleaved_stages_train_one_step_ahead(case, tiny_base, tmp_path):
    # Rows are filled up to the longest there, every field of them; and the metrics see every row.
    if case.kind != "rl":
        pytest.skip("only reinforcement learning draws ahead")
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
