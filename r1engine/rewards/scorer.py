"""The front of all rewards: takes a record to its rule, computes in worker processes, returns scores in order."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

from r1engine.cores import own_cores
from r1engine.rewards.format import FORMAT
from r1engine.rewards.functions import Call, RewardFunctions
from r1engine.rewards.functions.rule import FUNCTIONS, verdict_of
from r1engine.rewards.language import LANGUAGE
from r1engine.rewards.record import Record, Score
from r1engine.rewards.rule import Grade, Inquiry, Rule, Task
from r1engine.rewards.rules import RULES, rule_of
from r1engine.rewards.sandbox import probe
from r1engine.rewards.servers.gather import Gatherer
from r1engine.rewards.servers.preference import is_rated_by
from r1engine.rewards.settings import ScorerSettings
from r1engine.rewards.workers.nursery import address
from r1engine.rewards.workers.pool import Outcome, WorkerPool, in_order

_INSTALL = {"py3langid": "pip install py3langid", "lingua": "pip install 'r1engine[lingua]'"}
_SERVERS = {
    "judge": "a judge (rewards.judge)",
    "reward_models": "a reward model (rewards.helpfulness_model, ...)",
}


class Scorer:
    """Scores completions. What takes microseconds runs here, what computes runs in killable workers, and servers are
    asked for what a language model judges.

    A score has the component of the record's own rule, "format", and "language" where it is asked for. Reward
    "language" has only its own. Any thread may use a scorer; asyncio uses `run`. The workers start when a record needs
    one.
    """

    def __init__(self, settings: ScorerSettings | None = None) -> None:
        """
        Raises:
            ValueError: the language detector is not installed, the file of a function is not there, or a number is not
                positive.
        """
        self.settings = settings = settings or ScorerSettings()
        if importlib.util.find_spec(settings.detector) is None:
            raise ValueError(
                f"Scorer: language_detector {settings.detector} is not installed, "
                f"required: {_INSTALL[settings.detector]}"
            )
        count = settings.workers or own_cores()
        self._pool = WorkerPool(
            "r1engine.rewards.workers.tasks:work",
            workers=count,
            deadline_seconds=settings.deadline_seconds,
            warm_up=[(address(rule.warm_up), ()) for rule in RULES if rule.warm_up is not None],
        )
        self._code_pool = WorkerPool(
            "r1engine.rewards.workers.tasks:work", workers=count, deadline_seconds=settings.code_deadline_seconds
        )
        self._functions = RewardFunctions(settings.functions, count)
        self._servers: dict[str, Gatherer[Any, Any]] = {
            name: Gatherer(model.rate, most=model.batch_size * model.parallel)
            for name, model in settings.reward_models.items()
        }
        if settings.judge is not None:
            self._servers["judge"] = Gatherer(settings.judge.judge, most=settings.judge.batch_size)

    def check_servers(self) -> None:
        """Asks the judge and each reward model something simple.

        Raises:
            RuntimeError: one does not answer, or not as it should; see `GenerativeJudge.check`, `RewardModel.check`.
        """
        for server in [self.settings.judge, *self.settings.reward_models.values()]:
            if server is not None:
                server.check()

    def check_functions(self) -> None:
        """Imports the user's reward functions, in child processes.

        Raises:
            ValueError: see `RewardFunctions.check`.
        """
        self._functions.check()

    def submit(self, record: Record, *, is_rated: bool = True) -> Future[Score]:
        """Start to score one record; returns the score to come. Blocks while many are under way.

        Args:
            record: what to score.
            is_rated: ask the reward models, where the record's rule does; without them only its format counts.

        Raises:
            ValueError: there is no such reward, or it needs a judge or a reward model and there is none.
            RuntimeError: the scorer is closed, or the record needs code to be run and too little protects here.
        """
        return self._submit(record, self._functions.begin([record])[0], is_rated)

    def _submit(self, record: Record, calls: dict[str, Call], is_rated: bool) -> Future[Score]:
        """`submit`, with the functions called."""
        started = time.perf_counter()
        rules = self._rules(record, is_rated)
        steps = [rule.begin(record, self.settings) for rule in rules]
        spent = time.perf_counter() - started
        done: Future[Score] = Future()
        grades = [step for step in steps if isinstance(step, Grade)]
        if len(grades) == len(steps) and not calls:
            done.set_result(_score(rules, grades, spent))
            return done
        waiting = [self._hand_in(rule, step) for rule, step in zip(rules, steps, strict=True)]

        def finish() -> None:
            is_asked = any(isinstance(step, Inquiry) for step in steps)
            try:
                replies = [{name: future.result() for name, future in futures.items()} for futures in waiting]
                outcomes = [one for reply in replies for one in reply.values() if isinstance(one, Outcome)]
                computed = spent + sum(outcome.seconds for outcome in outcomes)
                seconds = time.perf_counter() - started if is_asked else computed
                found = [_grade(step, reply) for step, reply in zip(steps, replies, strict=True)]
                done.set_result(_with_functions(rules, found, seconds, calls))
            except Exception as error:  # whoever waits for the score gets it
                done.set_exception(error)

        asked = [future for futures in waiting for future in futures.values()]
        _when_all(asked + [call.future for call in calls.values()], finish)
        return done

    def score(
        self, records: Iterable[Record], on_done: Callable[[Score], None] | None = None, *, are_rated: bool = True
    ) -> list[Score]:
        """Scores of all records, in their order; `on_done` is called with each. `are_rated`: see `submit`.

        Records of one question that follow each other are a group, where a function asks for groups.
        """
        if not self._functions.names:
            return in_order(partial(self.submit, is_rated=are_rated), records, on_done)
        groups: Iterable[list[Record]] = ([record] for record in records)
        if self._functions.any_takes_groups:
            groups = (list(group) for _, group in groupby(records, lambda record: record.question))
        called = (pair for group in groups for pair in zip(group, self._functions.begin(group), strict=True))
        return in_order(lambda pair: self._submit(pair[0], pair[1], are_rated), called, on_done)

    def unusable_references(self, records: Sequence[Record]) -> list[tuple[Record, str]]:
        """Records whose reference or tests their rule cannot use, with why; whatever is answered to them is
        undecided."""
        found = []
        for record, problem in zip(records, in_order(self._reference_problem, records), strict=True):
            if problem:
                found.append((record, problem))
        return found

    async def run(self, record: Record) -> Score:
        """`submit` for asyncio; does not block the loop."""
        return await asyncio.wrap_future(await asyncio.to_thread(self.submit, record))

    def close(self) -> None:
        """Ends the workers, and what waits for a server."""
        self._pool.close()
        self._code_pool.close()
        self._functions.close()
        for gatherer in self._servers.values():
            gatherer.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rules(self, record: Record, is_rated: bool) -> list[Rule]:
        """The rules that make a record's score; its own is the last."""
        own = rule_of(record.question.reward, "Scorer")
        if own.server == "reward_models" and not (is_rated and self._asks_for(record)):
            own = FORMAT
        if own.server is not None and not getattr(self.settings, own.server):
            raise ValueError(f"Scorer: found a record of reward '{own.name}', required {_SERVERS[own.server]}")
        if own.runs_code:
            probe().require(unsafe=self.settings.unsafe)
        if own is LANGUAGE:
            return [own]
        others = [FORMAT, LANGUAGE] if self.settings.with_language else [FORMAT]
        return [rule for rule in others if rule is not own] + [own]

    def _asks_for(self, record: Record) -> bool:
        """Whether a reward model of the servers is to rate a record, or is missing."""
        rated = [name for name in self.settings.reward_models if is_rated_by(record.question, name)]
        return bool(rated) or not self.settings.rated_in_trainer

    def _hand_in(self, rule: Rule, step: Grade | Task | Inquiry | str) -> dict[str, Future[Any]]:
        """What is to be waited for: of a task the outcome, of an inquiry the replies by server."""
        if isinstance(step, Task):
            pool = self._code_pool if rule.runs_code else self._pool
            return {"outcome": pool.submit([address(step.function), step.arguments])}
        if isinstance(step, Inquiry):
            return {name: self._servers[name].submit(item) for name, item in step.items.items()}
        return {}

    def _reference_problem(self, record: Record) -> Future[str]:
        rule = rule_of(record.question.reward, "Scorer")
        step = rule.reference_problem(record.question)
        waiting, done = self._hand_in(rule, step), Future[str]()

        def finish() -> None:
            try:
                if isinstance(step, str):
                    done.set_result(step)
                else:
                    outcome = waiting["outcome"].result()
                    done.set_result(outcome.problem or outcome.value)
            except Exception as error:  # whoever waits for it gets it
                done.set_exception(error)

        _when_all(list(waiting.values()), finish)
        return done


