"""The front of all rewards: routes a record to its rule, computes in worker processes, returns scores in order."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from r1engine.rewards.choice import choices, judge_choice, judge_exact
from r1engine.rewards.code.grade import final_code
from r1engine.rewards.code.problems import tests_problem
from r1engine.rewards.extract import final_answer
from r1engine.rewards.format import format_problem
from r1engine.rewards.language import Detector
from r1engine.rewards.math.accuracy import STRICT, MathPolicy, judge_at_once, reference_problem_at_once
from r1engine.rewards.record import NEED_TESTS, REWARDS, Record, Score, Verdict
from r1engine.rewards.sandbox import probe
from r1engine.rewards.servers.gather import Gatherer
from r1engine.rewards.servers.judge import GenerativeJudge, Pair
from r1engine.rewards.servers.reward_model import RewardModel, rated_text
from r1engine.rewards.thoughts import split_thoughts
from r1engine.rewards.workers.pool import Outcome, WorkerPool, in_order

CONSISTENT = 0.9  # share of target-language words from which reward "language" says right


_INSTALL = {"py3langid": "pip install py3langid", "lingua": "pip install 'r1engine[lingua]'"}


@dataclass
class _Begun:
    """A record whose cheap rules are done."""

    reward: str
    decided: tuple[Verdict, str] | None = None  # verdict and reason; None: a worker is to find out
    components: dict[str, float] = field(default_factory=dict)
    note: str = ""  # what the reason is to say besides
    work: dict[str, Any] = field(default_factory=dict)  # for r1engine.rewards.workers.tasks
    asked: dict[str, Any] = field(default_factory=dict)  # server -> what it is asked


class Scorer:
    """Scores completions. Rules that take microseconds run here, all that computes runs in killable workers, and what
    a language model judges is asked of its servers.

    The components of a score are "format", "accuracy" where the record has a reference, "language" where asked for,
    and "helpfulness" and "harmlessness" for reward "preference". Usable from any thread; `run` from asyncio. The
    workers start when the first record needs one.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        deadline_seconds: float = 5.0,
        with_language: bool = False,
        detector: Detector = "py3langid",
        blank_think_allowed: bool = False,
        policy: MathPolicy = STRICT,
        code_deadline_seconds: float = 600.0,
        unsafe: bool = False,
        judge: GenerativeJudge | None = None,
        reward_models: Mapping[str, RewardModel] | None = None,
    ) -> None:
        """
        Args:
            workers: processes; None: one a usable core.
            deadline_seconds: of the computing for one record; past it the record is undecided.
            with_language: every score has the component "language", not only those of reward "language".
            detector: see `language.language_share`.
            blank_think_allowed: see `format.format_problem`.
            policy: of the math rule, see `accuracy.MathPolicy`.
            code_deadline_seconds: of all tests of one program together; each test has limits of its own.
            unsafe: run code even where too little protects the machine from it, see `sandbox.Protection`.
            judge: for records of reward "judge".
            reward_models: for records of reward "preference", by what they rate: "helpfulness", "harmlessness".

        Raises:
            ValueError: the detector is not installed, or a number is not positive.
        """
        if importlib.util.find_spec(detector) is None:
            raise ValueError(f"Scorer: language_detector {detector} is not installed, required: {_INSTALL[detector]}")
        self._policy = policy
        self._with_language, self._detector, self._blank_think = with_language, detector, blank_think_allowed
        count = workers or len(os.sched_getaffinity(0))
        self._pool = WorkerPool("r1engine.rewards.workers.tasks:work", workers=count, deadline_seconds=deadline_seconds)
        self._code_pool = WorkerPool(
            "r1engine.rewards.workers.code_tasks:work", workers=count, deadline_seconds=code_deadline_seconds
        )
        self._unsafe = unsafe
        self._judge, self._reward_models = judge, dict(reward_models or {})
        self._servers: dict[str, Gatherer[Any, tuple[Any, str]]] = {
            name: Gatherer(model.rate, most=model.batch_size * model.parallel)
            for name, model in self._reward_models.items()
        }
        if judge is not None:
            self._servers["judge"] = Gatherer(judge.judge, most=judge.batch_size)

    def check_servers(self) -> None:
        """Asks the judge and each reward model something simple.

        Raises:
            RuntimeError: one does not answer, or not as it should; see `GenerativeJudge.check`, `RewardModel.check`.
        """
        for server in [self._judge, *self._reward_models.values()]:
            if server is not None:
                server.check()

    def submit(self, record: Record, *, is_rated: bool = True) -> Future[Score]:
        """The score of one record, to come. Blocks while many are under way.

        Args:
            record: what to score.
            is_rated: ask the reward models, where the record is of reward "preference".

        Raises:
            ValueError: there is no such reward, or it needs a judge or a reward model and there is none.
            RuntimeError: the scorer is closed, or the record needs code to be run and too little protects here.
        """
        started = time.perf_counter()
        begun = self._begin(record, is_rated)
        spent = time.perf_counter() - started
        done: Future[Score] = Future()
        if not begun.work and not begun.asked:
            done.set_result(_conclude(begun, spent))
            return done
        computed: Future[Outcome] | None = None
        if begun.work:
            pool = self._code_pool if begun.work.keys() & set(NEED_TESTS) else self._pool
            computed = pool.submit(begun.work)
        asked = {name: self._servers[name].submit(item) for name, item in begun.asked.items()}
        futures = [*asked.values(), *([computed] if computed is not None else [])]
        left = itertools.count(len(futures) - 1, -1)  # counting is atomic

        def finish(_: Future) -> None:
            if next(left):
                return
            seconds = time.perf_counter() - started if asked else spent
            try:
                replies = {name: future.result() for name, future in asked.items()}
                done.set_result(_conclude(begun, seconds, computed and computed.result(), replies))
            except Exception as error:  # whoever waits for the score gets it
                done.set_exception(error)

        for future in futures:
            future.add_done_callback(finish)
        return done

    def score(
        self, records: Iterable[Record], on_done: Callable[[Score], None] | None = None, *, are_rated: bool = True
    ) -> list[Score]:
        """Scores of all records, in their order; `on_done` is called with each. `are_rated`: see `submit`."""
        return in_order(partial(self.submit, is_rated=are_rated), records, on_done)

    def unusable_references(self, records: Sequence[Record]) -> list[tuple[Record, str]]:
        """Records of reward "math", "choice" or "code" whose reference no rule can use, with why; whatever is answered
        to them is undecided."""
        found = []
        for record, problem in zip(records, in_order(self._reference_problem, records), strict=True):
            if problem:
                found.append((record, problem))
        return found

    def _reference_problem(self, record: Record) -> Future[str]:
        problem: str | None = ""
        if record.question.reward == "choice" and not choices(record.question.answer):
            problem = "is no choice letter"
        elif record.question.reward == "code":
            problem = tests_problem(record.question.tests)
        elif record.question.reward == "math":
            problem = reference_problem_at_once(record.question.answer)
        done: Future[str] = Future()
        if problem is not None:
            done.set_result(problem)
            return done

        def finish(computed: Future[Outcome]) -> None:
            if error := computed.exception():
                done.set_exception(error)
            else:
                outcome = computed.result()
                done.set_result(outcome.problem or outcome.value["reference"])

        self._pool.submit({"reference": record.question.answer}).add_done_callback(finish)
        return done

    async def run(self, record: Record) -> Score:
        """`submit` for asyncio; does not block the loop."""
        return await asyncio.wrap_future(await asyncio.to_thread(self.submit, record))

    def close(self) -> None:
        """Ends the workers, and what waits for a server."""
        self._pool.close()
        self._code_pool.close()
        for gatherer in self._servers.values():
            gatherer.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, record: Record, is_rated: bool) -> _Begun:
        """Runs the rules that are cheap whatever the completion is."""
        begun = _Begun(record.question.reward)
        if self._with_language or record.question.reward == "language":
            split = split_thoughts(record.completion, think_prefilled=record.think_prefilled)
            text = record.completion if split.thoughts is None else split.thoughts
            begun.work["language"] = [text, record.question.language, self._detector]
            begun.work["question"] = record.asked
        if record.question.reward == "language":
            return begun
        problem = format_problem(
            record.completion, think_prefilled=record.think_prefilled, blank_think_allowed=self._blank_think
        )
        begun.components["format"] = 0.0 if problem else 1.0
        if record.question.reward in ("format", "preference"):
            begun.decided = ("wrong", problem) if problem else ("right", "well-formed")
            if record.question.reward == "preference" and is_rated:
                begun.asked = self._questions(record)
            return begun
        begun.note = f"; format: {problem}" if problem else ""
        if record.question.reward in NEED_TESTS:
            probe().require(unsafe=self._unsafe)
        if record.question.reward == "code":
            program, why_none = _program(record)
            begun.decided = ("wrong", why_none) if program is None else None
            begun.work |= {"code": [program, record.question.tests, self._unsafe]} if program is not None else {}
            return begun
        answer, why_none = final_answer(record.completion, think_prefilled=record.think_prefilled)
        if answer is None:
            begun.decided = ("wrong", why_none)
        elif record.question.reward == "math":
            begun.decided = judge_at_once(answer, record.question.answer, self._policy)
            if begun.decided is None:
                begun.work["math"] = [answer, record.question.answer, asdict(self._policy)]
        elif record.question.reward == "choice":
            begun.decided = judge_choice(answer, record.question.answer)
        elif record.question.reward == "gym":
            begun.work["gym"] = [answer, record.question.tests, self._unsafe]
        elif record.question.reward == "judge":
            self._require("judge" in self._servers, "'judge'", "a judge (rewards.judge)")
            begun.asked = {"judge": Pair(answer, record.question.answer)}
        elif record.question.reward == "exact":
            begun.decided = judge_exact(answer, record.question.answer)
        else:
            raise ValueError(f"Scorer: found reward '{record.question.reward}', required one of {', '.join(REWARDS)}")
        return begun

    def _questions(self, record: Record) -> dict[str, Any]:
        """What each reward model is asked about a record: prompt and response."""
        self._require(bool(self._reward_models), "'preference'", "a reward model (rewards.helpfulness_model, ...)")
        return {
            name: (
                record.asked,
                rated_text(name, record.completion, think_prefilled=record.think_prefilled),
            )
            for name in self._reward_models
        }

    def _require(self, is_there: bool, reward: str, what: str) -> None:
        if not is_there:
            raise ValueError(f"Scorer: found a record of reward {reward}, required {what}")


