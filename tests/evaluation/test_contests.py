"""A model's rating from contests, by hand."""

from __future__ import annotations

import json
import math

import pytest

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.evaluation.benchmark import Marked
from r1engine.evaluation.benchmarks import benchmark_of
from r1engine.evaluation.contests import Contest, contest_result, read_contests, read_ratings

RIGHT, WRONG, UNKNOWN = (Marked(v, s, None, "") for v, s in (("right", 1.0), ("wrong", 0.0), ("undecided", None)))
ROWS = [{"points": points, "penalty": 0, "old_rating": 1500} for points in (1000, 400, 100)]


def write(folder, *, problems=({"index": "A", "points": 1000}, {"index": "B", "points": 500}), rows=ROWS):
    (folder / "contests").mkdir(exist_ok=True)
    (folder / "contests" / "1.json").write_text(json.dumps({"problems": list(problems), "rows": rows}))
    lines = [
        {"contest": "1", "index": problem["index"], "question": "Add.", "tests": [{"stdout": "1"}]}
        for problem in problems
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return BenchmarkSettings(file=folder)


def test_points_are_lost_with_each_wrong_submission_before_the_right_one():
    with_points = Contest("1", {"A": 1000.0, "B": 40.0}, [])
    assert contest_result(with_points, {"A": [False, False, True, False]}) == (900.0, 0.0)
    assert contest_result(with_points, {"A": [False, False], "B": [False, True]}) == (0.0, 0.0)
    counted = Contest("2", {"A": None, "B": None}, [])
    assert contest_result(counted, {"A": [False, False, True], "B": [False]}) == (1.0, 20.0)


def test_the_rating_is_that_of_the_rank_and_its_percentile_of_the_list(tmp_path):
    bench = benchmark_of("codeforces", "")
    (tmp_path / "ratings.json").write_text(json.dumps({"1000": 2, "1700": 1, "1500": 1}))
    items = bench.load(write(tmp_path))
    assert [item.id for item in items] == ["1A", "1B"] and {item.cluster for item in items} == {"1"}
    found = bench.totals(items, [[WRONG, WRONG], [WRONG, RIGHT]])  # 450 points: second of four
    assert found == {"rating": pytest.approx(1500 + 400 * math.log10(2), abs=0.01), "percentile": 75.0}


def test_a_submission_that_is_undecided_leaves_its_contest_out(tmp_path):
    bench = benchmark_of("codeforces", "")
    items = bench.load(write(tmp_path))
    assert bench.totals(items, [[UNKNOWN, RIGHT], [RIGHT]]) == {"contests_left_out": 1.0}
    assert "rating" in bench.totals(items, [[RIGHT, UNKNOWN], [RIGHT]])  # behind the right one it does not count


def test_the_interfaces_replies_give_those_who_are_in_both(tmp_path):
    def party(name: str, points: float) -> dict:
        return {"party": {"members": [{"handle": name}]}, "points": points, "penalty": 3}

    standings = {"problems": [{"index": "A"}], "rows": [party("a", 2.0), party("b", 1.0), party("only here", 9.0)]}
    changes = [{"handle": "b", "oldRating": 1200}, {"handle": "a", "oldRating": 1400}, {"handle": "c", "oldRating": 1}]
    found = {"standings": {"status": "OK", "result": standings}, "rating_changes": {"status": "OK", "result": changes}}
    (tmp_path / "7.json").write_text(json.dumps(found))
    contest = read_contests(tmp_path)["7"]
    assert contest.points == {"A": None}
    assert [(row.rating, row.points, row.penalty) for row in contest.rows] == [(1400, 2, 3), (1200, 1, 3)]
    (tmp_path / "7.json").write_text(json.dumps({"standings": {}, "rating_changes": []}))
    with pytest.raises(ValueError, match=r"7\.json: not what Codeforces' contest\.standings"):
        read_contests(tmp_path)


def test_what_does_not_fit_is_refused(tmp_path):
    settings = write(tmp_path)
    lines = (tmp_path / "problems.jsonl").read_text()
    (tmp_path / "problems.jsonl").write_text(lines.replace('"B"', '"C"'))
    with pytest.raises(
        ValueError, match=r"problems\.jsonl:2: found problem C of contest 1, required one of the contests"
    ):
        benchmark_of("codeforces", "").load(settings)
    with pytest.raises(ValueError, match=r"1\.json: row 1: old_rating is None, required a number"):
        benchmark_of("codeforces", "").load(write(tmp_path, rows=[{"points": 1, "penalty": 0}]))
    (tmp_path / "ratings.json").write_text("[1, null]")
    with pytest.raises(ValueError, match=r"ratings\.json: required a list of ratings"):
        read_ratings(tmp_path / "ratings.json")
