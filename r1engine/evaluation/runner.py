"""Runs an evaluation: deals what is missing to the ranks, draws, grades while drawing, summarizes. No torch.

Every reply is stored as it ends, so that a killed evaluation goes on with exactly what is missing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1engine.evaluation.entries import Ask, Entry
from r1engine.evaluation.lines import GradeLine, SampleLine
from r1engine.evaluation.marking import Judge, Marker
from r1engine.evaluation.meter import Meter
from r1engine.evaluation.results import Summary, summarize
from r1engine.evaluation.store import SUMMARY, Appender, Store
from r1engine.observe.put import put_json
from r1engine.rewards import Scorer

if TYPE_CHECKING:
    from r1engine.evaluation.samplers import Sampler
    from r1engine.ranks import World

SHOWN_LINES = 20  # of the first reply to each benchmark


@dataclass(frozen=True)
class Grading:
    """What grades."""

    scorer: Scorer
    judge: Judge | None


@dataclass(frozen=True)
class Missing:
    """What a rank has to do."""

    asks: list[Ask]  # to be drawn and graded
    replies: list[tuple[Ask, SampleLine]]  # drawn before, to be graded


def missing(store: Store, entries: Sequence[Entry], seed: int, rank: int, ranks: int) -> Missing:
    """This rank's share of what is not there yet: of all replies that lack, every `ranks`-th question."""
    asks: list[Ask] = []
    ungraded: list[tuple[Ask, SampleLine]] = []
    for entry in entries:
        replies = store.replies(entry.name)
        grades = store.grades(entry.name, entry.row.grader)
        for ask in entry.asks(seed):
            if (reply := replies.get(ask.key)) is None:
                asks.append(ask)
            elif ask.key not in grades:
                ungraded.append((ask, reply))
    order: dict[tuple[str, str], int] = {}
    own = []
    for ask in asks:  # the samples of a question stay together: they share its prompt
        number = order.setdefault((ask.entry.name, ask.item.id), len(order))
        if number % ranks == rank:
            own.append(ask)
    return Missing(own, ungraded[rank::ranks])


class Runner:
    """One rank's work on an evaluation."""

    def __init__(
        self, store: Store, rank: int, meter: Meter, *, on_tokens: Callable[[int], None] | None = None
    ) -> None:
        """
        Args:
            store:     the files.
            rank:      of this process; no other one writes its files.
            meter:     counts replies and grades.
            on_tokens: called with the tokens of each part that is drawn; None: the meter counts them.
        """
        self._store, self._rank, self._meter = store, rank, meter
        self._on_tokens = on_tokens or meter.tokens
        self._replies: dict[str, Appender] = {}
        self._grades: dict[str, Appender] = {}
        self._lock = threading.Lock()
        self._seen: set[str] = set()  # benchmarks whose first reply was shown
        self.failures: dict[str, int] = {}  # why replies are missing -> how many

    def work(self, todo: Missing, sampler: Sampler | None, grading: Grading) -> None:
        """Draw and grade what is missing.

        Raises:
            ValueError: a question cannot be shown to the model.
            RuntimeError: nobody draws any more; what ended before is stored.
        """
        marker = Marker(grading.scorer, grading.judge, self._graded)
        try:
            for ask, line in todo.replies:
                marker.put(ask, line)

            def replied(ask: Ask, line: SampleLine) -> None:
                self._replied(ask, line)
                if line.is_done:
                    marker.put(ask, line)

            if todo.asks:
                assert sampler is not None
                sampler.draw(todo.asks, replied, self._on_tokens)
            marker.finish()
        finally:
            marker.close()
            for file in (*self._replies.values(), *self._grades.values()):
                file.close()

    def _replied(self, ask: Ask, line: SampleLine) -> None:
        name = ask.entry.name
        if name not in self._replies:
            self._replies[name] = self._store.reply_file(name, self._rank)
        self._replies[name].append(line)
        self._meter.reply()
        if not line.is_done:
            self.failures[line.error] = self.failures.get(line.error, 0) + 1
        elif name not in self._seen:
            self._seen.add(name)
            self._meter.note(first_reply(ask, line))

    def _graded(self, ask: Ask, line: GradeLine) -> None:
        with self._lock:
            name = ask.entry.name
            if name not in self._grades:
                self._grades[name] = self._store.grade_file(name, self._rank)
            self._grades[name].append(line)
            self._meter.grade(is_right=line.verdict == "right")