def _when_all(futures: list[Future[Any]], finish: Callable[[], None]) -> None:
    """Calls `finish` once, as soon as all futures are done, on the thread of the last."""
    if not futures:
        finish()
        return
    left, lock = len(futures), threading.Lock()

    def one_is_done(_: Future[Any]) -> None:
        nonlocal left
        with lock:
            left -= 1
            is_last = left == 0
        if is_last:
            finish()

    for future in futures:
        future.add_done_callback(one_is_done)


def _grade(step: Grade | Task | Inquiry, replies: dict[str, Any]) -> Grade:
    """What a step came to, once the worker is done or given up and the servers have replied or failed."""
    if isinstance(step, Inquiry):
        return step.conclude(replies)
    if isinstance(step, Task):
        outcome: Outcome = replies["outcome"]
        return Grade("undecided", outcome.problem) if outcome.problem else Grade(*outcome.value)
    return step


def _score(rules: list[Rule], grades: list[Grade], seconds: float) -> Score:
    """The verdict of the last rule, which is the record's own, and the components of all."""
    components: dict[str, float] = {}
    note = ""
    for rule, grade in zip(rules, grades, strict=True):
        components |= rule.components(grade)
        if rule is FORMAT and rules[-1].component != FORMAT.component and grade.verdict == "wrong":
            note = f"; format: {grade.reason}"
    return Score(grades[-1].verdict, components, grades[-1].reason + note, seconds)


def _with_functions(rules: list[Rule], grades: list[Grade], seconds: float, calls: dict[str, Call]) -> Score:
    """The score with the values of the user's functions, or why they gave none. Their futures are done."""
    values: dict[str, float] = {}
    unknown: dict[str, str] = {}
    for name, call in calls.items():
        value, why_none = call.value()
        if value is None:
            unknown[name] = why_none
        else:
            values[name] = value
    if rules[-1] is FUNCTIONS:
        grades = [*grades[:-1], verdict_of(next(iter(calls), None), values, unknown)]
    score = _score(rules, grades, seconds)
    why = "".join(f"; {name}: {problem}" for name, problem in unknown.items())
    return replace(score, components=score.components | values, reason=score.reason + why, unknown=unknown)
