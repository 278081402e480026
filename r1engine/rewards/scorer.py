"""The front of all rewards: routes a record to its rule, computes in worker processes, returns scores in order."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

from r1engine.rewards.accuracy import STRICT, MathPolicy, judge_at_once, reference_problem_at_once
from r1engine.rewards.choice import choices, judge_choice, judge_exact
from r1engine.rewards.code import final_code
from r1engine.rewards.code_problems import tests_problem
from r1engine.rewards.extract import final_answer, thoughts
from r1engine.rewards.format import format_problem
from r1engine.rewards.language import Detector
from r1engine.rewards.pool import Outcome, WorkerPool, in_order
from r1engine.rewards.record import NEED_TESTS, REWARDS, Record, Score, Verdict
from r1engine.rewards.sandbox import probe

CONSISTENT = 0.9  # share of target-language words from which reward "language" says right


_INSTALL = {"py3langid": "pip install py3langid", "lingua": "pip install 'r1engine[lingua]'"}


@dataclass
class _Begun:
    """A record whose cheap rules are done."""

    reward: str
    decided: tuple[Verdict, str] | None = None  # verdict and reason; None: a worker is to find out
    components: dict[str, float] = field(default_factory=dict)
    note: str = ""  # what the reason is to say besides
    work: dict[str, Any] = field(default_factory=dict)  # for r1engine.rewards.work


class Scorer:
    """Scores completions. Rules that take microseconds run here, all that computes runs in killable workers.

    The components of a score are "format", "accuracy" where the record has a reference, and "language" where asked
    for. Usable from any thread; `run` from asyncio. The workers start when the first record needs one.
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

        Raises:
            ValueError: the detector is not installed, or a number is not positive.
        """
        if importlib.util.find_spec(detector) is None:
            raise ValueError(f"Scorer: language_detector {detector} is not installed, required: {_INSTALL[detector]}")
        self._policy = policy
        self._with_language, self._detector, self._blank_think = with_language, detector, blank_think_allowed
        count = workers or len(os.sched_getaffinity(0))
        self._pool = WorkerPool("r1engine.rewards.work:work", workers=count, deadline_seconds=deadline_seconds)
        self._code_pool = WorkerPool(
            "r1engine.rewards.code_work:work", workers=count, deadline_seconds=code_deadline_seconds
        )
        self._unsafe = unsafe

    def submit(self, record: Record) -> Future[Score]:
        """The score of one record, to come. Blocks while many are under way.

        Raises:
            ValueError: there is no such reward.
            RuntimeError: the scorer is closed, or the record needs code to be run and too little protects here.
        """
        started = time.perf_counter()
        begun = self._begin(record)
        spent = time.perf_counter() - started
        done: Future[Score] = Future()
        if not begun.work:
            done.set_result(_conclude(begun, spent))
            return done

        def finish(computed: Future[Outcome]) -> None:
            if error := computed.exception():
                done.set_exception(error)
            else:
                done.set_result(_conclude(begun, spent, computed.result()))

        pool = self._code_pool if begun.work.keys() & set(NEED_TESTS) else self._pool
        pool.submit(begun.work).add_done_callback(finish)
        return done

    def score(self, records: Iterable[Record], on_done: Callable[[Score], None] | None = None) -> list[Score]:
        """Scores of all records, in their order; `on_done` is called with each."""
        return in_order(self.submit, records, on_done)

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
        if record.reward == "choice" and not choices(record.answer):
            problem = "is no choice letter"
        elif record.reward == "code":
            problem = tests_problem(record.tests)
        elif record.reward == "math":
            problem = reference_problem_at_once(record.answer)
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

        self._pool.submit({"reference": record.answer}).add_done_callback(finish)
        return done

    async def run(self, record: Record) -> Score:
        """`submit` for asyncio; does not block the loop."""
        return await asyncio.wrap_future(await asyncio.to_thread(self.submit, record))

    def close(self) -> None:
        """Ends the workers."""
        self._pool.close()
        self._code_pool.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, record: Record) -> _Begun:
        """Runs the rules that are cheap whatever the completion is."""
        begun = _Begun(record.reward)
        if self._with_language or record.reward == "language":
            text = thoughts(record.completion, think_prefilled=record.think_prefilled)
            begun.work["language"] = [text, record.language, self._detector]
            begun.work["question"] = record.question or record.prompt
        if record.reward == "language":
            return begun
        problem = format_problem(
            record.completion, think_prefilled=record.think_prefilled, blank_think_allowed=self._blank_think
        )
        begun.components["format"] = 0.0 if problem else 1.0
        if record.reward == "format":
            begun.decided = ("wrong", problem) if problem else ("right", "well-formed")
            return begun
        begun.note = f"; format: {problem}" if problem else ""
        if record.reward in NEED_TESTS:
            probe().require(unsafe=self._unsafe)
        if record.reward == "code":
            program, why_none = _program(record)
            begun.decided = ("wrong", why_none) if program is None else None
            begun.work |= {"code": [program, record.tests, self._unsafe]} if program is not None else {}
            return begun
        answer, why_none = final_answer(record.completion, think_prefilled=record.think_prefilled)
        if answer is None:
            begun.decided = ("wrong", why_none)
        elif record.reward == "math":
            begun.decided = judge_at_once(answer, record.answer, self._policy)
            if begun.decided is None:
                begun.work["math"] = [answer, record.answer, asdict(self._policy)]
        elif record.reward == "choice":
            begun.decided = judge_choice(answer, record.answer)
        elif record.reward == "gym":
            begun.work["gym"] = [answer, record.tests, self._unsafe]
        elif record.reward == "exact":
            begun.decided = judge_exact(answer, record.answer)
        else:
            raise ValueError(f"Scorer: found reward '{record.reward}', required one of {', '.join(REWARDS)}")
        return begun


def _program(record: Record) -> tuple[str | None, str]:
    fields = record.tests if isinstance(record.tests, dict) else {}
    return final_code(
        record.completion,
        "cpp" if fields.get("language") == "cpp" else "python",
        think_prefilled=record.think_prefilled,
        bare_allowed="entry_point" in fields,
    )


def _conclude(begun: _Begun, seconds: float, outcome: Outcome | None = None) -> Score:
    """The score, once the work is done or given up."""
    decided, components = begun.decided, begun.components
    if outcome is not None:
        seconds += outcome.seconds
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
    if begun.reward not in ("format", "language") and verdict != "undecided":
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
