"""Length, overlong and repetition terms, by hand from their formulas."""

from __future__ import annotations

import pytest

from r1engine.rewards import Score
from r1engine.rewards.shaping import length_terms, overlong_term, repetition_term, shape


def test_length_reward_by_hand():
    # Kimi k1.5: lambda = 0.5 - (length - 10) / (30 - 10); a wrong answer never gains.
    assert length_terms([10, 20, 30, 10], [True, True, True, False]) == [0.5, 0.0, -0.5, 0.0]
    assert length_terms([10, 30], [False, False]) == [0.0, -0.5]
    assert length_terms([7, 7], [True, False]) == [0.0, 0.0]


@pytest.mark.parametrize(("length", "term"), [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (120, -1)])
def test_overlong_punishment_by_hand(length, term):
    assert overlong_term(length, limit=100, margin=20) == term


def test_repetition_is_the_share_of_repeated_ngrams():
    assert repetition_term("a b c d e f", 2) == 0
    assert repetition_term("a b a b a b", 2) == pytest.approx(2 / 5 - 1)  # ab ba ab ba ab
    assert repetition_term("a a", 2) == 0  # one n-gram repeats nothing
    assert repetition_term("", 3) == 0
    assert repetition_term("x " * 1000, 3) == pytest.approx(1 / 998 - 1)


def test_text_without_spaces_is_taken_by_characters():
    assert repetition_term("\u597d\u7684" * 50, 2) == pytest.approx(2 / 99 - 1)


def test_shape_adds_only_the_terms_asked_for():
    scores = [Score("right", {"accuracy": 1.0}, ""), Score("wrong", {"accuracy": 0.0}, "")]
    common = {"limit": 100, "overlong_margin": 20, "repetition_ngram": 2}
    done = shape(scores, ["a b", "c d"], [50, 90], **common, terms=frozenset({"length", "overlong"}))
    assert [s.components for s in done] == [
        {"accuracy": 1.0, "length": 0.5, "overlong": 0.0},
        {"accuracy": 0.0, "length": -0.5, "overlong": -0.5},
    ]
    assert shape(scores, ["", ""], [1, 2], **common, terms=frozenset()) == scores