def first_reply(ask: Ask, line: SampleLine) -> str:
    """What a benchmark's first reply looks like; of a private one only its length."""
    head = f"{ask.entry.name}: first reply, {line.tokens} tokens, ended by {line.finish}"
    if ask.entry.is_private:
        return head
    lines = line.text.splitlines()[:SHOWN_LINES]
    warning = "" if line.text.strip() else "\n  warning: the reply is blank"
    return head + warning + "".join(f"\n  | {text[:160]}" for text in lines)


def summarize_all(store: Store, entries: Sequence[Entry]) -> dict[str, Summary]:
    """Writes the grades of each benchmark in one file, and summary.json; returns what is in it. First rank only."""
    found: dict[str, Summary] = {}
    for entry in entries:
        grades = store.grades(entry.name, entry.row.grader)
        wanted = [ask.key for ask in entry.asks(0)]
        store.write_grades(entry.name, [grades[key] for key in wanted if key in grades])
        found[entry.name] = summarize(entry, store.replies(entry.name), grades)
    put_json(store.folder / SUMMARY, {"target": store.manifest["target"], "benchmarks": found})
    return found


def draw_and_grade(
    store: Store,
    entries: Sequence[Entry],
    seed: int,
    world: World,
    make_sampler: Callable[[], Sampler],
    grading: Grading,
    say: Callable[[str], None] | None = None,
) -> dict[str, Summary]:
    """Draws and grades what an evaluation lacks, on all ranks. Collective.

    Args:
        store:        of the evaluation, its manifest written.
        entries:      the benchmarks.
        seed:         of the suite.
        world:        the ranks that share the questions.
        make_sampler: called once if this rank has something to draw.
        grading:      what grades.
        say:          told how far it is; None: stdout.

    Returns:
        The summary of each benchmark, on every rank.

    Raises:
        ValueError:   a question cannot be shown to the model.
        RuntimeError: nobody draws any more, or replies are missing at the end; what ended is stored.
    """
    todo = missing(store, entries, seed, world.rank, world.size)
    world.wait()  # no rank writes before all have read
    total = sum(entry.samples * len(entry.items) for entry in entries)
    meter = _meter(world, len(todo.asks), total, say)
    runner = Runner(store, world.rank, meter)
    _raise_any(world, _problem(runner, todo, make_sampler, grading, meter), store, entries, total)
    found: dict[str, Summary] = world.from_first(lambda: summarize_all(store, entries))
    failures = [pair for shares in world.everyones(list(runner.failures.items())) for pair in shares]
    if failures:
        raise RuntimeError(_left_over(store, entries, total, f"{sum(n for _, n in failures)} failed: {failures[0][0]}"))
    return found


def _meter(world: World, own: int, total: int, say: Callable[[str], None] | None) -> Meter:
    """Counts this rank's `own` replies of `total`; says how many are stored. Collective."""
    meter = Meter(own, enabled=world.is_first, say=say)
    stored = total - sum(world.everyones(own))
    if stored:
        rest = "; the others are drawn" if stored < total else ""
        meter.note(f"{stored:,} of {total:,} replies are stored{rest}")
    return meter


def _problem(
    runner: Runner, todo: Missing, make_sampler: Callable[[], Sampler], grading: Grading, meter: Meter
) -> Exception | None:
    """Does this rank's work; returns what went wrong."""
    try:
        sampler = make_sampler() if todo.asks else None
        try:
            runner.work(todo, sampler, grading)
        finally:
            if sampler is not None:
                sampler.close()
    except (ValueError, RuntimeError, OSError) as error:
        return error
    finally:
        meter.close()
    return None


def _raise_any(world: World, problem: Exception | None, store: Store, entries: Sequence[Entry], total: int) -> None:
    """Raises on every rank what happened on any."""
    found = next((one for one in world.everyones(problem) if one is not None), None)
    if found is None:
        return
    if isinstance(found, ValueError):
        raise found
    raise RuntimeError(_left_over(store, entries, total, str(found) or type(found).__name__)) from found


def _left_over(store: Store, entries: Sequence[Entry], total: int, why: str) -> str:
    there = sum(len(store.replies(entry.name)) for entry in entries)
    return f"{why}; {there:,} of {total:,} replies are stored, and the same command goes on"
