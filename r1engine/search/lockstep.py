"""Runs many searches side by side: one draw, one scoring and one grading a round serve all of them.

A search does not depend on its company: child c of node i has the random numbers of stream 4096 i + c of its question.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Protocol

from r1engine.batch import Prompt
from r1engine.config.search import DRAWS, Search
from r1engine.grpo import record_of
from r1engine.rewards import Score, Scorer
from r1engine.rewards.rules import rule_of
from r1engine.rollout import Generator, Sampling
from r1engine.rollout.draft import Draft
from r1engine.search.algorithms import search
from r1engine.search.asks import Asks, Expand
from r1engine.search.steps import StepMarks
from r1engine.search.tree import DrawnSteps, Node, NodeEnd, StepPath, Tree
from r1engine.search.vote import Aggregate

OF_THE_QUESTION = -1  # what the prompt itself leaves is kept under this number


class StepScorer(Protocol):
    """What values steps: a process reward model or a value model."""

    labels: str  # what its scores estimate: "correctness" of a step, "value" of a prefix, "": it does not say

    @property
    def tokens_run(self) -> int | None:
        """Tokens that the model has computed so far; None: not known."""

    def score(self, paths: Sequence[StepPath]) -> list[list[float]]:
        """Scores of `steps[scored:]` of each path, in [0, 1].

        Raises:
            RuntimeError: a server does not answer.
        """

    def clear(self) -> None:
        """Forget what is kept of all prefixes, so that each of several searches pays for its own."""


@dataclass(frozen=True)
class Crew:
    """Who does the work of a round. The generator is awake."""

    generator: Generator
    scorer: StepScorer | None  # None: every step has the value 1; for a majority
    grader: Scorer
    marks: StepMarks
    stop: frozenset[int]  # tokens that end a completion


@dataclass(frozen=True)
class DrawLimits:
    """How completions are drawn, and how long they may become."""

    sampling: Sampling
    max_tokens: int  # of a completion
    step: int = 0  # of a run: other steps draw other samples


@dataclass
class _Live:
    """A search under way."""

    tree: Tree
    asks: Asks
    wanted: list[Expand] = field(default_factory=list)
    found: list[list[Node]] = field(default_factory=list)


class Lockstep:
    """Searches for the answers to questions, `questions_at_once` at a time."""

    def __init__(
        self,
        crew: Crew,
        cfg: Search,
        limits: DrawLimits,
        how: Aggregate,
        seed: int,
        make: Callable[[Tree, Search, int], Asks] = search,
    ) -> None:
        """
        Args:
            crew:   who draws, scores and grades.
            cfg:    of the searches.
            limits: of their draws.
            how:    what the scores of a path's steps become.
            seed:   of a search's own random numbers.
            make:   the coroutine that grows a tree.
        """
        self._make = make
        self._crew, self._cfg, self._limits, self._how, self._seed = crew, cfg, limits, how, seed

    def run(self, prompts: Sequence[Prompt], on_tokens: Callable[[int], None] | None = None) -> Iterator[Tree]:
        """The tree of each question, in the order in which the searches end.

        Args:
            prompts:   questions with different ids.
            on_tokens: called with the number of tokens of each part that is drawn.

        Raises:
            RuntimeError: a server does not answer; what was yielded before is whole.
            ValueError:   a prompt cannot be drawn from, or a scorer gave other scores than were asked for.
        """
        waiting = iter(prompts)
        live: list[_Live] = []
        while True:
            while len(live) < self._cfg.questions_at_once and (prompt := next(waiting, None)) is not None:
                tree = Tree(prompt, self._how)
                one = _Live(tree, self._make(tree, self._cfg, self._seed))
                one.wanted = next(one.asks)
                live.append(one)
            if not live:
                return
            self._round(live, on_tokens)
            going = []
            for one in live:
                if self._goes_on(one):
                    going.append(one)
                else:
                    self._crew.generator.forget(one.tree.prompt.id)
                    yield one.tree
            live = going

    def _goes_on(self, one: _Live) -> bool:
        """Tells a search what became of its asks; False if it has ended."""
        one.tree.spent.rounds += 1
        budget = self._cfg.budget_tokens
        if budget is not None and one.tree.spent.drawn >= budget:
            one.tree.is_cut = True
            one.asks.close()
            return False
        try:
            one.wanted = one.asks.send(one.found)
        except StopIteration:
            return False
        return True

    def _round(self, live: list[_Live], on_tokens: Callable[[int], None] | None) -> None:
        asked = [(one, ask) for one in live for ask in one.wanted]
        drafts = [self._drafts(one.tree, ask) for one, ask in asked]
        self._draw([ask for _, ask in asked], drafts, on_tokens)
        for one in live:
            one.found = []
        fresh: dict[Node, Tree] = {}
        for (one, ask), drawn in zip(asked, drafts, strict=True):
            steps = [self._steps_of(ask, draft) for draft in drawn]
            before = len(one.tree.nodes)
            one.found.append(one.tree.grow(ask.node, steps, is_lookahead=ask.is_greedy))
            one.tree.spent.drawn += sum(draft.cut for draft in drawn)
            fresh |= dict.fromkeys(one.tree.nodes[before:], one.tree)
        self._score(fresh)
        self._grade(fresh)

    # ------------------------------------------------------------------ drawing

    def _drafts(self, tree: Tree, ask: Expand) -> list[Draft]:
        """The draws of an ask, next to each other: they share what is before them."""
        node = ask.node
        first = DRAWS - 1 if ask.is_greedy else node.drawn
        if first + ask.draws > DRAWS:
            raise ValueError(f"search: a step is drawn from {first + ask.draws} times, required at most {DRAWS}")
        path = [one for one in node.path() if one.steps]
        prompt = replace(tree.prompt, tokens=tree.prompt.tokens + tree.tokens(node)) if path else tree.prompt
        room = self._limits.max_tokens - node.length
        limit = self._crew.marks.max_step_tokens
        most = room if ask.is_whole or limit is None else min(room, limit)
        origins = () if ask.is_whole else (OF_THE_QUESTION, *(one.stream for one in path))
        return [
            Draft(prompt, i, self._limits.step, node.number * DRAWS + first + i, most, origins=origins)
            for i in range(ask.draws)
        ]

    def _draw(self, asks: list[Expand], drafts: list[list[Draft]], on_tokens: Callable[[int], None] | None) -> None:
        """All drafts, in as few calls as there are ways to draw."""
        kinds: dict[tuple[bool, bool], list[Draft]] = {}
        for ask, drawn in zip(asks, drafts, strict=True):
            kinds.setdefault((ask.is_greedy, ask.is_whole), []).extend(drawn)
        for (is_greedy, is_whole), drawn in kinds.items():
            self._crew.generator.draw(
                drawn,
                Sampling(top_k=1) if is_greedy else self._limits.sampling,
                on_tokens=on_tokens,
                stop_after=None if is_whole else self._crew.marks,
            )

    def _steps_of(self, ask: Expand, draft: Draft) -> DrawnSteps:
        """What a draft brought, and whether the completion ends with it."""
        tokens = tuple(draft.tokens)
        steps: tuple[tuple[int, ...], ...] = (tokens,)
        if ask.is_whole:
            ends = self._crew.marks.ends(tokens, self._crew.stop)
            cuts = [0, *ends[:-1], len(tokens)]  # the stop token belongs to the last one
            steps = tuple(tokens[a:b] for a, b in itertools.pairwise(cuts))
        depth, length = ask.node.depth + len(steps), ask.node.length + len(tokens)
        finish: NodeEnd = "stop" if draft.finish == "stop" else ""
        if not finish and (ask.is_whole or length >= self._limits.max_tokens or depth >= self._cfg.max_steps):
            finish = "length"
        return DrawnSteps(steps, finish, draft.stream)

    # ------------------------------------------------------------------ values and verdicts

    def _score(self, fresh: dict[Node, Tree]) -> None:
        if self._crew.scorer is None:
            for node, tree in fresh.items():
                tree.set_scores(node, [1.0] * len(node.steps))
            return
        if not fresh:
            return
        paths = [tree.score_path(node) for node, tree in fresh.items()]
        found = self._crew.scorer.score(paths)
        if len(found) != len(paths):
            raise ValueError(f"scorer: found scores of {len(found)} paths, required {len(paths)}")
        for (node, tree), scores in zip(fresh.items(), found, strict=True):
            tree.set_scores(node, scores)

    def _grade(self, fresh: dict[Node, Tree]) -> None:
        """Answers and verdicts of the completions that have ended; a truncated one has no answer."""
        ended = [(node, tree) for node, tree in fresh.items() if node.finish and not node.is_lookahead]
        if not ended:
            return
        drafts = [
            Draft(tree.prompt, 0, 0, 0, 0, tree.tokens(node), finish="stop" if node.finish == "stop" else "length")
            for node, tree in ended
        ]
        records = [record_of(completion) for completion in self._crew.generator.completions(drafts)]
        waiting: list[Future[Score]] = [self._crew.grader.submit(record, is_rated=False) for record in records]
        for (node, _), record, score in zip(ended, records, waiting, strict=True):
            rule = rule_of(record.question.reward, "data")
            node.answer = rule.find(record)[0] if not record.truncated else None
            node.verdict = score.result().verdict
