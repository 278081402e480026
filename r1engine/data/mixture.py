"""How many rows of each domain go into the data, and the paper's Table 5 beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# v2, Table 5: rows, mean rounds, mean tokens of the 800 thousand.
PAPER = {
    "math": (395_285, 1.0, 6094.2),
    "code": (211_129, 1.1, 7435.7),
    "stem": (10_124, 1.0, 4928.8),
    "logic": (10_395, 1.0, 2739.0),
    "general": (177_812, 1.1, 1419.8),
    "total": (804_745, 1.0, 5355.3),
}
TOTAL = "total"


def wanted(available: dict[str, int], counts: dict[str, int] | None, shares: dict[str, float] | None) -> dict[str, int]:
    """Rows of each domain that the mixture takes.

    Args:
        available: domain -> rows that there are.
        counts:    domain -> rows that are asked for.
        shares:    domain -> share, in any unit; as many rows as the scarcest domain allows. At most one is given.

    Raises:
        ValueError: there are fewer rows than asked for.
    """
    if counts is not None:
        missing = [
            f"counts.{domain}: found {available.get(domain, 0):,}, required {count:,}"
            for domain, count in counts.items()
            if available.get(domain, 0) < count
        ]
        if missing:
            raise ValueError("; ".join(missing))
        return counts
    if shares is not None:
        if none := [domain for domain in shares if not available.get(domain)]:
            raise ValueError(f"shares.{none[0]}: found no row of it, only {', '.join(sorted(available))}")
        unit = min(available[domain] / share for domain, share in shares.items())
        return {domain: min(available[domain], round(unit * share)) for domain, share in shares.items()}
    return available


@dataclass(frozen=True)
class DomainStatistics:
    """A line of Table 5."""

    rows: int
    rounds: float  # mean number of questions of a conversation
    tokens_mean: float
    tokens_p50: float
    tokens_p95: float


def statistics(rows: Iterable[tuple[str, int, int]]) -> dict[str, DomainStatistics]:
    """Domain -> its line of Table 5, and `total`.

    Args:
        rows: (domain, rounds, tokens) of each row.
    """
    by_domain: dict[str, list[tuple[int, int]]] = {}
    for domain, rounds, tokens in rows:
        by_domain.setdefault(domain, []).append((rounds, tokens))
    order = [*(name for name in PAPER if name in by_domain), *sorted(by_domain.keys() - PAPER.keys())]
    lines = {domain: _line(by_domain[domain]) for domain in order}
    whole = [row for domain in order for row in by_domain[domain]]
    return lines | ({TOTAL: _line(whole)} if whole else {})


def _line(rows: list[tuple[int, int]]) -> DomainStatistics:
    values = np.array(rows, np.int64)
    half, most = np.percentile(values[:, 1], [50, 95])
    rounds, tokens = values.mean(axis=0)
    return DomainStatistics(len(rows), float(rounds), float(tokens), float(half), float(most))
