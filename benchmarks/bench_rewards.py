"""Graders: items/s of each path, latency under hostile load, against Math-Verify called directly.

python benchmarks/bench_rewards.py [--smoke]        one core; the device option is there for run_all.py
python benchmarks/bench_rewards.py --corpora [FILE.jsonl ...]    only verdicts, ours against Math-Verify's, as a table;
                                                    a line of a file: {"answer", "reference", "verdict"}
"""

from __future__ import annotations

import argparse
import json
import logging
import runpy
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import timing
import torch

from r1engine.data.question import Question
from r1engine.rewards import Record, Scorer, ScorerSettings
from r1engine.rewards.math.accuracy import judge, judge_at_once
from r1engine.rewards.math.decision import STRICT, MathPolicy
from r1engine.rewards.math.normalize import normalize
from r1engine.rewards.math.rule import compute, warm_up

TESTS = Path(__file__).resolve().parents[1] / "tests" / "rewards"
CORPUS = TESTS / "math_corpus.jsonl"
LENIENT = MathPolicy(percent_may_be_missing=True, interval_may_be_inequality=True)  # as Math-Verify's own tests have it
DEADLINE = 1.0
# Equal and within every size limit; `simplify` does not end in time, and values alone do not settle it.
HOSTILE = (
    "\\sqrt{x+\\sqrt{y+\\sqrt{z+\\sin(x)^{20}}}}(x+y+z)^{20}",
    "(z+y+x)^{19}(x+y+z)\\sqrt{x+\\sqrt{y+\\sqrt{z+(1-\\cos(x)^2)^{10}}}}",
)
EXACT = {
    "integer": ("5", "5"),
    "thousands": ("1,234", "1234"),
    "fraction": ("\\frac{1}{2}", "0.5"),
    "decimal": ("-7.5", "-7.25"),
    "percent": ("50\\%", "0.5"),
    "name": ("x=12", "12"),
    "unit": ("10 cm", "10"),
    "words": ("no solution", "No solution"),
    "same text": ("x^2+1", "x^2+1"),
    "tuple": ("(1,2)", "(1, 2)"),
    "set": ("\\{1,2\\}", "\\{2,1\\}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--corpora", nargs="*", type=Path, metavar="FILE", help="verdicts only, on these files as well")
    args = parser.parse_args()
    timing.use_device("cpu")
    torch.set_num_threads(1)
    if args.corpora is not None:
        corpora(args.corpora)
        return
    exact_path(20 if args.smoke else 5000)
    symbolic_path(4 if args.smoke else None, rounds=1 if args.smoke else 3)
    hostile_load(honest=20 if args.smoke else 1000, hostile=1 if args.smoke else 10)


def exact_path(repeats: int) -> None:
    """Answers that text and exact numbers settle, in process."""
    for form, pair in EXACT.items():
        assert judge_at_once(*pair) is not None
        start = time.perf_counter()
        for _ in range(repeats):
            normalize.cache_clear()  # every answer is a new one
            judge_at_once(*pair)
        emit(f"exact, {form}", {"items_per_second": repeats / (time.perf_counter() - start), "items": repeats})
    pairs = list(EXACT.values()) * (repeats // 2)
    records = [
        Record(Question("", reference), f"<think>a</think><answer>{answer}</answer>") for answer, reference in pairs
    ]
    with Scorer(ScorerSettings(workers=1)) as scorer:
        start = time.perf_counter()
        scorer.score(records)
        rate = len(records) / (time.perf_counter() - start)
    emit("exact, whole record", {"items_per_second": rate, "items": len(records)})


def symbolic_path(count: int | None, rounds: int) -> None:
    """The pairs of the corpus that need algebra: through the pool, in process, and Math-Verify itself; milliseconds.

    SymPy remembers results, so its cache is emptied before each call; the parser's tables grow with what it has read,
    so every pair is computed once by each before the clock runs.
    """
    from sympy.core.cache import clear_cache

    rows = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    pairs = [(row["answer"], row["reference"]) for row in rows]
    pairs = [pair for pair in pairs if judge_at_once(*pair) is None][:count]
    warm_up()
    policy = {"percent_may_be_missing": False, "interval_may_be_inequality": False}
    with Scorer(ScorerSettings(workers=1, deadline_seconds=60)) as scorer:
        records = [Record(Question("", reference), f"\\boxed{{{answer}}}") for answer, reference in pairs]
        scorer.score(records[:2])  # starts the workers
        ways: dict[str, Callable[[int], object]] = {
            "through the pool": lambda i: scorer.score([records[i]]),
            "in process": lambda i: compute(*pairs[i], policy),
            "Math-Verify": lambda i: math_verify(*pairs[i]),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for i in range(len(pairs)):
                for name, way in list(ways.items())[:: 1 if turn % 2 else -1]:
                    clear_cache()
                    start = time.perf_counter()
                    way(i)
                    if turn:
                        taken[name].append(1e3 * (time.perf_counter() - start))
    for name, values in taken.items():
        emit(f"symbolic, {name}", {"pairs": len(pairs), "mean_ms": statistics.fmean(values), **percentiles(values)})


def hostile_load(honest: int, hostile: int) -> None:
    """Latency of every item while some of them never end; the deadline is DEADLINE seconds."""
    records = [Record(Question("", f"x+{n}"), f"\\boxed{{{n}+x}}") for n in range(honest)]
    for n in range(hostile):
        records.insert(n * (len(records) // hostile), Record(Question("", HOSTILE[1]), f"\\boxed{{{HOSTILE[0]}}}"))
    with Scorer(ScorerSettings(workers=2, deadline_seconds=DEADLINE)) as scorer:
        scorer.score(records[1:3])
        start = time.perf_counter()
        scores = scorer.score(records)
        seconds = time.perf_counter() - start
    values = [1e3 * score.seconds for score in scores]
    counts = {verdict: sum(score.verdict == verdict for score in scores) for verdict in ("right", "undecided")}
    emit(
        "hostile load",
        {"deadline_ms": 1e3 * DEADLINE, **counts, "items_per_second": len(scores) / seconds, **percentiles(values)},
    )


def corpora(files: list[Path]) -> None:
    """Verdicts of labelled pairs, ours and Math-Verify's, and the time of each, as a Markdown table; each pair is new.

    Undecided counts as neither: such a sample leaves its group.
    """
    warm_up()
    print("| corpus | pairs right, wrong | grader | right accepted | wrong accepted | undecided | p50 ms | p99 ms |")
    print("|---|---|---|---|---|---|---|---|")
    for name, pairs, policy in [*_own_corpora(), *((file.stem, _pairs(file), STRICT) for file in files)]:
        ways: dict[str, Callable[[str, str], str]] = {
            "r1engine": lambda answer, reference, policy=policy: judge(answer, reference, policy)[0],
            "Math-Verify": lambda answer, reference: "right" if math_verify(answer, reference) else "wrong",
        }
        counts = Counter(verdict for *_, verdict in pairs)
        for grader, way in ways.items():
            found, taken = _graded(pairs, way)
            right, wrong = found["right", "right"], found["wrong", "right"]
            undecided = found["right", "undecided"] + found["wrong", "undecided"]
            p50, p99 = (percentiles(taken)[f"p{share}_ms"] for share in (50, 99))
            print(
                f"| {name} | {counts['right']}, {counts['wrong']} | {grader} | {right} | {wrong} | {undecided} "
                f"| {p50:.2f} | {p99:.0f} |"
            )


def _graded(
    pairs: list[tuple[str, str, str]], way: Callable[[str, str], str]
) -> tuple[Counter[tuple[str, str]], list[float]]:
    """How often which label got which verdict, and the milliseconds of each pair."""
    from sympy.core.cache import clear_cache

    found: Counter[tuple[str, str]] = Counter()
    taken = []
    for answer, reference, label in pairs:
        clear_cache()
        normalize.cache_clear()
        start = time.perf_counter()
        found[label, way(answer, reference)] += 1
        taken.append(1e3 * (time.perf_counter() - start))
    return found, taken


def _own_corpora() -> list[tuple[str, list[tuple[str, str, str]], MathPolicy]]:
    """The pairs that the tests hold; those that are undecided on purpose have no label to count."""
    tables = [runpy.run_path(str(TESTS / f"test_math_{name}.py"))["KINDS"] for name in ("writing", "meaning")]
    kinds = [
        (answer, reference, verdict)
        for table in tables
        for verdicts in table.values()
        for verdict, pairs in verdicts.items()
        for answer, reference in pairs
        if verdict != "undecided"
    ]
    return [
        ("math_corpus", _pairs(CORPUS), STRICT),
        ("math_verify_suite", _pairs(TESTS / "math_verify_suite.jsonl"), LENIENT),
        ("18 kinds of writing and meaning", kinds, STRICT),
    ]


def _pairs(file: Path) -> list[tuple[str, str, str]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(row["answer"], row["reference"], row["verdict"]) for row in rows]


def math_verify(answer: str, reference: str) -> bool:
    """As its README says, without its signal-based time-outs, which only cost time here."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    gold, found = (parse(f"\\boxed{{{text}}}", configs, parsing_timeout=None) for text in (reference, answer))
    return verify(gold, found, timeout_seconds=None)


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{share}_ms": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 90, 99)} | {
        "max_ms": ordered[-1]
    }


def emit(row: str, values: dict[str, object]) -> None:
    timing.emit("rewards", row, torch.device("cpu"), values)


if __name__ == "__main__":
    main()
