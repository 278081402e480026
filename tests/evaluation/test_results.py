"""Summaries of graded replies, by hand; what the marker makes of the scorer's and the judge's words."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.data.question import Question
from r1engine.evaluation.benchmark import Benchmark, Item, Judged, Marked, Reply
from r1engine.evaluation.entries import Ask, Entry, stream_seed
from r1engine.evaluation.lines import GradeLine, SampleLine
from r1engine.evaluation.marking import Marker, marked
from r1engine.evaluation.results import summarize
from r1engine.evaluation.show import print_summaries
from r1engine.rewards import Score, Scorer, ScorerSettings
from r1engine.rewards.servers.endpoint import ModelServersError


def entry(verdicts: list[str], clusters: list[str], grade=None) -> Entry:
    """Questions whose samples are r right, w wrong, u undecided."""
    row = Benchmark("mine", "mine", lambda s: [], lambda item, sample: "?", grade or (lambda *_: None), grader="mine/1")
    items = [Item(f"q{i}", Question("?"), cluster) for i, cluster in enumerate(clusters)]
    settings = BenchmarkSettings(file=Path("x"), consensus=True)
    return Entry("mine", row, settings, items, max(map(len, verdicts)))


def summary(verdicts: list[str], clusters: list[str] | None = None) -> dict:
    known = entry(verdicts, clusters or [""] * len(verdicts))
    names = {"r": ("right", 1.0), "w": ("wrong", 0.0), "u": ("undecided", None)}
    grades = {
        (f"q{i}", s): GradeLine(f"q{i}", s, *names[v], "7" if v == "r" else "8" if v == "w" else None, "why", "mine/1")
        for i, text in enumerate(verdicts)
        for s, v in enumerate(text)
    }
    replies = {key: SampleLine(*key, "", 10 * (key[1] + 1), "stop", 1, 0, 0.0) for key in grades}
    return summarize(known, replies, grades)


def test_a_question_counts_once_and_undecided_replies_are_a_range():
    found = summary(["rrrr", "wuuu", "uuuu"])
    assert found["score"]["mean"] == 0.5  # of two questions; pooled it would be 4 of 5
    undecided = found["undecided"]
    assert (undecided["count"], undecided["questions"]) == (7, 1)
    assert (undecided["wrong"], undecided["right"]) == pytest.approx((1 / 3, (1 + 0.75 + 1) / 3))
    assert undecided["reasons"] == {"why": 7} and found["tokens"] == 25.0


def test_nothing_decided_is_no_score():
    assert summary(["uu", "uu"])["score"] is None


def test_questions_of_one_text_are_a_cluster():
    # Clusters (1, 1), (0, 0), (1, 0): CR1, as evaluation.md works it out by hand.
    found = summary(["r", "r", "w", "w", "r", "w"], ["a", "a", "b", "b", "c", "c"])
    assert found["score"]["standard_error"] == pytest.approx(0.288675, abs=1e-6)
    assert summary(["r", "r", "w", "w", "r", "w"])["score"]["standard_error"] == pytest.approx(0.223607, abs=1e-6)


def test_every_question_of_a_passage_counts_not_the_last():
    assert summary(["r", "w"], ["passage", "passage"])["score"]["mean"] == 0.5


def test_what_more_samples_could_not_mend():
    # s = (.75, .25), k = 4: V = .0625, W = .25.
    score = summary(["rrrw", "rwww"])["score"]
    assert score["standard_error"] == pytest.approx(0.25)
    assert score["error_of_infinite_samples"] == pytest.approx(0.176777, abs=1e-6)


def test_the_vote_counts_ties_by_their_share():
    assert summary(["rrww", "rrrw"])["cons"]["mean"] == 0.75


def test_a_larger_k_later_changes_the_denominators():
    assert summary(["r" * 28 + "w" * 36])["score"]["mean"] == 0.4375


def test_an_answer_that_was_not_read_is_wrong_whatever_the_rule_says():
    score = Score("right", {"accuracy": 1.0, "format": 0.0}, "same value")
    assert marked(score, "math", "7") == Marked("right", 1.0, "7", "same value", {"format": 0.0})
    assert marked(score, "math", None) == Marked("wrong", 0.0, None, "nothing was read", {"format": 0.0})
    undecided = marked(Score("undecided", {}, "5 seconds"), "math", "x")
    assert undecided.score is None and undecided.verdict == "undecided"


class _Judge:
    """Says yes; or nothing."""

    parallel = 1

    def __init__(self, reply: str | None) -> None:
        self.reply = reply

    def ask(self, prompt: str) -> str:
        if self.reply is None:
            raise ModelServersError("connection refused")
        return self.reply


def conclude(reply: str) -> Marked:
    return Marked("right" if reply == "yes" else "wrong", float(reply == "yes"), "x", reply)


@pytest.mark.parametrize(
    ("reply", "grade", "verdict", "reason"),
    [
        ("yes", lambda *_: Judged("?", conclude), "right", "yes"),
        ("yes", lambda *_: Judged("?", conclude, ("blank",)), "undecided", "takes an answer that cannot be right"),
        ("no", lambda *_: Judged("?", conclude, ("blank",)), "wrong", "no"),
        (None, lambda *_: Judged("?", conclude), "undecided", "no reply from the judge: connection refused"),
        ("yes", lambda *_: 1 / 0, "undecided", "mine/1: ZeroDivisionError"),
    ],
)
def test_a_judge_that_always_says_yes_is_not_believed_and_a_failure_is_no_zero(reply, grade, verdict, reason):
    found = []
    ask = Ask(entry(["r"], [""], grade), Item("q0", Question("?")), 0, 0)
    with Scorer(ScorerSettings(workers=1)) as scorer:
        marker = Marker(scorer, _Judge(reply), lambda asked, line: found.append(line))
        marker.put(ask, SampleLine("q0", 0, "text", 1, "stop", 1, 0, 0.0))
        marker.finish()
        marker.close()
    assert found[0].verdict == verdict and reason in found[0].reason
    assert (found[0].score is None) == (verdict == "undecided")


@pytest.mark.parametrize("width", [40, 80, 120, 160, 300])
def test_a_terminal_of_any_width_breaks_no_word_of_the_results(width):
    found = {
        "kind": "aime",
        "questions": 30,
        "samples": 64,
        "metric": "pass@1",
        "score": {"mean": 0.287, "low": 0.25, "high": 0.35},
        "undecided": {"count": 12, "wrong": 0.28, "right": 0.3},
        "truncated": 0.123,
        "unread": 0.05,
        "tokens": 10234.0,
        "parts": {"every day of the year": {"mean": 0.5, "low": 0.4, "high": 0.6}},
    }
    console = Console(width=width, file=StringIO())
    print_summaries({"my_benchmark": found | {"missing": 12}, "aime_2024": found}, console)
    text = console.file.getvalue()
    words = {word.strip(",:") for word in text.split()}
    assert {"my_benchmark", "missing)", "28.7", "50.0", "undecided", "truncated", "12.3%", "10,234", "79.8"} < words
    assert {"DeepSeek-R1", "OpenAI-o1-1217", "pass@1", "year", "30.0)"} < words
    assert max(map(len, text.splitlines())) <= width


def test_streams_are_addressed_by_names():
    seeds = {stream_seed(s, b, q, k) for s in (0, 1) for b in ("a", "b") for q in ("x", "y") for k in range(4)}
    assert len(seeds) == 32 and all(0 <= seed < 2**48 for seed in seeds)
    assert Reply("<think>\\boxed{1}</think> \\boxed{2}", "stop").summary == " \\boxed{2}"
