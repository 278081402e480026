"""The rules of the rewards, one row each. A new reward is its file with its row, and a line here."""

from __future__ import annotations

from r1engine.data.question import Question
from r1engine.rewards.choice import CHOICE, EXACT
from r1engine.rewards.code.rule import CODE
from r1engine.rewards.format import FORMAT
from r1engine.rewards.functions.rule import FUNCTIONS
from r1engine.rewards.gym import GYM
from r1engine.rewards.language import LANGUAGE, check_language
from r1engine.rewards.math.rule import MATH
from r1engine.rewards.rule import Rule
from r1engine.rewards.servers.judge import JUDGE
from r1engine.rewards.servers.preference import PREFERENCE

RULES: tuple[Rule, ...] = (MATH, CHOICE, EXACT, FORMAT, LANGUAGE, CODE, GYM, JUDGE, PREFERENCE, FUNCTIONS)


def rule_of(reward: str, where: str) -> Rule:
    """The rule of this name.

    Raises:
        ValueError: there is none; `where` begins the message.
    """
    for rule in RULES:
        if rule.name == reward:
            return rule
    raise ValueError(f"{where}: found reward '{reward}', required one of {', '.join(rule.name for rule in RULES)}")


def check_question(question: Question) -> None:
    """Refuses a question whose answers cannot be scored.

    Raises:
        ValueError: there is no such reward, it needs a reference or tests and there are none, or the language is
            unknown; the question's place is named.
    """
    where, rule = question.place, rule_of(question.reward, question.place)
    if rule.needs == "answer" and not question.answer.strip():
        raise ValueError(f"{where}: found no `answer`, required by reward '{rule.name}'")
    if rule.needs == "tests" and not isinstance(question.tests, (dict, list)):
        raise ValueError(
            f"{where}: found tests {question.tests!r:.40}, required by reward '{rule.name}' an object or a list"
        )
    if question.language:
        check_language(question.language, where)
