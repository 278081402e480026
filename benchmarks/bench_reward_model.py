"""A step of a reward model on pairs beside TRL's RewardTrainer: tokens a CPU second of one thread.

    .venv/bin/python benchmarks/bench_reward_model.py --peer-python .venv-trl/bin/python --model 0.5M --model 3M

Both read the same folder, whose score is random, and the same tokens in the same batches of 32 pairs, log-normal in
length; a step of each in turn. Ours is the stage as a run has it: reading, packing, update, optimizer. TRL runs three
times: as it comes (batches of 8 accumulated, activations recomputed), the same without recomputation, and one batch of
32. The losses of the first step must agree.
"""

from __future__ import annotations

import json
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


def settings(folder: Path, size: str, count: int) -> dict[str, Any]:
    """Keys of the stage, with its model and pairs in the folder."""
    make_folder(folder, size)
    data = {"train": make_pairs(folder, count), "template": "r1_zero", "max_tokens": 1024}
    return {"data": data, "reward_model": {"batch_size": supervised.BATCH, "sees": "response"}}


if __name__ == "__main__":
    kind = supervised.Supervised("reward_model", RewardModelConfig, settings, lambda pair: pair.texts)
    supervised.run(kind, __doc__)
