"""The row of reward "functions": nothing of the engine's grades the question, only the user's functions do."""

from __future__ import annotations

from r1engine.rewards.rule import Grade, Rule, find_all

RIGHT_FROM = 0.5  # value of the first function from which a completion counts as right

FUNCTIONS = Rule("functions", lambda *_: Grade("undecided", "not called", {}), find=find_all)


def verdict_of(name: str | None, values: dict[str, float], unknown: dict[str, str]) -> Grade:
    """Right where the function gives at least 0.5, wrong below, undecided where it gives nothing.

    Args:
        name:    of the first function of the configuration; None: there is none.
        values:  of the functions that gave one.
        unknown: function -> why it gave none.
    """
    if name is None:
        return Grade("undecided", "there is no function in rewards.functions", {})
    if name in unknown:
        return Grade("undecided", f"{name} gave no value", {})
    return Grade("right" if values[name] >= RIGHT_FROM else "wrong", f"{name} is {values[name]:g}", {})
