"""Votes by hand."""

from functools import partial

from r1engine.data.question import Question
from r1engine.evaluation.own_questions import same_answer
from r1engine.search.vote import Candidate, choose

ANSWERS = [Candidate("A", 0.2), Candidate("B", 0.45), Candidate("A", 0.3)]
SAME = partial(same_answer, Question("", "1", reward="math"))


def test_majority_weighted_majority_and_best():
    assert choose(ANSWERS, "majority") == 2  # A, by its better candidate
    assert choose(ANSWERS, "vote") == 2  # .5 to .45
    assert choose(ANSWERS, "best") == 1


def test_equal_values_of_mathematics_are_one_answer():
    split = [Candidate("1/2", 0.3), Candidate("0.5", 0.3), Candidate("3", 0.5)]
    assert choose(split, "vote", SAME) == 0
    assert choose(split, "vote") == 2


def test_no_answer_never_wins_unless_there_is_none():
    assert choose([Candidate(None, 1.0), Candidate(None, 1.0), Candidate("A", 0.0)], "vote") == 2
    assert choose([Candidate(None, 1.0), Candidate("A", 0.0)], "best") == 1
    assert choose([Candidate(None, 1.0)], "majority") is None
    assert choose([], "vote") is None


def test_a_tie_goes_to_the_higher_value_then_to_the_earlier_sample():
    assert choose([Candidate("A", 0.4), Candidate("B", 0.5)], "majority") == 1
    assert choose([Candidate("A", 0.5), Candidate("B", 0.5)], "majority") == 0
    assert choose([Candidate("A", 0.5), Candidate("B", 0.5)], "vote") == 0
    assert choose([Candidate("A", 0.3), Candidate("A", 0.3), Candidate("B", 0.6)], "vote") == 2


def test_a_weight_counts_how_often_a_candidate_was_drawn():
    drawn = [Candidate("A", 0.2, weight=3.0), Candidate("B", 0.5)]
    assert choose(drawn, "majority") == 0
    assert choose(drawn, "vote") == 0  # .6 to .5
    assert choose(drawn, "best") == 1
