"""TRL's GRPOTrainer with and without r1kernels: both logs, the seconds and the peak memory. Needs torch and TRL.

    pip install r1engine 'trl==1.16.*'
    python examples/trl_grpo.py

Each run is a process of its own, so that its peak memory is its own. The model is random and small, its vocabulary is
not: 32,000 words, as the output layer is what the ops are about.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time

VOCAB = 32_000
NOT_COMPARED = ("time", "flos", "runtime", "per_second")


def train(folder: str, with_r1kernels: bool, steps: int) -> None:
    """One GRPO run; prints a line of JSON: its log, its seconds and its peak memory."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=VOCAB, **sizes, num_key_value_heads=4, initializer_range=0.1, eos_token_id=1)
    Qwen2ForCausalLM(config).save_pretrained(folder)  # the reference is read from where the model comes from
    trainer = GRPOTrainer(
        model=Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completion_ids, **columns: [float(sum(ids) % 7) for ids in completion_ids],
        args=GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=64,
            beta=0.04,
            learning_rate=1e-3,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": " ".join(f"w{i + j}" for j in range(64))} for i in range(200)]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1"),
    )
    start = time.perf_counter()
    if with_r1kernels:
        from r1kernels.integrations import trl

        with trl.patch() as patched:
            trainer.train()
        print(patched, file=sys.stderr)
    else:
        trainer.train()
    seconds = time.perf_counter() - start
    log = [row for row in trainer.state.log_history if "loss" in row]
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        gigabytes = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps({"log": log, "seconds": seconds, "gigabytes": gigabytes}))


def run(which: str, steps: int) -> dict:
    """What `train` prints, in another process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--run", which, "--folder", folder, "--steps", str(steps)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def largest_difference(first: dict, second: dict) -> float:
    """Of any number in the two logs, relative to its size where that is above 1; clocks aside."""
    worst = 0.0
    for row, other in zip(first["log"], second["log"], strict=True):
        for key, value in row.items():
            if not any(word in key for word in NOT_COMPARED):
                worst = max(worst, abs(value - other[key]) / max(1.0, abs(value)))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--run", choices=("trl", "r1kernels"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        train(arguments.folder, arguments.run == "r1kernels", arguments.steps)
        return
    results = {which: run(which, arguments.steps) for which in ("trl", "r1kernels")}
    print(f"{'':10} {'seconds':>8} {'peak GiB':>9}  loss of each step")
    for which, found in results.items():
        losses = " ".join(f"{float(row['loss']):+.5f}" for row in found["log"])
        print(f"{which:10} {found['seconds']:8.2f} {found['gigabytes']:9.2f}  {losses}")
    print(f"largest difference of any logged number: {largest_difference(*results.values()):.1e}")


if __name__ == "__main__":
    main()
