"""Lengths of completions: log-normal, or those of a file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from r1engine.config import ConfigError


def log_normal(mean: float, sigma: float, limit: float, seed: int) -> Iterator[float]:
    """Lengths whose logarithm is normal, cut at the limit of completions; their mean is `mean` in spite of the cut.

    Args:
        mean:  of the lengths, below the limit.
        sigma: of their logarithms.
        limit: longest.
        seed:  of the numbers.
    """
    generator, mu = random.Random(seed), _location(mean, sigma, limit)
    while True:
        yield max(1.0, min(limit, generator.lognormvariate(mu, sigma)))


def _location(mean: float, sigma: float, limit: float) -> float:
    """The mean of the logarithms for which the lengths, cut at the limit, have their mean."""
    low, high = math.log(mean) - sigma**2, math.log(limit) + 8 * sigma
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _cut_mean(middle, sigma, limit) < mean else (low, middle)
    return (low + high) / 2


def _cut_mean(mu: float, sigma: float, limit: float) -> float:
    """E[min(X, limit)] of a log-normal X."""
    at = (math.log(limit) - mu) / sigma
    return math.exp(mu + sigma**2 / 2) * _below(at - sigma) + limit * (1 - _below(at))


def _below(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def read_lengths(path: Path) -> list[float]:
    """`length` of each line of a file of JSON lines, such as a run's samples.jsonl; evaluations are left out.

    Raises:
        ConfigError: it is not such a file.
    """
    found: list[float] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"simulate: {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            length = row["length"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"simulate: {path}:{number}: found no length, required a line with one") from None
        if isinstance(length, bool) or not isinstance(length, int | float) or not 0 < length < math.inf:
            raise ConfigError(f"simulate: {path}:{number}: found length {length!r}, required a number above 0")
        if not row.get("heldout"):
            found.append(float(length))
    if not found:
        raise ConfigError(f"simulate: {path}: found no completion, required the lengths of some")
    return found


def drawn_from(lengths: Sequence[float], seed: int) -> Iterator[float]:
    """Lengths of completions that were, in a random order, again and again."""
    generator = random.Random(seed)
    while True:
        yield generator.choice(lengths)
