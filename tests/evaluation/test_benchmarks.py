"""The table of benchmarks, and the row for files of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.evaluation.benchmark import Graded, Reply
from r1engine.evaluation.benchmarks import BENCHMARKS, benchmark_of


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
