"""Codeforces' contests: what a model would have been ranked and rated (paper, section 3 and Table 4). No torch.

The samples of a problem are its submissions, in order, until one is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from r1engine.evaluation.benchmark import Item, Marked
from r1engine.evaluation.elo import ContestRow, percentile, rank_of, rating_of_rank
from r1engine.evaluation.files import FileRow, folder_files, one_object, read_json

LOST_POINTS = 50.0  # of each wrong submission before the right one
LOST_MINUTES = 10.0  # the same where problems have no points


@dataclass(frozen=True)
class Contest:
    """A contest that took place."""

    name: str
    points: dict[str, float | None]  # of each problem by its index; None: problems are counted, and time is penalty
    rows: list[ContestRow]  # of the official participants


def read_contests(folder: Path) -> dict[str, Contest]:
    """Contests by name, each of a file NAME.json in one of two forms.

    - {"problems": [{"index", "points"}], "rows": [{"points", "penalty", "old_rating"}]}
    - {"standings": ..., "rating_changes": ...}, the replies of Codeforces' contest.standings and contest.ratingChanges:
      who is in only one of them is left out

    Raises:
        ValueError: there is no file, or one is otherwise.
    """
    contests = {}
    for path in folder_files(folder, ".json"):
        found = one_object(path)
        if "standings" in found:
            found = _of_interface(path, found)
        whole = FileRow(str(path), found)
        problems = [FileRow(str(path), one if isinstance(one, dict) else {}) for one in whole.items("problems")]
        points = {one.text("index"): _points(one) for one in problems}
        rows = [
            FileRow(f"{path}: row {n}", one if isinstance(one, dict) else {})
            for n, one in enumerate(whole.items("rows"), 1)
        ]
        listed = [
            ContestRow(row.number("old_rating"), row.number("points"), row.number("penalty", 0.0)) for row in rows
        ]
        contests[path.stem] = Contest(path.stem, points, listed)
    return contests


def _points(problem: FileRow) -> float | None:
    return None if problem.fields.get("points") is None else problem.number("points")


def _of_interface(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The first form of a file in the second."""
    try:
        standings, changes = (found[name].get("result", found[name]) for name in ("standings", "rating_changes"))
        ratings = {change["handle"]: change["oldRating"] for change in changes}
        rows = [
            {"points": row["points"], "penalty": row["penalty"], "old_rating": ratings[handle]}
            for row in standings["rows"]
            if (handle := row["party"]["members"][0]["handle"]) in ratings
        ]
        return {"problems": standings["problems"], "rows": rows}
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{path}: not what Codeforces' contest.standings and contest.ratingChanges reply: {error!r}"
        ) from error


def read_ratings(path: Path) -> list[float]:
    """Ratings of participants in rising order: a list, or an object of rating and number of participants.

    Raises:
        ValueError: the file is missing or holds neither.
    """
    found = read_json(path)
    try:
        if isinstance(found, dict):
            found = [float(rating) for rating, number in found.items() for _ in range(int(number))]
        return sorted(map(float, found))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: required a list of ratings, or an object of rating and number: {error}") from error


def contest_result(contest: Contest, tries: dict[str, Sequence[bool]]) -> tuple[float, float]:
    """(points, penalty) of submissions by problem, in order; those behind the right one do not count."""
    points, penalty = 0.0, 0.0
    for index, submitted in tries.items():
        if True not in submitted:
            continue
        wrong = list(submitted).index(True)
        worth = contest.points[index]
        if worth is None:
            points, penalty = points + 1, penalty + LOST_MINUTES * wrong
        else:
            points += max(0.0, worth - LOST_POINTS * wrong)
    return points, penalty


def codeforces_totals(items: list[Item], marks: list[list[Marked]]) -> dict[str, float]:
    """rating: mean over contests of the rating whose expected rank is the model's; percentile where there are ratings.

    A contest with an undecided submission before a right one has no result: contests_left_out.
    """
    by_contest: dict[str, tuple[Contest, dict[str, Sequence[bool]]]] = {}
    unknown = set()
    for item, samples in zip(items, marks, strict=True):
        contest: Contest = item.data["contest"]
        verdicts = [mark.verdict for mark in samples]
        if "undecided" in verdicts[: verdicts.index("right") if "right" in verdicts else None]:
            unknown.add(contest.name)
        tries = by_contest.setdefault(contest.name, (contest, {}))[1]
        tries[item.data["index"]] = [verdict == "right" for verdict in verdicts]
    ratings = []
    for name, (contest, tries) in by_contest.items():
        if name not in unknown:
            rank = rank_of(*contest_result(contest, tries), contest.rows)
            ratings.append(rating_of_rank(rank, [row.rating for row in contest.rows]))
    found = {"contests_left_out": float(len(unknown))} if unknown else {}
    if not ratings:
        return found
    found["rating"] = fmean(ratings)
    if (others := items[0].data["ratings"]) is not None:
        found["percentile"] = 100 * percentile(found["rating"], others)
    return found
