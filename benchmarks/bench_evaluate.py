"""An evaluation against its generator, and how long it takes to go on: python benchmarks/bench_evaluate.py [--smoke]

One row a case. `drawing`: tokens a CPU second of `evaluate` (loading, drawing, grading, files, summary) against those
of the embedded generator alone, run by run in turns. `resume`: seconds to find what is missing of so many stored and
graded replies.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import timing
import torch
from bench_generate import SIZES, SMOKE_SIZES, Case, new_model, run_ours

from r1engine.batch import Prompt
from r1engine.config.evaluation import BenchmarkSettings, Suite
from r1engine.data.question import Question
from r1engine.evaluation.entries import load_entries
from r1engine.evaluation.evaluate import evaluate
from r1engine.evaluation.lines import GradeLine, SampleLine
from r1engine.evaluation.runner import missing
from r1engine.evaluation.store import Store
from r1engine.rollout.local.generator import LocalGenerator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny cases, to see that the script runs")
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    case = Case("drawing", 64, 4, 16, 64, 64, 16)
    if args.smoke:
        case = Case("drawing", 4, 2, 16, 8, 4, 16)
    with tempfile.TemporaryDirectory(prefix="bench-evaluate-") as folder:
        cpu = torch.device("cpu")
        drawn = drawing(Path(folder), case, 1 if args.smoke else args.repeats, args.smoke)
        timing.emit("evaluate", "drawing", cpu, drawn)
        timing.emit("evaluate", "resume", cpu, resume(Path(folder), 400 if args.smoke else 32_000))


def write_questions(path: Path, count: int) -> None:
    rows = [{"question": f"w{n % 500} of {n}", "answer": "w3", "reward": "exact"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def drawing(folder: Path, case: Case, repeats: int, is_small: bool) -> dict[str, object]:
    """CPU seconds of both sides, medians, and the share of the generator's speed."""
    model, stops = folder / "model", list(range(1, 1 + case.num_stops))
    weights = new_model(model, SMOKE_SIZES if is_small else SIZES, stops)
    generator = LocalGenerator(model, seed=0, slots=case.slots, device=torch.device("cpu"), dtype=torch.float32)
    generator.load_weights(weights.state_dict().items())
    questions = folder / "questions.jsonl"
    write_questions(questions, case.prompts)
    prompts = [Prompt(i, [0], "", Question("")) for i in range(case.prompts)]  # as the tokenizer makes them

    def ours(number: int) -> float:
        asked = BenchmarkSettings(file=questions, kind="questions", samples=case.samples)
        suite = Suite(
            out=folder / f"out{number}", max_tokens=case.max_tokens, slots=case.slots, template="none",
            temperature=1.0, top_p=1.0, benchmarks={"mine": asked},
        )  # fmt: skip
        before = cpu_seconds()
        found = evaluate(model, suite, note=lambda text: None)["mine"]
        return tokens_per(found["tokens"] * found["replies"], before)

    def alone() -> float:
        before = cpu_seconds()
        return tokens_per(run_ours(generator, prompts, case), before)

    ours(0), alone()
    runs = [(ours(1 + i), alone()) for i in range(repeats)]
    return {
        "replies": case.prompts * case.samples,
        "evaluate_tokens_per_cpu_second": round(statistics.median(a for a, _ in runs)),
        "generator_tokens_per_cpu_second": round(statistics.median(b for _, b in runs)),
        "share_of_generator": round(statistics.median(a / b for a, b in runs), 3),
    }


def resume(folder: Path, replies: int) -> dict[str, object]:
    """Seconds to read what is stored and see that nothing is missing."""
    questions = folder / "many.jsonl"
    write_questions(questions, replies // 4)
    settings = BenchmarkSettings(file=questions, kind="questions", samples=4)
    (entry,) = load_entries({"mine": settings}, has_judge=False)
    store, text = Store(folder / "stored"), "A reply of a thousand characters. " * 30
    samples, grades = store.reply_file("mine", 0), []
    for ask in entry.asks(0):
        samples.append(SampleLine(*ask.key, text, 250, "stop", 20, ask.seed, 1.0))
        grades.append(GradeLine(*ask.key, "wrong", 0.0, "8", "another text", entry.row.grader))
    samples.close()
    store.write_grades("mine", grades)
    began = time.perf_counter()
    left = missing(store, [entry], 0, 0, 1)
    seconds = time.perf_counter() - began
    assert not left.asks and not left.replies
    return {"replies": replies, "seconds": seconds}


def cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def tokens_per(tokens: float, before: float) -> float:
    return tokens / max(1e-9, cpu_seconds() - before)


if __name__ == "__main__":
    main()
