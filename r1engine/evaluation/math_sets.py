"""Mathematics: AIME, MATH-500, CNMO and files like it, GSM8K. Graded by the rule `math`. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.data.question import Question
from r1engine.evaluation.benchmark import Benchmark, Graded, Item, Reply
from r1engine.evaluation.files import FileRow, digest, folder_files, object_rows, unique
from r1engine.evaluation.own_questions import same_value
from r1engine.evaluation.prompts import prompt
from r1engine.evaluation.reading import math_answer
from r1engine.rewards.record import Record

_PROBLEM, _ANSWER = ("problem", "question", "Problem", "Question"), ("answer", "Answer")
_WHOLE = re.compile(r"\d{1,3}")


def _answer(row: FileRow) -> str:
    return row.any_of(*_ANSWER)


def _aime_answer(row: FileRow) -> str:
    answer = row.any_of(*_ANSWER)
    if _WHOLE.fullmatch(answer) is None:
        raise ValueError(f"{row.place}: answer is {answer!r:.80}, required a whole number from 0 to 999")
    return answer


def _gsm8k_answer(row: FileRow) -> str:
    """A solution ends with #### and the number."""
    _, mark, number = row.text("answer").rpartition("####")
    if not mark or not number.strip():
        raise ValueError(f"{row.place}: answer ends with {row.text('answer')[-40:]!r}, required #### and a number")
    return number.strip()


def load_math(settings: BenchmarkSettings, answer: Callable[[FileRow], str] = _answer) -> list[Item]:
    """Problems with their answers, of a file or of all of a folder."""
    ids, questions = [], []
    for path in folder_files(settings.file, ".jsonl", ".json", ".parquet"):
        for row in object_rows(path, ["|".join(_PROBLEM), "|".join(_ANSWER)]):
            text = row.any_of(*_PROBLEM)
            ids.append(row.text("unique_id") if "unique_id" in row.fields else digest(text))
            questions.append(Question(text, answer(row).strip(), "math", place=row.place))
    return [Item(one, question) for one, question in zip(unique(ids), questions, strict=True)]


def ask_math(item: Item, sample: int, template: str = "boxed") -> str:
    """The question, and where to put the answer."""
    return prompt(template, question=item.question.text)


def grade_math(item: Item, sample: int, reply: Reply) -> Graded:
    """What `math_answer` reads is given to the rule as an answer block."""
    answer, _ = math_answer(reply.text)
    return Graded(Record(item.question, f"<answer>{answer}</answer>", id=item.id), answer)


_AIME = Benchmark(
    "aime_2024",
    "AIME 2024",
    partial(load_math, answer=_aime_answer),
    ask_math,
    grade_math,
    grader="math/1",
    wanted=".jsonl, .json or .parquet: problem, answer (0 to 999)",
    licence="copyright of the MAA",
    published=30,
    is_same=same_value,
)
MATH_SETS = (
    _AIME,
    replace(_AIME, name="aime_2025", title="AIME 2025"),
    replace(
        _AIME,
        name="math_500",
        title="MATH-500",
        load=load_math,
        wanted="test.jsonl: problem, solution, answer, subject, level, unique_id",
        licence="MIT",
        published=500,
    ),
    replace(
        _AIME,
        name="cnmo_2024",
        title="CNMO 2024",
        load=load_math,
        ask=partial(ask_math, template="boxed_chinese"),
        wanted=".jsonl, .json or .parquet: problem or question, answer; the paper's own set is not published",
        licence="copyright of the CMS",
        published=None,
    ),
    replace(
        _AIME,
        name="gsm8k",
        title="GSM8K",
        load=partial(load_math, answer=_gsm8k_answer),
        wanted="test.jsonl: question, answer (which ends with #### and a number)",
        licence="MIT",
        published=1319,
    ),
)
