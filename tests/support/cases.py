"""Whole runs of every kind of stage on the tiny model, which a signal may stop; and what they log."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from ranks import forked, torchrun
from shared import alone

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "tests" / "killed.py"
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
RATED = [
    *COMMON,
    "data.template=r1_zero",
    "data.max_tokens=160",
    "reward_model.epochs=2",
    "reward_model.batch_size=12",
    "max_row_tokens=640",
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
        elif kind == "reward_model":
            self.config = folder / "reward_model.yaml"
            self.config.write_text("stage: reward_model\n")
            model, train, heldout = tiny_base / "base" / "model", folder / "pairs.jsonl", folder / "heldout.jsonl"
            rows = [json.loads(line) for line in (tiny / "texts.jsonl").read_text().splitlines()[:50]]
            write_pairs(train, rows[:42])  # 4 batches an epoch, the last one of 6
            write_pairs(heldout, rows[42:])
            self.settings = list(RATED)
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

    def undisturbed_on(self, ranks: int) -> Path:
        """The folder of a run that nothing disturbed, made by the first that asks. Nobody writes into it."""
        folder = self.folder / f"undisturbed_on_{ranks}"
        start = torchrun if self.kind == "sft" and ranks == 1 else forked  # the launcher itself is tested, too
        with alone(folder):
            if not folder.exists():
                done = self.run(folder, ranks=ranks, start=start)
                assert done.returncode == 0, done.stderr[-3000:]
        return folder

    def run(
        self,
        run_dir: Path,
        *,
        ranks: int = 1,
        start: Callable[..., subprocess.CompletedProcess] = forked,
        kill: int = 0,
        at: int | str = 0,
        more: tuple[str, ...] = (),
    ) -> subprocess.CompletedProcess:
        return start(ranks, DRIVER, kill, at, "train", self.config, *self.settings, f"run_dir={run_dir}", *more)


def write_pairs(path: Path, rows: list[dict]) -> None:
    """Pairs of which the chosen summary is the longer one, as often as there are rows with a text to cut."""
    pairs = []
    for row in rows:
        thoughts = row["completion"].partition("</think>")[0] + "</think>"
        answer = row["question"].split()[-1] if row["question"].split() else "1"
        chosen, rejected = (f"{thoughts} <answer> {' '.join([answer] * count)} </answer>" for count in (6, 1))
        pairs.append({"prompt": row["question"], "chosen": chosen, "rejected": rejected, "delta": 2, "domain": "sums"})
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def same_run(reference: Path, run_dir: Path) -> None:
    """Logs and the last checkpoint are equal in every bit. Needs the fixture `world`: a rank reads checkpoints."""
    assert logged(run_dir) == logged(reference)
    expected = last_checkpoint(reference)
    assert len(expected) > 10
    assert differing(expected, last_checkpoint(run_dir)) == []


def differing(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal in every bit."""
    assert expected.keys() == found.keys()
    return [name for name in expected if not torch.equal(expected[name], found[name])]


def last_checkpoint(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint that `latest` names: weights, optimizer state, reference."""
    from megatron.core import dist_checkpointing

    from r1engine.model.cpu import on_cpu

    folder = run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text().strip() / "model"
    with on_cpu():
        tensors = dist_checkpointing.load_plain_tensors(str(folder))
    return {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}


def logged(run_dir: Path) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl without times and telemetry, and samples.jsonl."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in r.items() if not k.startswith(("seconds/", "tokens_per", "gpu"))} for r in rows]
    return timeless, [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
