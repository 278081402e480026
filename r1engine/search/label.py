"""Labels of steps by rollouts: who is rolled out when. Coroutines without a model; a driver answers their asks.

An ask is a prefix and a number of rollouts, an answer their verdicts. Undecided rollouts count in neither number, and a
step without a decided one has no label: unknown is not 0.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from r1engine.config.label import Labelling
from r1engine.rewards.record import Verdict

Steps = tuple[tuple[int, ...], ...]  # tokens of each step


class RolledOut(NamedTuple):
    """A completion from the end of a prefix."""

    steps: Steps  # what it added
    verdict: Verdict


class RolloutAsk(NamedTuple):
    """Rollouts that are wanted."""

    prefix: Steps
    rollouts: int


Answers = list[list[RolledOut]]  # one list an ask


class Labelled(NamedTuple):
    """A solution with what the rollouts said. Entry i is of the prefix with step i."""

    steps: Steps
    labels: list[float | None]
    right: list[int | None]  # right rollouts; None: not rolled out
    decided: list[int | None]
    verdict: Verdict


Labeller = Generator[list[RolloutAsk], Answers, list[Labelled]]


def label_of(right: int, decided: int, cfg: Labelling) -> float | None:
    """The label of a step with these rollouts; None where none is decided."""
    if not decided:
        return None
    share = right / decided
    return share if cfg.kind == "soft" else float(share > cfg.above)


def counts_of(rolled: Sequence[RolledOut]) -> tuple[int, int]:
    """How many are right, and how many are decided."""
    return sum(one.verdict == "right" for one in rolled), sum(one.verdict != "undecided" for one in rolled)


def label_each(solution: RolledOut, cfg: Labelling) -> Labeller:
    """Rollouts from the end of every step but the last, whose label is the solution's own verdict."""
    count = len(solution.steps)
    right, decided = [0] * count, [0] * count
    doubles = cfg.kind == "hard" and cfg.above == 0 and cfg.stop_early
    open_ones, done = list(range(count - 1)), 0
    while open_ones and done < cfg.rollouts:
        more = min(max(1, done), cfg.rollouts - done) if doubles else cfg.rollouts
        answers = yield [RolloutAsk(solution.steps[: index + 1], more) for index in open_ones]
        for index, rolled in zip(open_ones, answers, strict=True):
            more_right, more_decided = counts_of(rolled)
            right[index] += more_right
            decided[index] += more_decided
        done += more
        open_ones = [index for index in open_ones if not (doubles and right[index])]
    labels = [label_of(r, d, cfg) for r, d in zip(right, decided, strict=True)]
    labels[-1] = own_label(solution)
    return [Labelled(solution.steps, labels, [*right[:-1], None], [*decided[:-1], None], solution.verdict)]


def label_by_bisection(solution: RolledOut, cfg: Labelling) -> Labeller:
    """The first step without a right rollout, by halves: steps before it are 1, it is 0, what follows is unknown.

    It supposes that no step behind one without a right rollout has one. A right solution is itself a right rollout of
    each of its steps; of an undecided one nothing is known.
    """
    count = len(solution.steps)
    right: list[int | None] = [None] * count
    decided: list[int | None] = [None] * count
    if solution.verdict != "wrong":
        label = 1.0 if solution.verdict == "right" else None
        return [Labelled(solution.steps, [label] * count, right, decided, solution.verdict)]
    low, high = 0, count - 1  # the first error is in low .. high
    is_known = True
    while low < high and is_known:
        middle = (low + high) // 2
        [rolled] = yield [RolloutAsk(solution.steps[: middle + 1], cfg.rollouts)]
        counts = right[middle], decided[middle] = counts_of(rolled)
        label = label_of(*counts, cfg)
        is_known = label is not None
        low, high = (middle + 1, high) if label else (low, middle if is_known else high)
    labels: list[float | None] = [1.0] * low + [None] * (count - low)
    if is_known:
        labels[low] = 0.0
    return [Labelled(solution.steps, labels, right, decided, solution.verdict)]


# ------------------------------------------------------------------ OmegaPRM (arXiv 2406.06592)


@dataclass
class _State:
    """A prefix whose share of right rollouts is known."""

    right: int
    decided: int
    visits: int = 0
    pool: list[RolledOut] = field(default_factory=list)  # wrong rollouts that have not been bisected

    @property
    def share(self) -> float:
        return self.right / self.decided


