"""The compute-optimal choice (Snell et al., 2024): at each budget the best search for questions of a difficulty.

Nothing is chosen by what it is judged by. The difficulty of a question comes from samples that no search has; which
search is best in a bin is told by one half of its questions, and its accuracy by the other half.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from r1engine.config.searching import DIFFICULTY
from r1engine.sampling.search_rows import Row

BINS = 5  # quintiles
ROOM = 1.02  # a budget holds what draws 2 % more: lengths differ by chance

Verdicts = Mapping[int, bool]  # question -> whether the search's answer is right; undecided ones are not in it


def bins_of(shares: Mapping[int, float], count: int = BINS) -> list[list[int]]:
    """Questions in bins of about equal size, the hardest first.

    Args:
        shares: question -> share of right ones of its samples.
        count:  bins; fewer where there are fewer than two questions for each.
    """
    order = sorted(shares, key=lambda number: (shares[number], number))
    count = max(1, min(count, len(order) // 2))
    edges = [round(i * len(order) / count) for i in range(count + 1)]
    return [order[a:b] for a, b in itertools.pairwise(edges)]


def envelope(verdicts: Mapping[str, Verdicts], drawn: Mapping[str, float], bins: Sequence[Sequence[int]]) -> list[Any]:
    """At the tokens of each search: the accuracy of the best choice of a bin, and of one choice for all.

    Args:
        verdicts: search -> of its questions.
        drawn:    search -> tokens drawn for a question, in the mean.
        bins:     of `bins_of`.

    Returns:
        By budget: {"budget", "optimal", "single", "chosen"}: accuracies, and the choices of each bin, of either half.
    """
    halves = [([*one[::2]], [*one[1::2]]) for one in bins]
    whole = [n for first, _ in halves for n in first], [n for _, second in halves for n in second]
    found = []
    budgets = sorted(drawn.values())
    for budget, following in itertools.zip_longest(budgets, budgets[1:], fillvalue=math.inf):
        if following <= ROOM * budget:
            continue  # the same budget
        able = sorted((name for name in verdicts if drawn[name] <= ROOM * budget), key=lambda name: drawn[name])
        by_bin = [_crossed(verdicts, able, pair, whole) for pair in halves]
        right = [one for _, judged in by_bin for one in judged]
        _, single = _crossed(verdicts, able, whole, whole)
        if right and single:
            chosen = [names for names, _ in by_bin]
            found.append({"budget": budget, "optimal": fmean(right), "single": fmean(single), "chosen": chosen})
    return found


def _crossed(
    verdicts: Mapping[str, Verdicts],
    able: list[str],
    halves: tuple[list[int], list[int]],
    whole: tuple[list[int], list[int]],
) -> tuple[list[str], list[bool]]:
    """The best search of each half of a bin, and its verdicts on the other half.

    Of equal ones that which is better in that half of all bins, then the cheaper one: bins may be small. A search of
    which nothing is decided in the bin has its accuracy of all bins there; without one it comes last.
    """

    def worth(name: str, half: list[int], of_all: list[int]) -> tuple[float, float, int]:
        whole_half = _accuracy(verdicts[name], of_all, -1.0)
        return _accuracy(verdicts[name], half, whole_half), whole_half, -able.index(name)

    pairs = [*zip(halves, whole, strict=True)]
    names = [max(able, key=lambda name: worth(name, half, of_all)) for half, of_all in pairs]
    judged = [verdicts[name][n] for name, half in zip(names, halves[::-1], strict=True) for n in half
              if n in verdicts[name]]  # fmt: skip
    return names, judged


def _accuracy(verdicts: Verdicts, questions: Sequence[int], unknown: float) -> float:
    known = [verdicts[number] for number in questions if number in verdicts]
    return fmean(known) if known else unknown


def envelope_of(rows: list[Row], table: Row) -> list[Row]:
    """`envelope` of the searches of a table; [] where nothing tells how hard questions are."""
    known = [row for row in rows if row["search"] == DIFFICULTY and row["decided"]]
    shares = {row["id"]: row["right"] / row["decided"] for row in known}
    searches: dict[str, Row] = table["searches"]
    drawn = {name: found["drawn"] for name, found in searches.items() if found["drawn"]}
    if len(shares) < 2 * BINS or len(drawn) < 2:
        return []
    verdicts: dict[str, dict[int, bool]] = {name: {} for name in drawn}
    for row in rows:
        if row["search"] in drawn and row["verdict"] != "undecided":
            verdicts[row["search"]][row["id"]] = row["verdict"] == "right"
    return envelope(verdicts, drawn, bins_of(shares))


def envelope_cells(found: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of it as a table."""
    bins = len(found[0]["chosen"])
    names = [f"{number} of {bins}" for number in range(1, bins + 1)]
    names[0], names[-1] = "hardest", "easiest"
    lines = []
    for row in found:
        chosen = [", ".join(dict.fromkeys(choices)) for choices in row["chosen"]]
        lines.append([f"{row['budget']:,.0f}", f"{row['optimal']:.3f}", f"{row['single']:.3f}", *chosen])
    return ["budget", "by difficulty", "one for all", *names], lines


def envelope_text(found: list[Row]) -> str:
    """It as Markdown; "" of an empty one."""
    if not found:
        return ""
    head, lines = envelope_cells(found)
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(["", *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
