"""Benchmark `questions`: a file in the engine's own format, graded by the reward that each question names."""

from __future__ import annotations

import hashlib
from collections import Counter

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.data.questions import read_questions
from r1engine.evaluation.benchmark import Benchmark, Graded, Item, Reply
from r1engine.rewards.math.accuracy import judge_at_once
from r1engine.rewards.record import Record
from r1engine.rewards.rules import rule_of


def load_questions(settings: BenchmarkSettings) -> list[Item]:
    """The questions of the file. An id is the hash of a text, and its number where a text occurs again."""
    items, seen = [], Counter[str]()
    for question in read_questions(settings.file):
        digest = hashlib.sha256(question.text.encode()).hexdigest()[:12]
        seen[digest] += 1
        items.append(Item(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}", question))
    return items


def ask_question(item: Item, sample: int) -> str:
    """The question as it stands there."""
    return item.question.text


def grade_question(item: Item, sample: int, reply: Reply) -> Graded:
    """By the rule that the question names."""
    record = Record(item.question, reply.text, id=item.id)
    answer, _ = rule_of(item.question.reward, item.question.place).find(record)
    return Graded(record, answer)


def same_value(item: Item, first: str, second: str) -> bool:
    """Whether two answers are equal, of a question of mathematics also where text and exact numbers show it."""
    if first == second or item.question.reward != "math":
        return first == second
    decided = judge_at_once(first, second)
    return decided is not None and decided[0] == "right"


QUESTIONS = Benchmark(
    "questions",
    "own questions",
    load_questions,
    ask_question,
    grade_question,
    grader="rewards/1",
    wanted=".jsonl or .parquet: question, answer, reward, tests",
    is_same=same_value,
)
