"""Programs: LiveCodeBench, HumanEval, Codeforces. Graded by the rule `code`, in the sandbox. No torch."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Any

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.data.question import Question
from r1engine.evaluation.benchmark import Benchmark, Graded, Item, Reply
from r1engine.evaluation.contests import codeforces_totals, read_contests, read_ratings
from r1engine.evaluation.files import FileRow, each_object, folder_files, object_rows, unique
from r1engine.evaluation.prompts import prompt
from r1engine.rewards.code.problems import test_fields
from r1engine.rewards.code.rule import CODE
from r1engine.rewards.record import Record

_LIVE_CODE_BENCH = ("question_id", "question_content", "contest_date", "starter_code", "public_test_cases")


def load_live_code_bench(settings: BenchmarkSettings) -> list[Item]:
    """The problems whose contest was in the window; its first and last day belong to it.

    Raises:
        ValueError: as of `object_rows`, or no problem is in the window.
    """
    items, dates = [], []
    for path in folder_files(settings.file, ".jsonl"):
        for row in each_object(path, _LIVE_CODE_BENCH):
            dates.append(day := _day(row))
            if (settings.first_day or day) <= day <= (settings.last_day or day):
                question = Question(row.text("question_content"), "", "code", test_fields(row.fields), place=row.place)
                starter = str(row.fields["starter_code"] or "")
                items.append(Item(row.text("question_id"), question, data={"starter_code": starter}))
    if not items:
        raise ValueError(
            f"{settings.file}: found contests from {min(dates)} to {max(dates)}, required some from "
            f"{settings.first_day} to {settings.last_day}"
        )
    return items


def _day(row: FileRow) -> datetime.date:
    """The day of a contest; its hour does not count, so that the last day of a window is whole."""
    value = row.fields["contest_date"]
    if isinstance(value, datetime.datetime):  # of a Parquet file
        return value.date()
    text = row.text("contest_date")
    try:
        return datetime.datetime.fromisoformat(text).date()
    except ValueError:
        raise ValueError(f"{row.place}: contest_date is {text!r:.40}, required a date as 2024-08-01T00:00:00") from None


def ask_program(item: Item, sample: int) -> str:
    """LiveCodeBench's prompt: a function where there is code to start with, else a program."""
    starter = item.data.get("starter_code", "")
    how = prompt("livecodebench_function", starter_code=starter) if starter else prompt("livecodebench_program")
    return prompt("livecodebench", question=item.question.text, how=how)


def grade_code(item: Item, sample: int, reply: Reply) -> Graded:
    """By the tests of the question; programs do not vote."""
    record = Record(item.question, reply.text, id=item.id)
    return Graded(record, CODE.find(record)[0])


def load_human_eval(settings: BenchmarkSettings) -> list[Item]:
    """The owners' file: a prompt that the solution continues, and a check."""
    rows = object_rows(settings.file, ("task_id", "prompt", "entry_point", "test"))
    return [
        Item(row.text("task_id"), Question(row.text("prompt"), "", "code", test_fields(row.fields), place=row.place))
        for row in rows
    ]


def ask_human_eval(item: Item, sample: int) -> str:
    """simple-evals' prompt."""
    return prompt("human_eval", question=item.question.text)


def load_codeforces(settings: BenchmarkSettings) -> list[Item]:
    """A folder of one's own: problems.jsonl (contest, index, question, tests), contests/ (see `read_contests`), and
    ratings.json if a percentile is wanted (see `read_ratings`)."""
    folder = settings.file
    path = folder / "problems.jsonl" if folder.is_dir() else folder
    rows = object_rows(path, ("contest", "index", "question", "tests"))
    contests = read_contests(folder / "contests")
    ratings = read_ratings(folder / "ratings.json") if (folder / "ratings.json").exists() else None
    items = []
    for row, one in zip(rows, unique(f"{row.text('contest')}{row.text('index')}" for row in rows), strict=True):
        contest = contests.get(row.text("contest"))
        if contest is None or row.text("index") not in contest.points:
            raise ValueError(
                f"{row.place}: found problem {row.text('index')} of contest {row.text('contest')}, required one "
                f"of the contests in {folder / 'contests'}"
            )
        question = Question(row.text("question"), "", "code", row.fields["tests"], place=row.place)
        data: dict[str, Any] = {"contest": contest, "index": row.text("index"), "ratings": ratings}
        items.append(Item(one, question, row.text("contest"), data))
    return items


LIVE_CODE_BENCH = Benchmark(
    "livecodebench",
    "LiveCodeBench",
    load_live_code_bench,
    ask_program,
    grade_code,
    grader="code/1",
    metric="pass@1-COT",
    wanted=f"test*.jsonl or a folder of them: {', '.join(_LIVE_CODE_BENCH)}, private_test_cases, metadata",
    licence="CC; the problems are of AtCoder and LeetCode",
)
CODE_SETS = (
    LIVE_CODE_BENCH,
    replace(
        LIVE_CODE_BENCH,
        name="human_eval",
        title="HumanEval",
        load=load_human_eval,
        ask=ask_human_eval,
        metric="pass@1",
        wanted="HumanEval.jsonl.gz: task_id, prompt, entry_point, test",
        licence="MIT",
        published=164,
    ),
    replace(
        LIVE_CODE_BENCH,
        name="codeforces",
        title="Codeforces",
        load=load_codeforces,
        metric="pass@1",
        wanted="a folder with problems.jsonl, contests/*.json and, for a percentile, ratings.json; DeepSeek's contests"
        " are not published",
        licence="Codeforces' terms",
        totals=codeforces_totals,
    ),
)
