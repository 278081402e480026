"""The gates of the miniature of search, by hand."""

import pytest

from r1engine.sampling.chain_gates import MEASURES, gates, measures

HELD = {  # a run in which every gate holds, each by little
    "labels by rollouts: accuracy": 0.75,
    "labels by rollouts: wrong called right": 0.26,
    "F1, exact labels": 0.75,
    "F1, hard labels by rollouts": 0.55,
    "best-of-16, vote": 0.8,
    "best-of-16, majority": 0.6,
    "beam of 4, vote": 0.71,
    "best-of-4, vote": 0.7,
    "best-of-64, best": 0.6,
    "best-of-16, best": 0.61,
    "RL by the sum: steps, first": 6.0,
    "RL by the sum: steps, last": 18.1,
    "RL by the sum: all steps right, last": 0.09,
    "RL by the minimum: steps, last": 2.9,
    "RL by the rule: accuracy, last": 0.76,
    "round: MCTS before": 0.5,
    "round: pass@1 before": 0.35,
    "round: right sibling above wrong, before": 0.61,
    "round: right sibling above wrong, after": 0.6,
}
FAILS = [  # measure, a value that its gate refuses
    ("labels by rollouts: accuracy", 0.91),
    ("labels by rollouts: accuracy", 0.74),
    ("labels by rollouts: wrong called right", 0.25),
    ("F1, exact labels", 0.749),
    ("F1, hard labels by rollouts", 0.56),
    ("best-of-16, majority", 0.61),
    ("beam of 4, vote", 0.7),
    ("best-of-64, best", 0.61),
    ("RL by the sum: steps, last", 18.0),
    ("RL by the sum: all steps right, last", 0.1),
    ("RL by the minimum: steps, last", 3.0),
    ("RL by the rule: accuracy, last", 0.75),
    ("round: MCTS before", 0.49),
    ("round: right sibling above wrong, after", 0.61),
]


def test_a_run_in_which_every_gate_holds():
    assert len(gates(HELD)) == 13 and all(gates(HELD).values())
    assert set(HELD) <= set(MEASURES)


@pytest.mark.parametrize(("measure", "value"), FAILS)
def test_each_gate_fails_alone(measure, value):
    run = HELD | {measure: value}
    failed = [name for name, holds in gates(run).items() if not holds]
    assert len(failed) == (2 if measure == "F1, exact labels" else 1)  # the other labels are compared with it


def test_a_gate_does_not_hold_where_its_measure_lacks():
    run = {name: value for name, value in HELD.items() if name != "round: right sibling above wrong, after"}
    assert [name for name, holds in gates(run).items() if not holds] == ["siblings told apart worse after the round"]


def test_measures_are_taken_from_the_summary_of_a_report():
    found = {"scorer exact": {"F1": 0.9}, "reward sum": {"all steps right last": 0.1}}
    assert measures(found) == {"F1, exact labels": 0.9, "RL by the sum: all steps right, last": 0.1}
