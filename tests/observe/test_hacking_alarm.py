"""The alarm of a reward model that is hacked: rings then, and only then."""

import random

import pytest

from r1engine.observe.hacking_alarm import Alarms, HackingAlarm


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


def test_each_reward_model_of_a_run_has_an_alarm_of_its_own():
    alarms = Alarms(["helpfulness", "harmlessness"], window=8)
    for t in range(8):
        row = {"reward/helpfulness": 0.1 * t, "reward/harmlessness": 1.0, "reward/accuracy": 1 - 0.1 * t}
        warnings = alarms.update(row)
        assert alarms.update({"reward/helpfulness": 9.0}) == {}  # without a verifiable reward it knows nothing
    assert list(warnings) == ["helpfulness"]
