"""Strides of a run on paper: which questions are taken when, as by `rollout/rollouts.py`, and how long it lasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from r1engine.plan.timeline.pool import Pool


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of the parts of a run, from a plan or from a run that was measured."""

    step: Callable[[int], float]  # of decoding one token of each of so many samples in one generator
    prefill: float = 0.0  # of a sample
    train_token: float  # of grading and training on a token, prompts included
    train: float = 0.0  # of a stride besides
    refresh: float  # of the weights, with what changes places in memory
    checkpoint: float
    restart: float  # from a failure to the first stride
    generators: int
    slots: int
    has_own_gpus: bool  # so that they draw while the trainer works
    gpus: int  # of trainer and generators


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a stride takes."""

    questions: int
    group_size: int
    prompt_tokens: float
    max_staleness: int = 0
    oversample: float = 1.0


@dataclass(frozen=True)
class Stride:
    """Seconds of one rollout and its updates."""

    generate: float  # that the trainer waits
    train: float
    refresh: float
    tokens: float  # of the completions that are trained on
    busy: float  # tokens that the generators drew over those that full slots would have drawn

    @property
    def seconds(self) -> float:
        return self.generate + self.train + self.refresh


@dataclass
class _Question:
    left: int  # samples that have not ended
    tokens: float
    carried: int = 0


class _OnTheWay:
    """The questions that are drawn, in the order of their issue."""

    def __init__(self, work: Demand, pool: Pool, lengths: Iterator[float]) -> None:
        self._work, self._pool, self._lengths = work, pool, lengths
        self._questions: dict[int, _Question] = {}
        self._issued = 0

    def issue(self) -> None:
        """Fill up to as many as are to be on their way."""
        for _ in range(round(self._work.questions * self._work.oversample) - len(self._questions)):
            drawn = [next(self._lengths) for _ in range(self._work.group_size)]
            self._questions[self._issued] = _Question(self._work.group_size, sum(drawn))
            self._pool.add([(tokens, self._issued) for tokens in drawn])
            self._issued += 1

    def ended(self, number: int) -> bool:
        """Note the end of a sample; returns whether its question was the last one that a stride waits for."""
        self._questions[number].left -= 1
        return self._questions[number].left == 0 and self.chosen() is not None

    def take(self) -> tuple[int, float]:
        """Take a stride's questions; returns how many, and the tokens of their completions."""
        taken = self.chosen()
        assert taken is not None
        tokens = sum(self._questions.pop(number).tokens for number in taken)
        for question in self._questions.values():
            question.carried += 1
        return len(taken), tokens

    def chosen(self) -> list[int] | None:
        """The questions that a stride takes, oldest first; None while they have not ended. As `Rollouts._choose`."""
        most, questions = self._work.max_staleness - 1, self._questions
        due = [number for number, question in questions.items() if question.carried >= most][: self._work.questions]
        others = [n for n, question in questions.items() if question.carried < most and question.left == 0]
        chosen = [*due, *others][: self._work.questions]
        if len(chosen) < self._work.questions or any(questions[number].left for number in due):
            return None
        return chosen


def strides(costs: Costs, work: Demand, lengths: Iterator[float]) -> Iterator[Stride]:
    """One stride after the other, without an end.

    Args:
        costs:   of the parts.
        work:    of a stride.
        lengths: of completions, in tokens.
    """
    pool = Pool(costs.generators, costs.slots, costs.step, costs.prefill)
    questions, now = _OnTheWay(work, pool, lengths), 0.0
    full = costs.slots / costs.step(costs.slots) * costs.generators  # tokens a second
    while True:
        began, before = now, pool.tokens
        questions.issue()
        if questions.chosen() is None:
            now = pool.run(now, math.inf, questions.ended)
        waited = now - began
        number, tokens = questions.take()
        trained = costs.train + costs.train_token * (tokens + number * work.group_size * work.prompt_tokens)
        if work.max_staleness:
            questions.issue()
            if costs.has_own_gpus:
                pool.run(now, now + trained, lambda question: questions.ended(question) and False)
        now += trained + costs.refresh
        yield Stride(waited, trained, costs.refresh, tokens, (pool.tokens - before) / (full * (now - began)))
