"""Preference rewards: what each reward model sees, its schedule, and the alarm."""

import math
import random

import pytest

from r1engine.rewards.preference import HackingAlarm, preference_components, summary, weight_at


def test_helpfulness_sees_the_summary_and_harmlessness_everything():
    seen = {}

    def model(name, score):
        def scores(pairs):
            seen[name] = list(pairs)
            return [score] * len(pairs)

        return scores

    text = "<think>secret plan</think> <answer>Hello.</answer>"
    components = preference_components(
        ["Hi"], [text], helpfulness=model("helpfulness", 0.5), harmlessness=model("harmlessness", 0.25)
    )
    assert seen == {"helpfulness": [("Hi", "Hello.")], "harmlessness": [("Hi", text)]}
    assert components == [{"helpfulness": 0.5, "harmlessness": 0.25}]


def test_missing_scores_are_left_out_and_not_zero():
    components = preference_components(
        ["a", "b"], ["x", "y"], helpfulness=lambda pairs: [None, math.nan], harmlessness=lambda pairs: [0.0, None]
    )
    assert components == [{"harmlessness": 0.0}, {}]
    with pytest.raises(ValueError, match="helpfulness: the reward model gave 1 scores for 2 texts"):
        preference_components(["a", "b"], ["x", "y"], helpfulness=lambda pairs: [1.0], harmlessness=None)


@pytest.mark.parametrize(
    ("completion", "prefilled", "expected"),
    [
        ("<think>a</think>\nb", False, "b"),
        ("a</think>b", True, "b"),
        ("no thoughts", False, "no thoughts"),
        ("<think>never ends", False, ""),
        ("never ends", True, ""),
        ("<think>a</think>b<think>c</think>d", False, "d"),
    ],
)
def test_summary_is_what_follows_the_thoughts(completion, prefilled, expected):
    assert summary(completion, think_prefilled=prefilled) == expected


def test_preference_rewards_count_in_the_last_400_of_1700_steps():
    schedule = {0: 0.0, 1300: 1.0}
    weights = [weight_at(schedule, step) for step in range(1700)]
    assert weights == [0.0] * 1300 + [1.0] * 400
    with pytest.raises(ValueError, match=r"found the steps \[5\], required one from step 0 on"):
        weight_at({5: 1.0}, 7)


def run(alarm, steps, model_slope, verifiable_slope, seed=0):
    """Warnings over steps of noisy rewards with these slopes a step."""
    noise = random.Random(seed)
    return [
        alarm.update(0.02 * noise.gauss(0, 1) + model_slope * t, 0.5 + 0.02 * noise.gauss(0, 1) + verifiable_slope * t)
        for t in range(steps)
    ]


def test_alarm_rings_when_the_model_reward_rises_and_the_verifiable_falls():
    warnings = run(HackingAlarm(window=40), 60, +0.003, -0.003)
    assert any(warnings) and not any(warnings[:39])
    assert "reward model's score changed by +0.0" in warnings[-1] and "the verifiable reward by -0.0" in warnings[-1]


@pytest.mark.parametrize(("model_slope", "verifiable_slope"), [(0, 0), (0.003, 0.002), (0.003, 0), (-0.003, -0.002)])
def test_alarm_is_silent_otherwise(model_slope, verifiable_slope):
    for seed in range(10):
        assert not any(run(HackingAlarm(window=40), 400, model_slope, verifiable_slope, seed))


def test_alarm_works_without_noise_and_refuses_a_short_window():
    alarm = HackingAlarm(window=8)
    assert not any(alarm.update(1.0, 1.0) for _ in range(20))
    with pytest.raises(ValueError, match="found window 7, required at least 8"):
        HackingAlarm(window=7)