def exploitation(share: float, length: int, cfg: Labelling) -> float:
    """Q of a rollout of so many tokens from a state with this share of right ones: alpha^(1 - share) beta^(len / L)."""
    return float(cfg.alpha ** (1 - share) * cfg.beta ** (length / cfg.length))


def exploration(visits: int, all_visits: int, cfg: Labelling) -> float:
    """U of a state: c sqrt(all visits) / (1 + visits)."""
    return cfg.c * math.sqrt(all_visits) / (1 + visits)


def label_by_tree(solutions: Sequence[RolledOut], cfg: Labelling) -> Labeller:
    """A tree of prefixes of one question: again and again the wrong rollout with the highest Q + U is bisected, and
    what is rolled out on the way can be chosen later. Each is bisected once.

    Returns:
        Of each bisected rollout the path to its first error, and the solutions; a prefix is labelled where it comes
        first. The label of a prefix is that of its rollouts, 0 at a first error.
    """
    states: dict[Steps, _State] = {(): _State(*counts_of(solutions), pool=_wrong(solutions))}
    for one in solutions:  # whole ones say it themselves
        if one.verdict != "undecided" and one.steps:
            states[one.steps] = _State(int(one.verdict == "right"), 1)
    found: list[Steps] = []
    for _ in range(cfg.searches):
        chosen = _choose(states, cfg)
        if chosen is None:
            break
        prefix, rollout = chosen
        states[prefix].visits += 1
        states[prefix].pool.remove(rollout)
        low, high = 0, len(rollout.steps) - 1
        while low < high:
            middle = (low + high) // 2
            here = prefix + rollout.steps[: middle + 1]
            if here not in states:
                [rolled] = yield [RolloutAsk(here, cfg.rollouts)]
                states[here] = _state_of(rolled)
            if not states[here].decided:
                break
            low, high = (middle + 1, high) if states[here].right else (low, middle)
        found.append(prefix + rollout.steps[: low + 1])
        if low == len(rollout.steps) - 1:  # its last step ends a wrong completion
            states.setdefault(found[-1], _State(0, 1))
    return _paths(states, [*found, *(one.steps for one in solutions)], solutions, cfg)


def _wrong(rolled: Sequence[RolledOut]) -> list[RolledOut]:
    return [one for one in rolled if one.verdict == "wrong" and one.steps]


def _state_of(rolled: list[RolledOut]) -> _State:
    right, decided = counts_of(rolled)
    return _State(right, decided, pool=_wrong(rolled) if 0 < right < decided else [])


def _choose(states: dict[Steps, _State], cfg: Labelling) -> tuple[Steps, RolledOut] | None:
    """The state and the rollout with the highest Q + U; the earlier of equal ones."""
    total = sum(state.visits for state in states.values())
    best: tuple[float, Steps, RolledOut] | None = None
    for prefix, state in states.items():
        for rollout in state.pool:
            length = sum(map(len, rollout.steps))
            value = exploitation(state.share, length, cfg) + exploration(state.visits, total, cfg)
            if best is None or value > best[0]:
                best = value, prefix, rollout
    return best[1:] if best is not None else None


def _paths(
    states: dict[Steps, _State], paths: list[Steps], solutions: Sequence[RolledOut], cfg: Labelling
) -> list[Labelled]:
    verdicts = {one.steps: one.verdict for one in solutions}
    told: set[Steps] = set()
    found = []
    for path in dict.fromkeys(paths):
        labels: list[float | None] = []
        right: list[int | None] = []
        decided: list[int | None] = []
        for count in range(1, len(path) + 1):
            state = states.get(path[:count]) if path[:count] not in told else None
            if state is not None:
                told.add(path[:count])
            labels.append(label_of(state.right, state.decided, cfg) if state is not None else None)
            right.append(state.right if state is not None else None)
            decided.append(state.decided if state is not None else None)
        if any(label is not None for label in labels):
            found.append(Labelled(path, labels, right, decided, verdicts.get(path, "wrong")))
    return found


def own_label(solution: RolledOut) -> float | None:
    """Of the last step: whether the completion is right; None where nobody knows."""
    return {"right": 1.0, "wrong": 0.0}.get(solution.verdict)


def make_labellers(solutions: Sequence[RolledOut], cfg: Labelling) -> list[Labeller]:
    """What labels the solutions of a question: one each, or one for all."""
    if cfg.method == "tree":
        return [label_by_tree(solutions, cfg)]
    one = label_each if cfg.method == "each" else label_by_bisection
    return [one(solution, cfg) for solution in solutions]
