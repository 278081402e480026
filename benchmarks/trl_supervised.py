"""The TRL side of bench_sft.py and bench_reward_model.py: a trainer that takes one step for each line on stdin.

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
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
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

    def __init__(self, answer: Answer) -> None:
        self.answer, self.cpu = answer, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if not sys.stdin.readline():
            os._exit(0)  # the parent is done; nothing to save
        self.cpu = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.cpu = time.process_time() - self.cpu

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.answer({"cpu": self.cpu, "loss": logs["loss"]})


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


def trainer_of(job: dict[str, Any], texts: list[Any], scratch: str, callbacks: list[TrainerCallback]) -> Any:
    """`texts`: tokens, and how many of them are the prompt's; or the tokens of a chosen text and of a rejected one."""
    if job["kind"] == "reward_model":
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
        trainer = trainer_of(job, texts, scratch, [StepByStep(answer)])
        answer({"trl": importlib.metadata.version("trl"), "transformers": importlib.metadata.version("transformers")})
        trainer.train()


if __name__ == "__main__":
    main()
