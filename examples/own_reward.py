"""Reward functions of one's own, for `rewards.functions` (docs/own-rewards.md).

A function asks for what it needs by the names of its parameters. Try one on a file of completions, without a model:

    r1engine reward completions.jsonl --out verdicts.jsonl --function examples/own_reward.py:close

and train with it:

    r1engine train config.yaml rewards.functions.close=examples/own_reward.py:close rewards.function_weights.close=0.5
"""

from __future__ import annotations

import re
from typing import Any


def close(final_answer: str | None, completion: str, answer: str) -> float | None:
    """1 for the reference itself, less the further a number is from it; 0 without a number.

    Small models mark no answer: the last number that they write then counts. None says that nothing can be said: the
    completion is then undecided, which is no reward of 0.
    """
    if final_answer is None:
        numbers = re.findall(r"-?\d+(?:\.\d+)?", completion)
        if not numbers:
            return 0.0
        final_answer = numbers[-1]
    try:
        found, wanted = float(final_answer), float(answer)
    except ValueError:
        return None
    return 1.0 / (1.0 + abs(found - wanted))


def rare(records: list[dict[str, Any]]) -> list[float]:
    """For every completion of a question, the share of the others that end in another answer.

    A function with the parameter `records` alone is called once a question, with all of its completions.
    """
    answers = [record["final_answer"] for record in records]
    others = max(1, len(answers) - 1)
    return [sum(other != own for other in answers) / others for own in answers]
