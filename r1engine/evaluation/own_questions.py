"""Benchmark `questions`: a file in the engine's own format, graded by the reward that each question names."""

from __future__ import annotations

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.data.question import Question
from r1engine.data.questions import read_questions
from r1engine.evaluation.benchmark import Benchmark, Graded, Item, Reply, ask_alone
from r1engine.evaluation.files import digest, unique
from r1engine.rewards.math.accuracy import judge_at_once
from r1engine.rewards.record import Record
from r1engine.rewards.rules import rule_of


def load_questions(settings: BenchmarkSettings) -> list[Item]:
    """The questions of the file. An id is the hash of a text, and its number where a text occurs again."""
    questions = list(read_questions(settings.file))
    ids = unique(digest(question.text) for question in questions)
    return [Item(one, question) for one, question in zip(ids, questions, strict=True)]


def grade_question(item: Item, sample: int, reply: Reply) -> Graded:
    """By the rule that the question names."""
    record = Record(item.question, reply.text, id=item.id)
    answer, _ = rule_of(item.question.reward, item.question.place).find(record)
    return Graded(record, answer)


def same_value(item: Item, first: str, second: str) -> bool:
    """See `same_answer`."""
    return same_answer(item.question, first, second)


def same_answer(question: Question, first: str, second: str) -> bool:
    """Whether two answers are equal, of a question of mathematics also where text and exact numbers show it."""
    if first == second or question.reward != "math":
        return first == second
    decided = judge_at_once(first, second)
    return decided is not None and decided[0] == "right"


QUESTIONS = Benchmark(
    "questions",
    "own questions",
    load_questions,
    ask_alone,
    grade_question,
    grader="rewards/1",
    wanted=".jsonl or .parquet: question, answer, reward, tests",
    is_same=same_value,
)
