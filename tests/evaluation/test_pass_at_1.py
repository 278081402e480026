"""What an evaluation logs: the mean of question means, undecided samples as a range, never pooled."""

import pytest

from r1engine.batch import Completion, Prompt
from r1engine.data.question import Question
from r1engine.evaluation.pass_at_1 import Samples, heldout_metrics
from r1engine.rewards import Score


def group(number: int, verdicts: str) -> Samples:
    """Samples of a question: r right, w wrong, u undecided."""
    names = {"r": "right", "w": "wrong", "u": "undecided"}
    prompt = Prompt(number, [1], "", Question(""))
    return Samples.of(
        [
            (
                Completion(prompt, i, [1, 2], [0.0] * 2, "", False),
                Score(names[v], {"format": 1.0} if v != "u" else {}, ""),
            )
            for i, v in enumerate(verdicts)
        ]
    )


def test_a_question_counts_once_however_many_of_its_samples_are_decided():
    found = heldout_metrics([group(0, "rrrr"), group(1, "wuuu")])
    assert found["eval/pass_at_1"] == 0.5  # pooled it would be 4 / 5
    assert found["eval/undecided"] == 3 / 8
    assert (found["eval/undecided_wrong"], found["eval/undecided_right"]) == (0.5, 0.875)
    assert found["eval/format"] == 1.0 and found["eval/length_mean"] == 2.0


def test_the_interval_is_over_questions():
    found = heldout_metrics([group(0, "rr"), group(1, "rw"), group(2, "ww")])
    assert (found["eval/pass_at_1"], found["eval/pass_at_1_low"], found["eval/pass_at_1_high"]) == (0.5, 0.0, 1.0)
    sure = heldout_metrics([group(i, "rrrw") for i in range(30)])
    assert (sure["eval/pass_at_1_low"], sure["eval/pass_at_1_high"]) == pytest.approx((0.75, 0.75))
    assert "eval/undecided_wrong" not in sure


def test_the_majority_votes_by_value():
    texts = [
        "<answer>0.5</answer>",
        "<answer>1/2</answer>",
        "<answer>3</answer>",
        "<answer>3</answer>",
        "<answer></answer>",
    ]
    prompt = Prompt(0, [1], "", Question("", "0.5"))
    verdicts = ["right", "right", "wrong", "wrong", "wrong"]
    samples = [
        (Completion(prompt, i, [1], [0.0], text, False), Score(verdict, {}, ""))
        for i, (text, verdict) in enumerate(zip(texts, verdicts, strict=True))
    ]
    assert heldout_metrics([Samples.of(samples)])["eval/cons_at_k"] == 0.5  # two say one half, two say three
    assert heldout_metrics([Samples.of(samples[:3])])["eval/cons_at_k"] == 1.0


def test_nothing_decided_is_not_zero():
    assert "eval/pass_at_1" not in heldout_metrics([group(0, "uu")])
