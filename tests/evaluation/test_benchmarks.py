"""The table of benchmarks, and the row for files of one's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from r1engine.config import ConfigError
from r1engine.config.evaluation import BenchmarkSettings, Suite
from r1engine.evaluation.benchmark import Graded, Reply
from r1engine.evaluation.benchmarks import BENCHMARKS, benchmark_of
from r1engine.evaluation.entries import cautions, load_entries
from r1engine.evaluation.evaluate import check_graders
from r1engine.evaluation.target import EvaluationTarget
from r1engine.rewards import Scorer, ScorerSettings
from r1engine.rewards.sandbox import probe


def test_rows_have_names_of_their_own_and_a_number_of_their_grader():
    names = [row.name for row in BENCHMARKS]
    assert len(set(names)) == len(names)
    assert all(row.grader.rpartition("/")[2].isdigit() for row in BENCHMARKS)


def test_an_unknown_benchmark_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"benchmarks\.aime24: found no such benchmark, required one of .*questions"):
        benchmark_of("aime24", "benchmarks.aime24")


def own_questions(tmp_path: Path, *rows: dict):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = benchmark_of("questions", "")
    return row, row.load(BenchmarkSettings(file=path))


def test_own_questions_keep_their_ids_when_the_file_is_cut_or_reordered(tmp_path):
    rows = [{"question": text, "answer": "1"} for text in ("a", "b", "a", "c")]
    _, items = own_questions(tmp_path, *rows)
    assert len({item.id for item in items}) == 4
    _, others = own_questions(tmp_path, rows[3], rows[1])
    assert [item.id for item in others] == [items[3].id, items[1].id]


def test_own_questions_are_graded_by_their_reward_on_what_follows_the_thoughts(tmp_path):
    row, items = own_questions(
        tmp_path,
        {"question": "1 + 1?", "answer": "2"},
        {"question": "Which?", "answer": "B", "reward": "choice"},
    )
    graded = row.grade(items[0], 0, Reply("<think>\\boxed{3}</think> \\boxed{2}", "stop"))
    assert isinstance(graded, Graded) and graded.answer == "2" and graded.record.question.answer == "2"
    assert row.grade(items[1], 0, Reply("<think>no end", "length")).answer is None
    assert row.is_same(items[0], "1/2", "0.5") and not row.is_same(items[1], "1/2", "0.5")


@pytest.mark.parametrize(("questions", "k"), [(30, 64), (100, 64), (198, 16), (500, 8), (1319, 4)])
def test_samples_fall_with_the_size_of_the_set(questions, k):
    assert BenchmarkSettings(file=Path("x")).samples_of(questions) == k
    assert BenchmarkSettings(file=Path("x"), samples=3).samples_of(questions) == 3


PROBLEM = {
    "question_id": "a",
    "question_content": "Double it.",
    "contest_date": "2024-09-01T00:00:00",
    "starter_code": "",
    "public_test_cases": '[{"input": "2", "output": "4", "testtype": "stdin"}]',
    "private_test_cases": "[]",
    "metadata": "{}",
}


def lines(path: Path, *rows: dict) -> BenchmarkSettings:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return BenchmarkSettings(file=path)


def test_what_makes_a_number_not_comparable_is_told(tmp_path):
    math = lines(tmp_path / "math.jsonl", {"problem": "1 + 1?", "answer": "2"})
    code = lines(tmp_path / "code.jsonl", PROBLEM)
    found = cautions(load_entries({"math_500": math, "livecodebench": code}, has_judge=False))
    assert found == [
        "math_500: 1 questions, the published set has 500; the paper's number is not comparable",
        "livecodebench: no first_day or last_day; the paper's window is 2024-08-01 to 2025-01-31",
    ]
    window = BenchmarkSettings(file=code.file, first_day="2024-08-01", last_day="2025-01-31")
    assert cautions(load_entries({"livecodebench": window}, has_judge=False)) == []


def test_a_judge_that_is_needed_and_not_there_is_named_with_every_other_problem(tmp_path):
    simple = lines(tmp_path / "simple.jsonl", {"problem": "1 + 1?", "answer": "two"})
    judged = lines(tmp_path / "mine.jsonl", {"question": "1 + 1?", "answer": "two", "reward": "judge"})
    asked = {"simpleqa": simple, "mine": judged.model_copy(update={"kind": "questions"})}
    with pytest.raises(ConfigError) as refused:
        load_entries(asked, has_judge=False)
    assert refused.value.problems == [
        "rewards.judge: found null, required by benchmarks.simpleqa",
        "rewards.judge: found null, required by the questions of benchmarks.mine",
    ]
    assert len(load_entries(asked, has_judge=True)) == 2


def test_programs_are_not_run_where_nothing_protects_from_them(tmp_path, monkeypatch):
    bare = replace(probe(), bwrap=None, bwrap_problem="bubblewrap is not installed", landlock=0)
    monkeypatch.setattr("r1engine.evaluation.evaluate.probe", lambda: bare)  # a machine without protection
    asked = {"livecodebench": lines(tmp_path / "code.jsonl", PROBLEM)}
    entries, target = load_entries(asked, has_judge=False), EvaluationTarget("model")
    with pytest.raises(ConfigError, match=r"neither namespaces .* nor Landlock; required to run untrusted code"):
        check_graders(Suite(benchmarks=asked), target, entries, print)
    check_graders(Suite(benchmarks=asked, rewards={"unsafe": True}), target, entries, print)


def test_tests_that_cannot_be_decoded_leave_a_program_undecided_and_never_right(tmp_path):
    row, (item,) = (
        benchmark_of("livecodebench", ""),
        benchmark_of("livecodebench", "").load(
            lines(tmp_path / "code.jsonl", PROBLEM | {"private_test_cases": "not base64!"})
        ),
    )
    graded = row.grade(item, 0, Reply("```python\nprint(2 * int(input()))\n```", "stop"))
    assert isinstance(graded, Graded)
    with Scorer(ScorerSettings(workers=1)) as scorer:
        (score,) = scorer.score([graded.record])
    assert score.verdict == "undecided" and "neither JSON nor compressed" in score.reason
