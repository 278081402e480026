"""Graders against the owners' own data. Nothing of it is shipped: R1_EVALUATION_DATA names a folder that has it.

math500/test.jsonl   gsm8k/test.jsonl   of openai/prm800k and openai/grade-school-math
ifeval/              input_data.jsonl and input_response_data_gpt4_20231107_145030.jsonl of google-research
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.evaluation.benchmark import Graded, Reply
from r1engine.evaluation.benchmarks import benchmark_of
from r1engine.rewards import Record, Scorer, ScorerSettings

FOLDER = Path(os.environ.get("R1_EVALUATION_DATA", "/nowhere"))


def rows_of(name: str) -> list[dict]:
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"needs {name} in the folder that R1_EVALUATION_DATA names")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def scorer():
    with Scorer(ScorerSettings(workers=1)) as scorer:
        yield scorer


# ---- IFEval: the public replies of GPT-4 ----------------------------------------------------------------------------

# English in capitals or small letters, of a few words. Google's program asks langdetect, which takes the first three
# for German or Spanish; py3langid takes the last one for Catalan.
OTHER_LANGUAGE = {"202": False, "1843": False, "3456": False, "3617": True}


@pytest.mark.parametrize("thoughts", ["", "<think>\nOne, two, THREE. Hm.\n</think>\n\n"])
def test_ifeval_gives_the_published_counts_for_gpt_4(thoughts):
    replies = [row["response"] for row in rows_of("ifeval/input_response_data_gpt4_20231107_145030.jsonl")]
    bench = benchmark_of("ifeval", "")
    items = bench.load(BenchmarkSettings(file=FOLDER / "ifeval/input_data.jsonl"))
    counts = [0, 0, 0, 0]  # prompts and instructions strictly, the same loosely
    for item, reply in zip(items, replies, strict=True):
        parts = bench.grade(item, 0, Reply(thoughts + reply, "stop")).parts
        strict, loose, number = (int(parts[name]) for name in ("strict", "loose", "instructions"))
        if item.id in OTHER_LANGUAGE:
            change = 1 if OTHER_LANGUAGE[item.id] else -1
            strict, loose = strict + change, min(number, loose + change)
        found = (strict == number, strict, loose == number, loose)
        counts = [total + one for total, one in zip(counts, found, strict=True)]
    assert counts == [417, 698, 431, 714] and len(items) == 541


# ---- mathematics: every reference is right, however it is written ---------------------------------------------------


def forms(answer: str) -> dict[str, str]:
    """Replies that all say `answer`."""
    plain = answer.replace("\\$", "")
    found = {
        "box": f"\\boxed{{{answer}}}",
        "display": f"\\[ \\boxed{{{answer}}} \\]",
        "tag": f"<answer>{answer}</answer>",
        "dollars in the tag": f"<answer>${plain}$</answer>",
        "bold in the tag": f"<answer>**{answer}**</answer>",
        "bold dollars in the tag": f"<answer>**${plain}$**</answer>",
        "sentence in the tag": f"<answer>The answer is ${plain}$.</answer>",
        "period": f"\\boxed{{{answer}.}}",
        "answer line": f"Some steps.\n\nAnswer: ${plain}$",
        "bold answer line": f"**Answer:** ${plain}$",
    }
    if thousands := re.fullmatch(r"(\d{1,3}),(?:\\!)?\s*(\d{3})", answer):
        for name, sign in (("tex", ",\\!"), ("braces", "{,}"), ("thin", "\\,"), ("none", ""), ("comma", ",")):
            found[f"thousands: {name}"] = f"\\boxed{{{thousands[1]}{sign}{thousands[2]}}}"
    if fraction := re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", answer):
        found["a/b"] = f"\\boxed{{{fraction[1]}{fraction[2]}/{fraction[3]}}}"
        found["dfrac"] = f"\\boxed{{{fraction[1]}\\dfrac{{{fraction[2]}}}{{{fraction[3]}}}}}"
        if len(fraction[2]) == 1:
            found["without braces"] = f"\\boxed{{{fraction[1]}\\frac{fraction[2]}{{{fraction[3]}}}}}"
    return found


def wrong(bench, scorer, items, replies) -> list[tuple[str, str, str]]:
    """(id, form, reason) of each reply that is not right."""
    asked = [(item, form, reply) for item, named in zip(items, replies, strict=True) for form, reply in named.items()]
    graded = [bench.grade(item, 0, Reply(f"<think>\\boxed{{x}}</think>\n{reply}", "stop")) for item, _, reply in asked]
    assert all(isinstance(one, Graded) for one in graded)
    scores = scorer.score(one.record for one in graded)
    pairs = zip(asked, scores, strict=True)
    return [(item.id, form, score.reason) for (item, form, _), score in pairs if score.verdict != "right"]


def test_every_reference_solution_of_math_500_is_right_in_every_form(scorer):
    rows = rows_of("math500/test.jsonl")
    bench = benchmark_of("math_500", "")
    items = bench.load(BenchmarkSettings(file=FOLDER / "math500/test.jsonl"))
    assert len(items) == 500 and scorer.unusable_references([Record(item.question, "") for item in items]) == []
    replies = [{"solution": row["solution"]} | forms(row["answer"]) for row in rows]
    assert wrong(bench, scorer, items, replies) == []


def test_every_reference_of_gsm8k_is_right_in_every_form(scorer):
    rows_of("gsm8k/test.jsonl")
    bench = benchmark_of("gsm8k", "")
    items = bench.load(BenchmarkSettings(file=FOLDER / "gsm8k/test.jsonl"))
    replies = [forms(item.question.answer) | {"hashes": f"#### {item.question.answer}"} for item in items]
    assert len(items) == 1319 and wrong(bench, scorer, items, replies) == []
