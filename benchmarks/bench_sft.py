"""A step of supervised fine-tuning beside TRL's SFTTrainer: tokens a CPU second of one thread.

    .venv/bin/python benchmarks/bench_sft.py --peer-python .venv-trl/bin/python --model 0.5M --model 3M

Both read the same folder and the same tokens in the same batches of 32 texts, log-normal in length; a step of each in
turn. Ours is the stage as a run has it: reading, packing, update, optimizer. TRL runs three times: as it comes (batches
of 8 accumulated, activations recomputed), the same without recomputation, and one batch of 32. The losses of the first
step must agree.
"""

from __future__ import annotations

import json
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


def settings(folder: Path, size: str, count: int) -> dict[str, Any]:
    """Keys of the stage, with its model and texts in the folder."""
    make_folder(folder, size)
    data = {"train": make_texts(folder, count), "max_tokens": 1024}
    return {"data": data, "sft": {"epochs": 1, "batch_size": supervised.BATCH}}


if __name__ == "__main__":
    supervised.run(supervised.Supervised("sft", SftConfig, settings), __doc__)
