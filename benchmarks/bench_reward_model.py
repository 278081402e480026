"""A step of a reward model on pairs beside TRL's RewardTrainer: tokens a CPU second of one thread.

    .venv/bin/python benchmarks/bench_reward_model.py --peer-python .venv-trl/bin/python --model 0.5M --model 3M

Both read the same folder, whose score is random, and the same tokens in the same batches of 32 pairs, log-normal in
length; a step of each in turn. Ours is the stage as a run has it: reading, packing, update, optimizer. TRL runs three
times: as it comes (batches of 8 accumulated, activations recomputed), the same without recomputation, and one batch of
32. The losses of the first step must agree.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import step_model
import supervised
import torch

from r1engine.config import RewardModelConfig


def make_folder(folder: Path, size: str) -> None:
    """The model of bench_step.py with a score, and with an embedding for the end token."""
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    step_model.make_folder(folder, step_model.SHAPES[size])
    config = Qwen2Config.from_pretrained(folder, vocab_size=step_model.VOCAB + 1, num_labels=1)
    torch.manual_seed(0)
    Qwen2ForSequenceClassification(config).save_pretrained(folder)


def make_pairs(folder: Path, count: int) -> Path:
    slices = supervised.Slices(folder)
    rows = [
        {"prompt": slices.prompt(), "chosen": slices.completion(), "rejected": slices.completion()}
        for _ in range(count)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def measure(size: str, steps: int, row_tokens: int, python: str | None) -> list[dict[str, Any]]:
    """A row for each engine."""
    with tempfile.TemporaryDirectory(prefix="bench-reward-model-") as scratch:
        folder = Path(scratch)
        make_folder(folder, size)
        cfg = RewardModelConfig(
            model={"path": folder},
            run_dir=folder / "run",
            data={
                "train": make_pairs(folder, steps * supervised.BATCH),
                "template": "r1_zero",
                "max_tokens": 1024,
            },
            reward_model={"batch_size": supervised.BATCH, "sees": "response"},
            max_row_tokens=row_tokens,
            optimizer={"lr": 1e-6, "schedule": "constant"},
        )
        stage = supervised.make(cfg)
        order = [stage.train.at(index).texts for step in range(steps) for index in stage.batches.at(step)]
        return supervised.compare(stage, "reward_model", folder, order, steps, python)


if __name__ == "__main__":
    supervised.run("reward_model", __doc__, measure)
