"""Preference rewards: what each reward model sees, and its schedule."""

import pytest

from r1engine.config import RewardModelServer, Rewards
from r1engine.rewards.servers.preference import rated_text, summary


def test_helpfulness_sees_the_summary_and_harmlessness_everything():
    text = "<think>secret plan</think> <answer>Hello.</answer>"
    assert rated_text("helpfulness", text) == "Hello."
    assert rated_text("harmlessness", text) == text


@pytest.mark.parametrize(
    ("completion", "prefilled", "expected"),
    [
        ("<think>a</think>\nb", False, "b"),
        ("a</think>b", True, "b"),
        ("no thoughts", False, "no thoughts"),
        ("<think>never ends", False, ""),
        ("never ends", True, ""),
        ("<think>a</think>b<think>c</think>d", False, "d"),
        ("<think>a</think>b<think>c", False, "b"),
    ],
)
def test_summary_is_what_follows_the_thoughts(completion, prefilled, expected):
    assert summary(completion, think_prefilled=prefilled) == expected


def test_preference_rewards_count_in_the_last_400_of_1700_steps():
    model = RewardModelServer(urls=["http://a"], model="m", template="{prompt}{response}")
    rewards = Rewards(helpfulness={0: 0.0, 1300: 1.0}, helpfulness_model=model)
    assert [rewards.weights_at(step)["helpfulness"] for step in range(1700)] == [0.0] * 1300 + [1.0] * 400
    assert [rewards.is_rated_at(step) for step in (0, 1299, 1300, 1699)] == [False, False, True, True]
