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
import tempfile
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


def measure(size: str, steps: int, row_tokens: int, python: str | None) -> list[dict[str, Any]]:
    """A row for each engine."""
    with tempfile.TemporaryDirectory(prefix="bench-process-reward-") as scratch:
        folder = Path(scratch)
        make_folder(folder, size)
        data = {"train": make_solutions(folder, steps * supervised.BATCH), "template": "r1_zero", "max_tokens": 1024}
        cfg = ProcessRewardConfig(
            model={"path": folder},
            run_dir=folder / "run",
            data=data,
            process={"batch_size": supervised.BATCH, "after_error": "keep"},
            max_row_tokens=row_tokens,
            optimizer={"lr": 1e-6, "schedule": "constant"},
        )
        stage = supervised.make(cfg)
        order = [stage.train.at(index) for step in range(steps) for index in stage.batches.at(step)]
        return supervised.compare(stage, "process_reward", folder, order, steps, python)


if __name__ == "__main__":
    supervised.run("process_reward", __doc__, measure)
