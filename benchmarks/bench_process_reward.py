"""A step of a process reward model beside TRL's PRMTrainer: tokens a CPU second of one thread.

    .venv/bin/python benchmarks/bench_process_reward.py --peer-python .venv-prm/bin/python --model 0.5M --model 3M

Both read the same folder, whose score is random, and the same tokens in the same batches of 32 solutions of four
labelled steps; a step of each in turn. Ours is the stage as a run has it: reading, packing, update, optimizer. TRL's
score has two labels, whose softmax is our sigmoid. It runs three times: as it comes (batches of 8 accumulated,
activations recomputed), the same without recomputation, and one batch of 32. The losses of the first step must agree.
TRL 1.13 is the last version with this trainer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import supervised
from bench_reward_model import make_folder

from r1engine.config import ProcessRewardConfig

STEPS = 4  # of a solution; as many in each, so that all ways to take the mean agree


def make_solutions(folder: Path, count: int) -> Path:
    """Steps of the lengths that completions have in the other scripts, together."""
    slices = supervised.Slices(folder)
    rows = []
    for _ in range(count):
        size = len(slices.tokenizer.encode(slices.completion()).ids) // STEPS
        steps = [slices.some(size) for _ in range(STEPS)]
        labels = [slices.rng.random() < 0.6 for _ in range(STEPS)]
        rows.append({"prompt": slices.prompt(), "completions": steps, "labels": labels})
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "steps.jsonl"


def settings(folder: Path, size: str, count: int) -> dict[str, Any]:
    """Keys of the stage, with its model and solutions in the folder."""
    make_folder(folder, size)
    data = {"train": make_solutions(folder, count), "template": "r1_zero", "max_tokens": 1024}
    return {"data": data, "process": {"batch_size": supervised.BATCH, "after_error": "keep"}}


if __name__ == "__main__":
    supervised.run(supervised.Supervised("process_reward", ProcessRewardConfig, settings), __doc__)
