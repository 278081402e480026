"""Rule-based rewards (paper, section 2.2.2): is the answer right, and is it where it should be. No torch.

A verdict has three values. "undecided" says that a rule could not be computed: it is no reward of 0, the
sample is to be left out of its group.
"""

from __future__ import annotations

from dataclasses import dataclass

from r1engine.rewards.accuracy import Verdict, judge
from r1engine.rewards.extract import final_answer
from r1engine.rewards.format import format_problem

__all__ = ["Score", "Verdict", "score"]


@dataclass(frozen=True)
class Score:
    """What the rules say of one completion."""

    verdict: Verdict  # of the accuracy rule
    components: dict[str, float]  # "format" always; "accuracy" unless undecided; each 0 or 1, unweighted
    reason: str  # one line, for the samples of the report


def score(completion_text: str, prompt_task: str, reference: str, *, think_prefilled: bool = False) -> Score:
    """Accuracy and format of one completion.

    Args:
        completion_text: what the model wrote after the prompt.
        prompt_task: the rule to use; "math".
        reference: the right answer.
        think_prefilled: the prompt itself ended with `<think>`.

    Raises:
        ValueError: there is no rule for the task.
    """
    if prompt_task != "math":
        raise ValueError(f"score: found task '{prompt_task}', required 'math'")
    problem = format_problem(completion_text, think_prefilled=think_prefilled)
    components = {"format": 0.0 if problem else 1.0}
    answer, why_none = final_answer(completion_text, think_prefilled=think_prefilled)
    if answer is None:
        verdict, reason = "wrong", why_none
    else:
        verdict, reason = judge(answer, reference)
    if verdict != "undecided":
        components["accuracy"] = 1.0 if verdict == "right" else 0.0
    return Score(verdict, components, f"{reason}; format: {problem}" if problem else reason)
