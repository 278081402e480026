"""Grades replies while others are drawn: rules in the scorer's workers, judges over HTTP. No torch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from r1engine.config import JudgeServer
from r1engine.evaluation.benchmark import Graded, Judged, Marked, Reply
from r1engine.evaluation.entries import Ask
from r1engine.evaluation.lines import GradeLine, SampleLine
from r1engine.rewards import Score, Scorer
from r1engine.rewards.from_config import servers_of
from r1engine.rewards.rules import rule_of
from r1engine.rewards.servers.endpoint import ModelServersError

OnGrade = Callable[[Ask, GradeLine], None]


class Judge:
    """A language model that is asked with a benchmark's own prompt; usable from any thread."""

    def __init__(self, server: JudgeServer) -> None:
        """
        Raises:
            ValueError: a URL is none, or the variable of the key is not set.
        """
        self.parallel = server.parallel
        self._server = server
        self._servers = servers_of(server)

    def ask(self, prompt: str) -> str:
        """The reply's text.

        Raises:
            ModelServersError: there is none.
        """
        body = {
            "model": self._server.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self._server.max_tokens,
        }
        reply = self._servers.post("/chat/completions", body)
        try:
            return str(reply["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise ModelServersError("the judge's reply has no choices[0].message.content") from None


class Marker:
    """Takes replies and gives back grades, on threads of its own: whoever draws does not wait for it."""

    def __init__(self, scorer: Scorer, judge: Judge | None, on_grade: OnGrade) -> None:
        """
        Args:
            scorer:   of the rules.
            judge:    of benchmarks that need one.
            on_grade: called with each grade, from one thread at a time.
        """
        self._scorer, self._judge, self._on_grade = scorer, judge, on_grade
        self._replies: queue.SimpleQueue[tuple[Ask, SampleLine] | None] = queue.SimpleQueue()
        self._judging = ThreadPoolExecutor(judge.parallel if judge else 1, thread_name_prefix="judge")
        self._lock, self._left = threading.Condition(), 0
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="marker", daemon=True)
        self._thread.start()

    def put(self, ask: Ask, line: SampleLine) -> None:
        """A reply to be graded."""
        with self._lock:
            self._left += 1
        self._replies.put((ask, line))

    def finish(self) -> None:
        """Until everything is graded.

        Raises:
            Exception: what went wrong in the scorer.
        """
        with self._lock:
            self._lock.wait_for(lambda: not self._left or self._problem is not None)
        if self._problem is not None:
            raise self._problem

    def close(self) -> None:
        """Lets go of the threads; what is not graded stays so."""
        self._replies.put(None)
        self._judging.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> None:
        while (item := self._replies.get()) is not None:
            try:
                self._begin(*item)
            except BaseException as error:  # whoever waits gets it
                self._failed(error)

    def _begin(self, ask: Ask, line: SampleLine) -> None:
        row = ask.entry.row
        if line.error or line.finish == "error":
            self._done(ask, Marked("undecided", None, None, line.error))
            return
        try:
            grading = row.grade(ask.item, ask.sample, Reply(line.text, line.finish))
        except Exception as error:  # the reply is stored: a grader that lacks something leaves it undecided
            self._done(ask, Marked("undecided", None, None, f"{row.grader}: {type(error).__name__}: {error}"[:300]))
            return
        if isinstance(grading, Marked):
            self._done(ask, grading)
        elif isinstance(grading, Judged):
            self._judging.submit(self._judged, ask, grading)
        else:
            self._score(ask, grading)

    def _score(self, ask: Ask, grading: Graded) -> None:
        record, answer = grading.record, grading.answer

        def scored(done: Future[Score]) -> None:
            if (error := done.exception()) is not None:
                self._failed(error)
            else:
                self._done(ask, marked(done.result(), record.question.reward, answer))

        self._scorer.submit(record, is_rated=False).add_done_callback(scored)

    def _judged(self, ask: Ask, grading: Judged) -> None:
        try:
            assert self._judge is not None  # of the entries: no judge, no such benchmark
            found = grading.conclude(self._judge.ask(grading.prompt))
            for canary in grading.canaries if found.verdict == "right" else ():
                if grading.conclude(self._judge.ask(canary)).verdict == "right":
                    found = Marked("undecided", None, found.answer, "the judge takes an answer that cannot be right")
                    break
        except ModelServersError as error:
            found = Marked("undecided", None, None, f"no reply from the judge: {error}")
        except BaseException as error:
            self._failed(error)
            return
        self._done(ask, found)

    def _done(self, ask: Ask, found: Marked) -> None:
        with self._lock:
            try:
                self._on_grade(ask, grade_line(ask, found))
            except BaseException as error:
                self._problem = self._problem or error
            self._left -= 1
            self._lock.notify_all()

    def _failed(self, error: BaseException) -> None:
        with self._lock:
            self._problem = self._problem or error
            self._left -= 1
            self._lock.notify_all()


def marked(score: Score, reward: str, answer: str | None) -> Marked:
    """A score of the rules as a mark: the value of the rule's component, the other components as parts.

    A reply of which nothing was read is wrong, whatever a rule finds in it.
    """
    name = rule_of(reward, "evaluation").component
    parts = {key: value for key, value in score.components.items() if key != name}
    if answer is None:
        return Marked("wrong", 0.0, None, score.reason if score.verdict == "wrong" else "nothing was read", parts)
    value = None if score.verdict == "undecided" else score.components.get(name, float(score.verdict == "right"))
    return Marked(score.verdict, value, answer, score.reason, parts)


def grade_line(ask: Ask, found: Marked) -> GradeLine:
    """A mark as a line of a file."""
    return GradeLine(
        ask.item.id,
        ask.sample,
        found.verdict,
        found.score,
        found.answer,
        found.reason,
        ask.entry.row.grader,
        dict(found.parts),
    )


def mark_of(line: GradeLine) -> Marked:
    """The mark that a line of a file holds."""
    return Marked(line.verdict, line.score, line.answer, line.reason, dict(line.parts))
