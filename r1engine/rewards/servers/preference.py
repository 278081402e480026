"""The row of reward "preference" in the table of rules (paper, section 2.3.4), and what each reward model sees."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from r1engine.data.question import Question
from r1engine.rewards.format import grade_format
from r1engine.rewards.record import Record
from r1engine.rewards.rule import Grade, Inquiry, Rule, find_all
from r1engine.rewards.servers.reward_model import Rating
from r1engine.rewards.thoughts import OPENING, split_thoughts

if TYPE_CHECKING:
    from r1engine.rewards.settings import ScorerSettings


def summary(completion: str, *, think_prefilled: bool = False) -> str:
    """What follows the thoughts, up to thoughts that begin again: what the user reads, without `<answer>` tags; "" if
    the thoughts never end."""
    shown = split_thoughts(completion, think_prefilled=think_prefilled).rest.partition(OPENING)[0]
    return shown.replace("<answer>", "").replace("</answer>", "").strip()


def is_rated_by(question: Question, name: str) -> bool:
    """Whether the reward model `name` rates the answers to a question: each in v2 has one of the two, or has both."""
    return question.reward == "preference" and question.rated_by in ("", name)


def rated_text(name: str, completion: str, *, think_prefilled: bool = False) -> str:
    """What the reward model `name` sees of a completion.

    "For helpfulness, we focus exclusively on the final summary"; "for harmlessness, we evaluate the entire response".
    """
    return summary(completion, think_prefilled=think_prefilled) if name == "helpfulness" else completion


def _grade(completion: str, record: Record, settings: ScorerSettings) -> Inquiry:
    """The verdict is that of the format; each reward model adds a component."""
    pairs = {
        name: (record.asked, rated_text(name, completion, think_prefilled=record.think_prefilled))
        for name in settings.reward_models
        if is_rated_by(record.question, name)
    }
    return Inquiry(pairs, partial(_conclude, grade_format(completion, record, settings)))


def _conclude(of_format: Grade, ratings: dict[str, Rating]) -> Grade:
    verdict, reason = of_format.verdict, of_format.reason
    components = {}
    for name, (rating, problem) in ratings.items():
        if rating is not None:
            components[name] = rating
        else:
            verdict, reason = "undecided", f"{name}: {problem}"
    return Grade(verdict, reason, components)


PREFERENCE = Rule("preference", _grade, find=find_all, component="format", server="reward_models")
