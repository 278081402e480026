"""Scores of steps as a reward: the forms by hand."""

import pytest

from r1engine.batch import per_token
from r1engine.search.credit import of_completion, pure_weights, runs_of_tokens, step_advantages


def test_one_number_a_completion():
    scores = [0.9, 0.5, 0.8]
    wanted = {"last": 0.8, "min": 0.5, "prod": 0.36, "mean": 2.2 / 3, "sum": 2.2}
    assert {how: of_completion(scores, how) for how in wanted} == pytest.approx(wanted)
    assert of_completion(scores, "pure") == 0.5  # what is logged of it
    with pytest.raises(ValueError, match="found no score of a step, required at least one"):
        of_completion([], "min")


def test_credit_of_deepseekmath_by_hand():
    # Rewards (1, 0), (1, 1): mean 0.75, standard deviation 0.5; r~ = 0.5, -1.5, 0.5, 0.5.
    assert step_advantages([[1, 0], [1, 1]], "deepseekmath") == [[-1.0, -1.5], [1.0, 0.5]]
    assert step_advantages([[1, 0], [], [1, 1]], "deepseekmath") == [[-1.0, -1.5], [], [1.0, 0.5]]
    found = step_advantages([[1, 0], [1, 1]], "deepseekmath", ddof=0)
    assert found[0] == pytest.approx([-2 / 3**0.5, -3 / 3**0.5])
    assert step_advantages([[0.5, 0.5], [0.5]], "deepseekmath") == [[0.0, 0.0], [0.0]]
    assert step_advantages([[0.5]], "deepseekmath") == [[0.0]] and step_advantages([[]], "deepseekmath") == [[]]


def test_credit_of_pure_by_hand():
    assert pure_weights([0.9, 0.2, 0.8], 1e-4) == pytest.approx([0, 1, 0])
    assert pure_weights([0.3, 0.3]) == [0.5, 0.5]
    sharp = step_advantages([[1.0, 0.0], [1.0, 1.0]], "pure")
    # All weight on the minimum: sums 0 and 1, their mean 0.5; behind the minimum nothing is left to lose.
    assert sharp[0] == pytest.approx([-0.5, -0.5], abs=1e-3) and sharp[1] == pytest.approx([0.5, 0.0], abs=1e-3)


def test_tokens_have_the_advantage_of_their_step():
    assert per_token(tuple(runs_of_tokens([-1.0, 2.0], [2, 3], 5))).tolist() == [-1.0, -1.0, 2.0, 2.0, 2.0]
    assert per_token(tuple(runs_of_tokens([], [], 2))).tolist() == [0.0, 0.0]
