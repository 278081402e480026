"""The TRL side of the benchmarks of supervised steps: a trainer that takes one step for each line on stdin.

Runs under the Python of an environment that has TRL (benchmarks/README.md) and imports nothing of r1engine.
Answers on stdout with one line of JSON: versions when ready, then the CPU seconds and the loss of each step.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

Answer = Callable[[dict[str, object]], None]
SETTINGS = {
    "as_shipped": {},  # batches of 8, activations recomputed
    "batches_of_8": {"gradient_checkpointing": False},
    "one_batch": {"gradient_checkpointing": False, "per_device_train_batch_size": 32},
}


def open_answers() -> Answer:
    """Writes a line to what is stdout now; from here on, what the libraries print to stdout goes to stderr."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda message: print(json.dumps(message), file=stream, flush=True)


class StepByStep(TrainerCallback):
    """Waits for the parent before each optimizer step, and reports when it is logged."""

    def __init__(self, answer: Answer, parts: int) -> None:
        """`parts`: batches whose mean losses the trainer adds up for a step, where it should take their mean."""
        self.answer, self.parts, self.cpu = answer, parts, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if not sys.stdin.readline():
            os._exit(0)  # the parent is done; nothing to save
        self.cpu = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.cpu = time.process_time() - self.cpu

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.answer({"cpu": self.cpu, "loss": logs["loss"] / self.parts})


def common(job: dict[str, Any], scratch: str) -> dict[str, Any]:
    """The settings that both trainers have."""
    batch = SETTINGS[job["setting"]].get("per_device_train_batch_size", 8)
    return {
        "output_dir": scratch,
        "use_cpu": True,
        "bf16": False,
        "max_length": None,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "gradient_accumulation_steps": 32 // batch,
        "per_device_train_batch_size": 8,
    } | SETTINGS[job["setting"]]


class TwoLabels:
    """The folder's model with a score of two labels: a softmax that equals the sigmoid of the folder's score."""

    @staticmethod
    def from_pretrained(folder: str, dtype: torch.dtype) -> Any:
        model = AutoModelForTokenClassification.from_pretrained(folder, dtype=dtype)
        score = model.score.weight.detach()
        model.score = torch.nn.Linear(score.shape[1], 2, dtype=dtype)
        with torch.no_grad():
            model.score.weight.copy_(torch.cat([torch.zeros_like(score), score]))
            model.score.bias.zero_()
        model.num_labels = model.config.num_labels = 2
        return model


def spread(size: int, last: list[int], labels: list[float]) -> list[int]:
    """[size] the label at each step's last token, -100 at the others."""
    found = [-100] * size
    for index, label in zip(last, labels, strict=True):
        found[index] = int(label)
    return found


def trainer_of(job: dict[str, Any], texts: list[Any], scratch: str, callbacks: list[TrainerCallback]) -> Any:
    """`texts`: tokens, and how many of them are the prompt's; the tokens of a chosen text and of a rejected one; or
    tokens, the index of each step's last one, and the steps' labels."""
    if job["kind"] == "process_reward":
        from trl.experimental.prm import PRMConfig, PRMTrainer  # until TRL 1.13

        rows = [{"input_ids": tokens, "labels": spread(len(tokens), last, labels)} for tokens, last, labels in texts]
        model, config, trainer = TwoLabels, PRMConfig, PRMTrainer
    elif job["kind"] == "reward_model":
        rows = [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in texts]
        model, config, trainer = AutoModelForSequenceClassification, RewardConfig, RewardTrainer
    else:
        rows = [{"input_ids": tokens, "labels": [-100] * n + tokens[n:]} for tokens, n in texts]
        model, config, trainer = AutoModelForCausalLM, SFTConfig, SFTTrainer
    return trainer(
        model=model.from_pretrained(job["folder"], dtype=torch.float32),
        args=config(**common(job, scratch)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["folder"]),
        callbacks=callbacks,
    )


def main() -> None:
    answer, job = open_answers(), json.loads(sys.argv[1])
    torch.set_num_threads(1)
    texts = json.loads(Path(job["texts"]).read_text())
    with tempfile.TemporaryDirectory() as scratch:
        # PRMTrainer's loss is a mean whatever the accumulation: its step is of their sum.
        parts = common(job, scratch)["gradient_accumulation_steps"] if job["kind"] == "process_reward" else 1
        trainer = trainer_of(job, texts, scratch, [StepByStep(answer, parts)])
        answer({"trl": importlib.metadata.version("trl"), "transformers": importlib.metadata.version("transformers")})
        trainer.train()


if __name__ == "__main__":
    main()
