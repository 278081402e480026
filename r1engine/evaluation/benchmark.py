"""What a benchmark is: a row of the table in benchmarks.py. It loads, asks and grades; it draws nothing. No torch.

load(settings) -> [Item]                   the owners' file, in its order
ask(item, sample) -> str                   the user's message; the runner writes it in the model's template
grade(item, sample, reply) -> Grading      a verdict, a record for the scorer, or a question for the judge
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.data.question import Question
from r1engine.rewards.record import Record, Verdict
from r1engine.rewards.thoughts import split_thoughts


@dataclass(frozen=True)
class Item:
    """One question of a benchmark."""

    id: str  # the owners' own, else a hash of the text: stable whatever is left out, unique in the benchmark
    question: Question  # as the scorer needs it: text, answer, reward, tests
    cluster: str = ""  # what it shares with others, such as DROP's passage; "": it stands alone
    data: dict[str, Any] = field(default_factory=dict)  # what asking and grading need beside it


@dataclass(frozen=True)
class Reply:
    """What a model wrote."""

    text: str  # all of it; thoughts in <think> tags, also where the prompt opened them
    finish: Literal["stop", "length"]

    @property
    def summary(self) -> str:
        """What follows the thoughts; "" if they never end."""
        return split_thoughts(self.text).rest


@dataclass(frozen=True)
class Marked:
    """What a reply is worth."""

    verdict: Verdict
    score: float | None  # in [0, 1]; None if undecided
    answer: str | None  # what was read, so that replies to one question can be compared (a choice: the option, not
    # the letter it had in this sample); None: nothing was read, which is wrong and shown as unread
    reason: str  # one line
    parts: dict[str, float] = field(default_factory=dict)  # other metrics of the reply, e.g. {"exact": 0.0}


@dataclass(frozen=True)
class Graded:
    """For the scorer's rules: its workers, its sandbox, its judge."""

    record: Record
    answer: str | None  # as of `Marked`; a record whose answer is None is wrong without being scored


@dataclass(frozen=True)
class Judged:
    """For a judge that has a prompt of its own, as SimpleQA's."""

    prompt: str
    conclude: Callable[[str], Marked]  # of the judge's reply
    # The prompt for answers that cannot be right: a judge that takes one is not believed.
    canaries: tuple[str, ...] = ()


Grading = Marked | Graded | Judged


def ask_alone(item: Item, sample: int) -> str:
    """The question alone."""
    return item.question.text


def same_text(item: Item, first: str, second: str) -> bool:
    """Whether two answers to a question are the same for a vote."""
    return first == second


@dataclass(frozen=True)
class Benchmark:
    """A row of the table."""

    name: str  # as suites, files and paper_scores.json know it
    title: str  # as the paper writes it
    load: Callable[[BenchmarkSettings], list[Item]]  # ValueError names file and line
    ask: Callable[[Item, int], str]  # of the sample's number, 0 to k - 1
    grade: Callable[[Item, int, Reply], Grading]  # takes microseconds; what takes longer is for the scorer
    grader: str  # "math/1": the number changes when the rule does, and marks of other numbers are not compared
    metric: str = "pass@1"  # what the mean of the scores is called
    wanted: str = ""  # which file of the owners is loaded, for `list` and for messages
    licence: str = ""  # of the data
    published: int | None = None  # questions of the set that the paper's number is of
    private: bool = False  # texts are not shown on pages
    needs_judge: bool = False
    is_same: Callable[[Item, str, str], bool] = same_text  # of two answers to a question, for the vote
    # Metrics that are no mean over replies (IFEval's instructions, SimpleQA's F, a rating): name -> value, from the
    # items and the marks of each.
    totals: Callable[[list[Item], list[list[Marked]]], dict[str, float]] | None = None
