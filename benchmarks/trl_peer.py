"""The TRL side of bench_step.py: a GRPOTrainer that takes one step for each line on stdin.

Runs under the Python of an environment that has TRL (benchmarks/README.md) and imports nothing of r1engine.
Answers on stdout with one line of JSON: versions when ready, then the seconds of each step.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

Answer = Callable[[dict[str, object]], None]


def open_answers() -> Answer:
    """Writes a line to what is stdout now; from here on, what the libraries print to stdout goes to stderr."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda message: print(json.dumps(message), file=stream, flush=True)


class StepByStep(TrainerCallback):
    """Waits for the parent before each optimizer step, and reports when it is done."""

    def __init__(self, answer: Answer, generations: list[float], lengths: list[int]) -> None:
        self.answer, self.generations, self.lengths = answer, generations, lengths

    def on_step_begin(self, args, state, control, **kwargs):
        if not sys.stdin.readline():
            os._exit(0)  # the parent is done; nothing to save
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available() and not args.use_cpu:
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu_start
        lengths = sorted(set(self.lengths))
        self.answer({"seconds": seconds, "cpu": cpu, "generate": sum(self.generations), "lengths": lengths})
        self.generations.clear()
        self.lengths.clear()


def make_trainer(job: dict, answer: Answer) -> GRPOTrainer:
    """A trainer of one optimizer step a rollout.

    With job["fastest"] in its fastest setting for a small model: one batch a step, no checkpointing of activations.
    Else as TRL comes: batches of its default size, accumulated, with checkpointing.
    """
    completions = job["questions"] * job["group"]
    batch = completions if job["fastest"] else GRPOConfig.per_device_train_batch_size
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-"),
        max_steps=10**6,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=completions // batch,
        num_generations=job["group"],
        max_completion_length=job["completion"],
        temperature=1.0,
        beta=job["beta"],
        loss_type="grpo",
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        use_cpu=job["device"] == "cpu",
        bf16=job["device"] == "cuda",
        **({"gradient_checkpointing": False} if job["fastest"] else {}),
        model_init_kwargs={"dtype": "float32"},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    generations: list[float] = []
    lengths: list[int] = []

    def reward(completion_ids: list[list[int]], **columns: object) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        return [float(len(set(ids))) for ids in completion_ids]

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text} for text in job["prompts"]]),
        processing_class=AutoTokenizer.from_pretrained(job["folder"]),
        callbacks=[StepByStep(answer, generations, lengths)],
    )
    generate = trainer._generate_single_turn

    def timed(*args: object) -> object:
        start = time.perf_counter()
        result = generate(*args)
        generations.append(time.perf_counter() - start)
        return result

    trainer._generate_single_turn = timed
    return trainer


def main() -> None:
    job, answer = json.loads(sys.argv[1]), open_answers()
    torch.set_num_threads(job["threads"])
    trainer = make_trainer(job, answer)
    names = ("trl", "torch", "transformers", "accelerate")
    answer({name: importlib.metadata.version(name) for name in names})
    trainer.train()


if __name__ == "__main__":
    main()
