"""Questions with and without a signal: what is trained on, and what is logged."""

from __future__ import annotations

import statistics

import pytest

from r1engine.batch import Completion, Prompt
from r1engine.config import ConfigError, RlConfig
from r1engine.config.source import read_overrides, validate
from r1engine.data.question import Question
from r1engine.rewards import Score
from r1engine.rollout.draft import new_drafts
from r1engine.stages.groups import group_metrics, has_signal, num_missing, with_signal_first

CFG = RlConfig(grpo={"questions": 2, "group_size": 3, "minibatches": 1}, rewards={"format": 0.0})
WORDS = {"r": "right", "w": "wrong", "u": "undecided"}


def drawn(*groups: str) -> list[tuple[Completion, Score]]:
    """Groups of completions by the first letters of their verdicts."""
    pairs = []
    for number, group in enumerate(groups):
        prompt = Prompt(number, [1], "p", Question("q"))
        for sample, letter in enumerate(group):
            components = {} if letter == "u" else {"accuracy": float(letter == "r")}
            completion = Completion(prompt, sample, [1], [0.0], "t", truncated=False)
            pairs.append((completion, Score(WORDS[letter], components, "")))
    return pairs


def prompts(graded: list[tuple[Completion, Score]]) -> list[int]:
    return [completion.prompt.id for completion, _ in graded[::3]]


def test_a_signal_takes_two_rewards():
    assert has_signal([0.0, 1.0, 1.0]) and not has_signal([1.0, 1.0]) and not has_signal([1.0]) and not has_signal([])


@pytest.mark.parametrize(
    ("groups", "missing", "kept"),
    [
        (("rrr", "rww"), 1, [0, 1]),
        (("rrr", "rww", "wwr"), 0, [1, 2]),
        (("rww", "rrr", "wwr", "rwr"), 0, [0, 2]),  # the first two that have one
        (("rrr", "www", "ruu", "rrw"), 1, [0, 3]),  # as many as there must be: one without
        (("rwu", "rrr", "www"), 1, [0, 1]),
    ],
)
def test_questions_without_a_signal_give_way(groups, missing, kept):
    graded = drawn(*groups)
    assert num_missing(graded, CFG, 0) == missing
    assert prompts(with_signal_first(graded, CFG, 0)) == kept


def test_metrics_are_means_over_the_questions_that_were_drawn():
    found = group_metrics(drawn("rrr", "www", "rww", "ruu"), CFG, 0)
    spread = statistics.stdev([1, 0, 0])
    assert found == {
        "reward/std": pytest.approx(spread / 3),
        "groups/without_signal": 0.75,
        "groups/all_right": 0.25,
        "groups/all_wrong": 0.25,
        "groups/drawn_again": 2.0,
    }
    assert "reward/std" not in group_metrics(drawn("ruu", "uuu"), CFG, 0)  # unknown is not 0


def test_another_drawing_of_a_step_draws_other_samples():
    prompt = Prompt(0, [1], "p", Question("q"))
    streams = [
        {draft.stream for draft in new_drafts([prompt] * 2, num_samples=3, step=5, max_tokens=1, drawing=drawing)}
        for drawing in range(3)
    ]
    assert len(set.union(*streams)) == 18


def test_questions_that_are_drawn_ahead_are_not_drawn_again():
    with pytest.raises(ConfigError, match=r"grpo.dynamic_sampling: found rollout.max_staleness 1, required 0"):
        validate(RlConfig, read_overrides(["grpo.dynamic_sampling=2", "rollout.max_staleness=1"]))
