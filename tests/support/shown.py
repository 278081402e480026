"""Questions as a model is shown them, for tests that need no tokenizer's folder."""

from r1engine.data.chat import render
from r1engine.data.question import Question


def as_it_is(question: Question) -> str:
    return render(question.text, "none")


def in_table_1(question: Question) -> str:
    return render(question.text, "r1_zero")
