"""What graded replies come to: a summary of each benchmark, from stored lines alone. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import Any

from r1engine.evaluation.benchmark import Marked
from r1engine.evaluation.consensus import consensus
from r1engine.evaluation.entries import Entry, Key
from r1engine.evaluation.lines import GradeLine, SampleLine
from r1engine.evaluation.marking import mark_of
from r1engine.evaluation.statistics import Estimate, error_with, estimate

Summary = dict[str, Any]  # JSON values


def summarize(entry: Entry, replies: Mapping[Key, SampleLine], grades: Mapping[Key, GradeLine]) -> Summary:
    """The summary of a benchmark.

    `score` is the mean over questions of the mean over their decided replies, with its 95 % interval over questions (or
    clusters of them); a question without a decided reply is left out and counted. `wrong` and `right` under `undecided`
    are what it would be if every undecided reply were worth 0, or 1. `cons` is the share of questions whose majority is
    right. Shares and lengths are means over replies.
    """
    groups = [
        [grades[item.id, sample] for sample in range(entry.samples) if (item.id, sample) in grades]
        for item in entry.items
    ]
    drawn = [line for item in entry.items for s in range(entry.samples) if (line := replies.get((item.id, s)))]
    marks = [line for group in groups for line in group]
    found: Summary = {
        "title": entry.row.title,
        "kind": entry.row.name,
        "metric": entry.row.metric,
        "grader": entry.row.grader,
        "private": entry.is_private,
        "questions": len(entry.items),
        "samples": entry.samples,
        "replies": len(marks),
        "missing": len(entry.items) * entry.samples - len(marks),
    }
    if not marks:
        return found
    lengths = [line.tokens for line in drawn if line.tokens is not None]
    found |= {
        "score": _score(entry, groups),
        "undecided": _undecided(groups),
        "truncated": _share(sum(line.finish == "length" for line in drawn), len(drawn)),
        "unread": _share(sum(line.answer is None and line.verdict != "undecided" for line in marks), len(marks)),
        "tokens": fmean(lengths) if lengths else None,
        "parts": _parts(groups),
    }
    return found | _of_the_whole(entry, groups)


def _of_the_whole(entry: Entry, groups: list[list[GradeLine]]) -> Summary:
    """What is no mean over replies: the vote, and the totals of the benchmark."""
    found: Summary = {}
    if entry.settings.consensus:
        found["cons"] = _cons(entry, groups)
    if entry.row.totals is not None:
        by_item = [[mark_of(line) for line in group] for group in groups]
        known = [(item, kept) for item, kept in zip(entry.items, by_item, strict=True) if kept]
        found["totals"] = entry.row.totals([item for item, _ in known], [kept for _, kept in known])
    return found


def question_scores(grades: Mapping[Key, GradeLine]) -> dict[str, float]:
    """The score of each question: the mean of its decided replies; a question without any is left out."""
    groups: dict[str, list[float]] = {}
    for (question, _), line in grades.items():
        if line.score is not None:
            groups.setdefault(question, []).append(line.score)
    return {question: fmean(scores) for question, scores in groups.items()}


def _score(entry: Entry, groups: list[list[GradeLine]]) -> Summary | None:
    """None: nothing is decided, and unknown is not 0."""
    decided = [[line.score for line in group if line.score is not None] for group in groups]
    scores = [fmean(values) for values in decided if values]
    if not scores:
        return None
    clusters = [item.cluster or f"\0{item.id}" for item, values in zip(entry.items, decided, strict=True) if values]
    found = as_json(estimate(scores, clusters=clusters))
    sizes = {len(values) for values in decided if values}
    if entry.samples > 1 and sizes == {entry.samples} and len(scores) > 1 and _are_shares(decided):
        found["error_of_infinite_samples"] = error_with(math.inf, scores, drawn=entry.samples)
    return found


def _are_shares(decided: list[list[float]]) -> bool:
    return all(score in (0.0, 1.0) for values in decided for score in values)


def _undecided(groups: list[list[GradeLine]]) -> Summary:
    """How many, and what they could make of the score."""
    kept = [group for group in groups if group]
    reasons = Counter(line.reason[:200] for group in kept for line in group if line.score is None)
    return {
        "count": reasons.total(),
        "questions": sum(all(line.score is None for line in group) for group in kept),
        "wrong": fmean(fmean(line.score or 0.0 for line in group) for group in kept),
        "right": fmean(fmean(1.0 if line.score is None else line.score for line in group) for group in kept),
        "reasons": dict(reasons.most_common(3)),
    }


def _parts(groups: list[list[GradeLine]]) -> dict[str, Summary]:
    """Other metrics of the replies: mean over questions, with its interval."""
    names = dict.fromkeys(name for group in groups for line in group for name in line.parts)
    found = {}
    for name in names:
        values = [[line.parts[name] for line in group if name in line.parts] for group in groups]
        found[name] = as_json(estimate([fmean(group) for group in values if group]))
    return found


def _cons(entry: Entry, groups: list[list[GradeLine]]) -> Summary:
    shares = []
    for item, group in zip(entry.items, groups, strict=True):
        if group:
            marks: list[Marked] = [mark_of(line) for line in group]
            is_right = [mark.verdict == "right" for mark in marks]
            shares.append(consensus([m.answer for m in marks], is_right, partial(entry.row.is_same, item)))
    return as_json(estimate(shares))


def as_json(found: Estimate) -> Summary:
    """An estimate as JSON values; the error of a single question is unknown."""
    error = None if math.isnan(found.standard_error) else found.standard_error
    return {"mean": found.mean, "standard_error": error, "low": found.low, "high": found.high}


def _share(count: int, of: int) -> float | None:
    return count / of if of else None
