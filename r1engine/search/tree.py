"""The tree that every search grows: a node is a step of a completion, in tokens. No torch.

Everything that was drawn is counted, also what is merged with an equal step or given up later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from r1engine.rewards.record import Verdict
from r1engine.search.vote import Aggregate, aggregate

if TYPE_CHECKING:
    from r1engine.batch import Prompt

NodeEnd = Literal["", "stop", "length"]  # "": goes on; "length": a limit of tokens or steps cut it


class StepPath(NamedTuple):
    """A completion on its way, as a scorer of steps reads it."""

    prompt: Prompt
    steps: tuple[tuple[int, ...], ...]  # tokens of each; a stop token stands at the end of the last
    scored: int = 0  # how many have scores already


@dataclass
class Spent:
    """What a search has cost."""

    drawn: int = 0  # tokens, whatever became of them
    rounds: int = 0  # times that it waited for a draw


@dataclass(eq=False, slots=True)
class Node:
    """A step, or a whole completion that was drawn in one piece."""

    number: int  # in its tree, by age
    parent: Node | None
    steps: tuple[tuple[int, ...], ...] = ()  # own tokens; none: the root, or a branch of it
    finish: NodeEnd = ""
    stream: int = 0  # address of the random numbers that drew it
    depth: int = 0  # steps up to and with this node
    length: int = 0  # tokens up to and with this node
    samples: int = 1  # how often it was drawn from its parent
    prior: float = 1.0  # share of its parent's samples
    is_lookahead: bool = False  # drawn to value the node before it; no answer
    scores: tuple[float, ...] = ()  # of the own steps
    value: float = 0.0  # of the path to here, in [0, 1]
    verdict: Verdict | None = None  # of an ended node; None: not graded
    answer: str | None = None  # of an ended node
    drawn: int = 0  # samples that it got
    visits: int = 0
    total: float = 0.0  # sum of the values that were backed up through it
    children: list[Node] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean of the values that were backed up through it; its own value while there is none."""
        return self.total / self.visits if self.visits else self.value

    def path(self) -> list[Node]:
        """The nodes from the root to here."""
        found: list[Node] = []
        node: Node | None = self
        while node is not None:
            found.append(node)
            node = node.parent
        return found[::-1]


class DrawnSteps(NamedTuple):
    """What one draw from a node brought."""

    steps: tuple[tuple[int, ...], ...]
    finish: NodeEnd
    stream: int


class Tree:
    """The search for the answer to one question."""

    def __init__(self, prompt: Prompt, how: Aggregate) -> None:
        """
        Args:
            prompt: the question.
            how:    what the scores of a path's steps become.
        """
        self.prompt, self._how = prompt, how
        self.root = Node(0, None)
        self.nodes = [self.root]
        self.spent = Spent()
        self.is_cut = False  # the budget ended it

    def branch(self) -> Node:
        """A child of the root without a step of its own: a tree in the tree, which shares no draw with the others."""
        node = Node(len(self.nodes), self.root)
        self.nodes.append(node)
        self.root.children.append(node)
        return node

    def grow(self, parent: Node, drawn: Sequence[DrawnSteps], *, is_lookahead: bool = False) -> list[Node]:
        """Put what was drawn from a node below it; returns a child for each, equal draws the same one.

        A prior is the share of the parent's samples; a look ahead is no sample and has none.
        """
        found = []
        for one in drawn:
            self.spent.drawn += sum(map(len, one.steps))
            equal = (n for n in parent.children if n.steps == one.steps and n.is_lookahead == is_lookahead)
            child = next(equal, None)
            if child is None:
                child = self._new(parent, one, is_lookahead=is_lookahead)
            elif not is_lookahead:
                child.samples += 1
            found.append(child)
        if not is_lookahead:
            parent.drawn += len(drawn)
            for child in parent.children:
                child.prior = 0.0 if child.is_lookahead else child.samples / parent.drawn
        return found

    def _new(self, parent: Node, one: DrawnSteps, *, is_lookahead: bool) -> Node:
        node = Node(
            len(self.nodes),
            parent,
            one.steps,
            one.finish,
            one.stream,
            depth=parent.depth + len(one.steps),
            length=parent.length + sum(map(len, one.steps)),
            is_lookahead=is_lookahead,
        )
        self.nodes.append(node)
        parent.children.append(node)
        return node

    def score_path(self, node: Node) -> StepPath:
        """The path of a node that has no scores yet."""
        steps = tuple(step for one in node.path() for step in one.steps)
        return StepPath(self.prompt, steps, len(steps) - len(node.steps))

    def set_scores(self, node: Node, scores: Sequence[float]) -> None:
        """Take the scores of a node's own steps; its value is that of the whole path.

        Raises:
            ValueError: there is not one score a step, or one is not in [0, 1].
        """
        if len(scores) != len(node.steps):
            raise ValueError(f"scorer: found {len(scores)} scores, required {len(node.steps)}, one a step")
        if outside := [score for score in scores if not 0 <= score <= 1]:
            raise ValueError(f"scorer: found the score {outside[0]}, required 0 to 1")
        node.scores = tuple(scores)
        node.value = aggregate(self.scores(node), self._how)

    def scores(self, node: Node) -> list[float]:
        """Of every step of the path."""
        return [score for one in node.path() for score in one.scores]

    def tokens(self, node: Node) -> list[int]:
        """What was drawn on the path."""
        return [token for one in node.path() for step in one.steps for token in step]

    def ended(self) -> list[Node]:
        """The whole completions, in the order in which they were found."""
        return [node for node in self.nodes if node.finish and not node.is_lookahead]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every node with a step, as JSON values; `parent` is a number, 0 the root; `samples` is 1 where it lacks."""
        for node in self.nodes[1:]:
            yield {
                "node": node.number,
                "parent": node.parent.number if node.parent is not None else 0,
                "tokens": [list(step) for step in node.steps],
                "finish": node.finish,
                "prior": round(node.prior, 6),
                **({"samples": node.samples} if node.samples > 1 else {}),
                "scores": [round(score, 6) for score in node.scores],
                "value": round(node.value, 6),
                "visits": node.visits,
                "mean": round(node.mean, 6),
                **({"lookahead": True} if node.is_lookahead else {}),
                **({"answer": node.answer, "verdict": node.verdict} if node.finish else {}),
            }
