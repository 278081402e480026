"""A search of answers to questions, with what it needs: a model, a scorer of steps, limits (paper, section 4.2)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from r1engine.config.drawing import DrawingConfig
from r1engine.config.process import StepMarking, StepScorerSection
from r1engine.config.rollout import Rollout
from r1engine.config.search import Method, Search
from r1engine.config.section import LocalPath
from r1engine.config.stage import Template

DIFFICULTY = "difficulty"  # the search that tells how hard questions are; it takes part in no comparison


class SearchConfig(DrawingConfig):
    """Searches for answers to questions and grades them. Trains nothing."""

    MAKES: ClassVar[dict[str, str]] = {"data": "search.jsonl", "summary": "summary.json"}
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("rollout.slots", "search.questions_at_once", "search.cache_gib")

    stage: Literal["search"] = "search"
    """Kind of stage."""
    run_dir: LocalPath = Path("runs/search")
    """Folder that gets search.jsonl, summary.json, table.md and report.html."""
    template: Template = "r1"
    """How the model is asked: its own chat template, the shipped r1 or plain, Table 1, or the question as it is."""
    rollout: Rollout = Rollout(max_tokens=4096)
    """Engine, temperature, and the tokens of a completion."""
    steps: StepMarking = StepMarking()
    scorer: StepScorerSection | None = None
    """What values steps; null: nothing does, which best_of with choose majority needs."""
    search: Search = Search()
    compare: list[Method] = Field(default=[])
    """Methods that are run one after the other, each at the values of search.curve; none: `search.method` alone."""

    def problems(self) -> list[str]:
        """What does not fit together."""
        of_scorer = self.scorer.problems() if self.scorer is not None else []
        problems = self.search.problems() + of_scorer + super().problems()
        if self.compare and self.search.use_rule:
            problems.append(
                "search.use_rule: found true with compare, required false: a test must not know its answers"
            )
        curve, width = self.search.curve, self.search.width
        for method in self.compare:
            if method in ("beam", "dvts") and all(n % width for n in curve):
                found = ", ".join(map(str, curve))
                problems.append(
                    f"search.curve: found {found} with {method}, required a multiple of search.width = {width}"
                )
        if self.compare and max(curve) > (most := self.search.most_draws):
            problems.append(f"search.curve: found {max(curve)}, required at most {most} draws from one step")
        return problems

    def inputs(self) -> dict[str, Path]:
        """Key -> file or folder that the stage reads."""
        found = {"scorer.path": self.scorer.path if self.scorer is not None else None}
        found |= {"search.tokens_of": self.search.tokens_of}
        return super().inputs() | {key: path for key, path in found.items() if path is not None}

    def source_problems(self) -> list[str]:
        """What the configuration lacks to find its model, its questions, its scorer and its generator."""
        problems = super().source_problems()
        if self.scorer is None and (self.compare or self.search.method != "best_of"):
            problems.append("scorer: found null, required one: only best_of with search.choose majority does without")
        elif self.scorer is None and self.search.choose != "majority":
            problems.append(f"search.choose: found {self.search.choose} without a scorer, required majority")
        return problems

    def searches(self) -> dict[str, Search]:
        """Name -> search that is run: one, or each method of `compare` at each value of search.curve, and then the
        samples that tell how hard a question is."""
        if not self.compare:
            return {self.search.method: self.search}
        found = {}
        for method in self.compare:
            for n in self.search.curve:
                if method in ("beam", "dvts") and n % self.search.width:
                    continue
                keys = {"method": method, "n": n, "lookahead": self.search.lookahead if method != "best_of" else 0}
                if method == "mcts":
                    keys |= {"simulations": 2 * n, "lookahead": 0}
                found[f"{method}_{n}"] = self.search.model_copy(update=keys)
        if self.search.difficulty:
            samples = {"method": "best_of", "n": self.search.difficulty, "lookahead": 0, "budget_tokens": None}
            found[DIFFICULTY] = self.search.model_copy(update=samples)
        return found
