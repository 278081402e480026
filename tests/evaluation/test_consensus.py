"""cons@k against values by hand."""

import pytest

from r1engine.data.question import Question
from r1engine.evaluation.consensus import consensus
from r1engine.evaluation.own_questions import same_answer


def numbers_agree(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("answers", "reference", "expected"),
    [
        (["7", "7", "7.0", "8", "8", "8", None], "8", 0.5),  # 3 to 3; by texts alone 8 would win
        (["7", "7", "7.0", "7", "8", "8", "8"], "8", 0.0),
        (["0.5", "0.50", ".5", "3", "3"], "0.5", 1.0),
        ([None, None], "1", 0.0),
        (["1", "2", "3"], "2", 1 / 3),
        (["1"], "1", 1.0),
    ],
)
def test_consensus_by_hand(answers, reference, expected):
    are_right = [answer is not None and numbers_agree(answer, reference) for answer in answers]
    assert consensus(answers, are_right, numbers_agree) == pytest.approx(expected)


def test_the_order_of_the_samples_does_not_matter():
    answers = ["7", "8", "7.0", "8.0", "9", "7.00"]
    are_right = [numbers_agree(answer, "7") for answer in answers]
    for shift in range(6):
        turned = [*range(shift, 6), *range(shift)]
        assert consensus([answers[i] for i in turned], [are_right[i] for i in turned], numbers_agree) == 1.0


def test_without_equivalence_equal_texts_vote():
    assert consensus(["a", "a", "b"], [False, False, True]) == 0.0
    assert consensus(["a", "b", "b"], [False, True, True]) == 1.0


def test_one_text_may_join_two_classes():
    # b is the same as a and as c, which are not found equal to each other.
    pairs = {("a", "b"), ("b", "c")}
    answers = ["a", "a", "c", "c", "d", "d", "d", "b"]
    assert consensus(answers, [a in "abc" for a in answers], lambda x, y: (x, y) in pairs) == 1.0


def test_values_written_differently_vote_together():
    answers = ["1/2", "0.5", "\\frac12", "3", "3"]
    question = Question("", "0.5")
    assert consensus(answers, [True] * 3 + [False] * 2, lambda x, y: same_answer(question, x, y)) == 1.0
    assert consensus(answers, [True] * 3 + [False] * 2) == 0.0  # by texts 3 has most votes