def _program(record: Record) -> tuple[str | None, str]:
    fields = record.question.tests if isinstance(record.question.tests, dict) else {}
    return final_code(
        record.completion,
        "cpp" if fields.get("language") == "cpp" else "python",
        think_prefilled=record.think_prefilled,
        bare_allowed="entry_point" in fields,
    )


def _conclude(
    begun: _Begun, seconds: float, outcome: Outcome | None = None, replies: dict[str, tuple[Any, str]] | None = None
) -> Score:
    """The score, once the work is done or given up and the servers have replied or failed."""
    decided, components = begun.decided, begun.components
    for name, (found, problem) in (replies or {}).items():
        if name == "judge":
            decided = (found, problem)
        elif found is not None:
            components[name] = found
        else:
            decided = ("undecided", f"{name}: {problem}")
    if outcome is not None:
        seconds += 0.0 if replies else outcome.seconds
        if outcome.problem:
            decided = decided or ("undecided", outcome.problem)
        elif "language" in outcome.value:
            share, judged = _language(*outcome.value["language"])
            if share is not None:
                components["language"] = share
            if begun.reward == "language":
                decided = judged
        if decided is None:
            decided = tuple(outcome.value[begun.reward])
    verdict, reason = decided
    if begun.reward not in ("format", "language", "preference") and verdict != "undecided":
        components["accuracy"] = 1.0 if verdict == "right" else 0.0
    return Score(verdict, components, reason + begun.note, seconds)


def _language(
    target: str, share: float | None, num_words: int, by_language: dict[str, int]
) -> tuple[float | None, tuple[Verdict, str]]:
    """(share, verdict and reason of reward "language")."""
    if share is None:
        return None, ("undecided", "there are no words outside code and formulas" if target else "no target language")
    others = ", ".join(f"{n} {name}" for name, n in by_language.items() if name != target)
    reason = f"{share:.0%} of {num_words} words are {target}" + (f"; also {others}" if others else "")
    return share, ("right" if share >= CONSISTENT else "wrong", reason)
