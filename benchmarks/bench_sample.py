"""The stage `sample` beside its generator: does grading hide behind drawing? One row, wall seconds in turns.

    python benchmarks/bench_sample.py [--replies 1024] [--slow 0.02] [--smoke]

`generator`: draws the same chunks and grades nothing. `sample`: the whole stage but for imports, with a reward function
that returns at once. `sample_slow`: with one that takes `--slow` seconds of CPU time, in two workers.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import timing
import torch
from bench_evaluate import Model, make_model, write_questions
from bench_generate import SIZES, SMOKE_SIZES, Case, run_ours

from r1engine import ranks
from r1engine.config import SampleConfig
from r1engine.rollout.local.generator import LocalGenerator
from r1engine.sampling.sample import sample

FUNCTIONS = """
import time

def quick(completion):
    return 1.0

def slow(completion):
    end = time.process_time() + {seconds}
    while time.process_time() < end:
        pass
    return 1.0
"""
SAMPLES = 4  # answers of a question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny cases, to see that the script runs")
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--replies", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--slow", type=float, default=0.02, help="CPU seconds of a grading")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.smoke:
        args.replies, args.max_tokens, args.repeats = 16, 8, 1
    torch.set_num_threads(1)
    case = Case("sample", args.replies // SAMPLES, SAMPLES, 32, args.max_tokens, 64, 0)
    with tempfile.TemporaryDirectory(prefix="bench-sample-") as folder:
        model = make_model(Path(folder) / "model", case, SMOKE_SIZES if args.smoke else SIZES)
        (model.folder / "rewards.py").write_text(FUNCTIONS.format(seconds=args.slow))
        found = measure(model, case, args.repeats)
        timing.emit("sample", f"{args.replies} replies", torch.device("cpu"), {"slow_seconds": args.slow} | found)


def measure(model: Model, case: Case, repeats: int) -> dict[str, object]:
    """Tokens a second of each, medians, and of the stage over those of the generator, medians of the rounds' ratios."""
    numbers, chunk = count(), SampleConfig.model_fields["chunk_questions"].default
    generator = LocalGenerator(model.folder, seed=0, slots=case.slots, device=torch.device("cpu"), dtype=torch.float32)
    generator.load_weights(model.module.state_dict().items())
    write_questions(model.questions, [" ".join(f"w{token}" for token in prompt.tokens) for prompt in model.prompts])

    def own() -> int:
        parts = [model.prompts[i : i + chunk] for i in range(0, len(model.prompts), chunk)]
        return sum(run_ours(generator, part, case) for part in parts)

    def stage(function: str) -> Callable[[], int]:
        def run() -> int:
            cfg = config_of(model, case, function, model.folder / f"{function}{next(numbers)}")
            return int(sample(cfg, ranks.start(), {"model.path": "model", "questions": "questions"})["tokens"])

        return run

    rates: dict[str, list[float]] = {"generator": [], "sample": [], "sample_slow": []}
    for _ in range(repeats):
        for name, run in zip(rates, (own, stage("quick"), stage("slow")), strict=True):
            began = time.perf_counter()
            rates[name].append(run() / (time.perf_counter() - began))
    ratios = {
        f"{name}_over_generator": statistics.median(a / b for a, b in zip(rates[name], rates["generator"], strict=True))
        for name in ("sample", "sample_slow")
    }
    return {"repeats": repeats} | {name: statistics.median(found) for name, found in rates.items()} | ratios


def config_of(model: Model, case: Case, function: str, out: Path) -> SampleConfig:
    """Of a stage that draws what the generator draws."""
    return SampleConfig.model_validate(
        {
            "run_dir": out,
            "model": {"path": model.folder},
            "questions": model.questions,
            "template": "none",
            "samples": case.samples,
            "rollout": {"max_tokens": case.max_tokens, "slots": case.slots, "temperature": 1.0},
            "rewards": {"workers": 2, "functions": {function: f"{model.folder}/rewards.py:{function}"}},
        }
    )


if __name__ == "__main__":
    main()
