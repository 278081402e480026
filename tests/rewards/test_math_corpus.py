"""The math rule against Math-Verify called directly, on two corpora of labelled pairs, and against hostile answers.

math_corpus.jsonl is ours: each pair with the reason of its verdict. math_verify_suite.jsonl holds the pairs of
Math-Verify 0.9.0's own tests (Apache-2.0), as its extraction leaves them; a pair with a reason is labelled otherwise
than there, since what the test accepts is false.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest

from r1engine.data.question import Question
from r1engine.rewards import Record, Scorer, ScorerSettings
from r1engine.rewards.math.decision import MathPolicy

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent
# What the authors of either corpus hold about the two questions that no rule can answer.
POLICIES = {
    "math_corpus": MathPolicy(),
    "math_verify_suite": MathPolicy(percent_may_be_missing=True, interval_may_be_inequality=True),
}


def pairs(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def record(answer: str, reference: str) -> Record:
    return Record(Question("", reference), f"<think>so</think><answer>\\boxed{{{answer}}}</answer>")


@pytest.fixture(scope="module", params=POLICIES)
def graded(request) -> list[tuple[dict[str, str], str, bool]]:
    """(pair, our verdict from the pool, whether Math-Verify accepts it) of one corpus."""
    found = pairs(request.param)
    with Scorer(ScorerSettings(workers=1, deadline_seconds=60, policy=POLICIES[request.param])) as scorer:
        scores = scorer.score(record(pair["answer"], pair["reference"]) for pair in found)
    return [(p, s.verdict, math_verify(p["answer"], p["reference"])) for p, s in zip(found, scores, strict=True)]


def math_verify(answer: str, reference: str) -> bool:
    """Math-Verify as its README calls it: the box first, then LaTeX and plain expressions."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    gold, found = (parse(f"\\boxed{{{t}}}", configs, parsing_timeout=None) for t in (reference, answer))
    return verify(gold, found, timeout_seconds=None)


def test_corpora_are_large_enough_and_give_their_reasons():
    ours, theirs = pairs("math_corpus"), pairs("math_verify_suite")
    assert len(ours) >= 150 and all(pair["reason"] for pair in ours)
    assert len({(pair["answer"], pair["reference"]) for pair in ours}) == len(ours)
    assert len(theirs) >= 200
    assert all(Counter(pair["verdict"] for pair in found)["wrong"] >= 40 for found in (ours, theirs))


def test_recall_is_at_least_math_verifys_and_false_positives_are_strictly_fewer(graded):
    right = [(ours == "right", theirs) for pair, ours, theirs in graded if pair["verdict"] == "right"]
    wrong = [(ours == "right", theirs) for pair, ours, theirs in graded if pair["verdict"] == "wrong"]
    assert sum(ours for ours, _ in right) >= sum(theirs for _, theirs in right)
    assert sum(ours for ours, _ in wrong) < sum(theirs for _, theirs in wrong)


def test_every_pair_gets_its_verdict(graded):
    # Undecided is no false positive; it must not be where the answer is right.
    missed = [(pair, ours) for pair, ours, _ in graded if (ours == "right") != (pair["verdict"] == "right")]
    assert missed == []


HOSTILE = [
    "9^{9^{9^{9}}}",
    "9**9**9**9",
    "10^{10^{10}}",
    "2^{100000000}",
    "100000000!",
    "((20!)!)!",
    "\\binom{10^9}{5\\cdot 10^8}",
    "\\sum_{k=1}^{1000000000} \\frac{1}{k}",
    "\\prod_{k=1}^{1000000000} k",
    "\\frac{x^{800}-1}{x-1}-(1+x+x^{799})",
    "(x+y+z+w)^{49}(x+y+z)+w(x+y+z+w)^{48}",
    "\\sin(x)^{20}\\cos(y)^{20}\\tan(x+y)^{13}+\\sin(x+y)^{9}\\cos(x-y)^{11}",
    "(" * 400 + "1" + ")" * 400,
    "\\sqrt{" * 100 + "2" + "}" * 100,
    "\\frac{1}{" * 60 + "2" + "}" * 60,
    "1" * 1999,
    "1," * 999 + "1",
    "\\{" + ",".join(f"x+{n}" for n in range(300)) + "\\}",
    "+".join(f"\\sqrt{{{n}}}" for n in range(2, 60)),
    "__import__('os').system('sleep 100')",
    "().__class__.__base__.__subclasses__()",
    "1e999999999",
    "10^{-999999999}",
    "\\text{" * 300,
    "\\left(" * 200,
    "\x00\x01\udcff",
    "$" * 1999,
    "x=" * 999 + "1",
    "\\int_0^{1} e^{e^{e^{e^{x}}}} dx",
    "x" * 2_000_000,
]


def test_hostile_answers_are_never_right_and_a_thousand_honest_ones_beside_them_keep_their_verdicts():
    honest = [record(str(n), str(n if n % 2 else n + 1)) for n in range(960)]
    honest += [record(f"{n}+x", f"x+{n if n % 2 else n + 1}") for n in range(40)]
    records = list(honest)
    for place, answer in enumerate(HOSTILE):
        records.insert(place * 30, record(answer, "\\sqrt{2}+x"))
    with Scorer(ScorerSettings(workers=2, deadline_seconds=4)) as scorer:
        scores = dict(zip(map(id, records), scorer.score(records), strict=True))
    assert [scores[id(r)].verdict for r in honest] == ["right" if n % 2 else "wrong" for n in [*range(960), *range(40)]]
    hostile = [scores[id(r)] for r in records if r.question.answer == "\\sqrt{2}+x"]
    assert len(hostile) == len(HOSTILE) >= 20
    assert {score.verdict for score in hostile} == {"wrong", "undecided"}
    assert sorted(score.seconds for score in scores.values())[int(0.99 * len(scores))] <= 4 + 0.5
