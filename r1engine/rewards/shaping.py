"""Shaping terms that DeepSeek-R1 does not use, all off by default: length, repetition, soft overlong punishment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from r1engine.rewards.record import Score

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd


def length_terms(lengths: Sequence[int], is_right: Sequence[bool]) -> list[float]:
    """Kimi k1.5's length reward, for the completions of one question.

        lambda = 0.5 - (length - shortest) / (longest - shortest)
        right: lambda      wrong: min(0, lambda)      all equally long: 0

    Args:
        lengths:  tokens of each completion.
        is_right: whether its answer is.

    Returns:
        From -0.5 to 0.5 each: short right answers are favoured, long wrong ones punished.
    """
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(lengths)
    terms = [0.5 - (length - shortest) / (longest - shortest) for length in lengths]
    return [term if right else min(0.0, term) for term, right in zip(terms, is_right, strict=True)]


def overlong_term(length: int, limit: int, margin: int) -> float:
    """DAPO's soft overlong punishment (eq. 13): 0 up to limit - margin, then linear to -1 at the limit.

    Args:
        length: tokens of the completion.
        limit:  most tokens of a completion.
        margin: tokens before the limit over which the punishment grows.
    """
    return max(-1.0, min(0.0, (limit - margin - length) / margin))


def repetition_term(text: str, size: int) -> float:
    """Minus the share of n-grams that occurred before: 0 if none did, near -1 for one phrase over and over.

    Words are separated by white space; a text without any (Chinese, Japanese) is taken by characters.

    Args:
        text: the completion.
        size: words of an n-gram; shorter texts repeat nothing.
    """
    words: Sequence[str] = text.split()
    if len(words) < len(text) / 20:  # longer than any word on average
        words = text
    total = len(words) - size + 1
    if total < 2:
        return 0.0
    values = np.fromiter(map(hash, words), np.int64, len(words)).astype(np.uint64)
    hashes = np.zeros(total, np.uint64)  # of each n-gram: a polynomial modulo 2**64
    for k in range(size):
        hashes = hashes * _FACTOR + values[k : k + total]
    return len(np.unique(hashes)) / total - 1


def shape(
    scores: Sequence[Score],
    texts: Sequence[str],
    lengths: Sequence[int],
    *,
    limit: int,
    overlong_margin: int,
    repetition_ngram: int,
    terms: frozenset[str],
) -> list[Score]:
    """The scores of one question's completions with the components of `terms` added.

    Args:
        scores:  of the G completions.
        texts:   what was written.
        lengths: tokens of it.
        limit:   most tokens of a completion.
        overlong_margin, repetition_ngram: see `overlong_term` and `repetition_term`.
        terms:   which of "length", "overlong", "repetition" to add.
    """
    added: dict[str, list[float]] = {}
    if "length" in terms:
        added["length"] = length_terms(lengths, [score.verdict == "right" for score in scores])
    if "overlong" in terms:
        added["overlong"] = [overlong_term(length, limit, overlong_margin) for length in lengths]
    if "repetition" in terms:
        added["repetition"] = [repetition_term(text, repetition_ngram) for text in texts]
    return [
        replace(score, components=score.components | {name: values[i] for name, values in added.items()})
        for i, score in enumerate(scores)
    ]
