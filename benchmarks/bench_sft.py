"""A step of supervised fine-tuning beside TRL's SFTTrainer: tokens a CPU second of one thread.

    .venv/bin/python benchmarks/bench_sft.py --peer-python .venv-trl/bin/python --model 0.5M --model 3M

Both read the same folder and the same tokens in the same batches of 32 texts, log-normal in length; a step of each in
turn. Ours is the stage as a run has it: reading, packing, update, optimizer. TRL runs three times: as it comes (batches
of 8 accumulated, activations recomputed), the same without recomputation, and one batch of 32. The losses of the first
step must agree.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import step_model
import supervised

from r1engine.config import SftConfig


def make_folder(folder: Path, size: str) -> None:
    """The model of bench_step.py, with an end token that it knows."""
    step_model.make_folder(folder, step_model.SHAPES[size])
    for name, end in (("config.json", 0), ("generation_config.json", 0), ("tokenizer_config.json", step_model.PAD)):
        settings = json.loads((folder / name).read_text())
        key = "eos_token" if isinstance(end, str) else "eos_token_id"
        (folder / name).write_text(json.dumps(settings | {key: end}))


def make_texts(folder: Path, count: int) -> Path:
    slices = supervised.Slices(folder)
    rows = [{"question": slices.prompt(), "completion": slices.completion()} for _ in range(count)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "texts.jsonl"


def measure(size: str, steps: int, row_tokens: int, python: str | None) -> list[dict[str, Any]]:
    """A row for each engine."""
    with tempfile.TemporaryDirectory(prefix="bench-sft-") as scratch:
        folder = Path(scratch)
        make_folder(folder, size)
        cfg = SftConfig(
            model={"path": folder},
            run_dir=folder / "run",
            data={"train": make_texts(folder, steps * supervised.BATCH), "max_tokens": 1024},
            sft={"epochs": 1, "batch_size": supervised.BATCH},
            max_row_tokens=row_tokens,
            optimizer={"lr": 1e-6, "schedule": "constant"},
        )
        stage = supervised.make(cfg)
        order = [stage.train.at(index) for step in range(steps) for index in stage.batches.at(step)]
        return supervised.compare(stage, "sft", folder, order, steps, python)


if __name__ == "__main__":
    supervised.run("sft", __doc__, measure)
