"""A search of answers to questions, with what it needs: a model, a scorer of steps, limits (paper, section 4.2)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from r1engine.config.kind import KindConfig
from r1engine.config.process import StepMarking, StepScorerSection
from r1engine.config.rewards import Rewards
from r1engine.config.rl import QuestionData, RlConfig
from r1engine.config.rollout import Rollout
from r1engine.config.sample import SampledModel
from r1engine.config.search import Method, Search
from r1engine.config.section import LocalPath, Positive
from r1engine.config.stage import Model, Template


class SearchConfig(KindConfig):
    """Searches for answers to questions and grades them. Trains nothing."""

    MAKES: ClassVar[dict[str, str]] = {"data": "search.jsonl", "summary": "summary.json"}
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("rollout.slots", "search.questions_at_once", "search.cache_gib")

    stage: Literal["search"] = "search"
    """Kind of stage."""
    run_dir: LocalPath = Path("runs/search")
    """Folder that gets search.jsonl, summary.json, table.md and report.html."""
    threads: Positive | None = None
    """CPU threads of each rank; null: as in training."""
    model: SampledModel = SampledModel()
    questions: LocalPath | None = None
    """.jsonl or .parquet file with the fields `question` and `answer`."""
    template: Template = "r1"
    """How the model is asked: its own chat template, the shipped r1 or plain, Table 1, or the question as it is."""
    system: str | None = None
    """System message, for chat, r1 and plain; null: none."""
    max_prompt_tokens: Positive = 2048
    """Tokens of a prompt with its template."""
    rollout: Rollout = Rollout(max_tokens=4096)
    """Engine, temperature, and the tokens of a completion."""
    rewards: Rewards = Rewards()
    """How answers are graded: deadlines, workers, judge."""
    steps: StepMarking = StepMarking()
    scorer: StepScorerSection | None = None
    """What values steps; null: nothing does, which best_of with choose majority needs."""
    search: Search = Search()
    compare: list[Method] = Field(default=[])
    """Methods that are run one after the other, each at the values of search.curve; none: `search.method` alone."""

    @model_validator(mode="after")
    def _fits_together(self) -> SearchConfig:
        problems = self.search.problems()
        if self.rollout.max_staleness or self.rollout.oversample != 1:
            problems.append("rollout: found max_staleness or oversample, required 0 and 1: nothing is trained here")
        if self.compare and self.search.use_rule:
            problems.append(
                "search.use_rule: found true with compare, required false: a test must not know its answers"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def inputs(self) -> dict[str, Path]:
        """Key -> file or folder that the stage reads."""
        scorer = self.scorer.path if self.scorer is not None else None
        paths = {"model.path": self.model.path, "questions": self.questions, "scorer.path": scorer}
        return {key: path for key, path in paths.items() if path is not None}

    def source_problems(self) -> list[str]:
        """What the configuration lacks to find its model, its questions, its scorer and its generator."""
        problems = [] if self.model.path is not None else ["model.path: found null, required a Hugging Face folder"]
        if self.questions is None or self.questions.suffix not in (".jsonl", ".parquet"):
            problems.append(f"questions: found {self.questions or 'null'}, required a .jsonl or .parquet file")
        if self.scorer is None and (self.compare or self.search.method != "best_of"):
            problems.append("scorer: found null, required one: only best_of with search.choose majority does without")
        elif self.scorer is None and self.search.choose != "majority":
            problems.append(f"search.choose: found {self.search.choose} without a scorer, required majority")
        return problems + (self.rollout.sglang.problems() if self.rollout.engine == "sglang" else [])

    def searches(self) -> dict[str, Search]:
        """Name -> search that is run: one, or each method of `compare` at each value of search.curve."""
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
        return found

    def as_run(self) -> RlConfig:
        """The configuration of a run that draws in this way: what a generator and the prompts need."""
        data = QuestionData(
            train=self.questions,
            template=self.template,
            system=self.system,
            max_prompt_tokens=self.max_prompt_tokens,
        )
        return RlConfig(
            run_dir=self.run_dir,
            seed=self.seed,
            threads=self.threads,
            steps=1,
            model=Model(path=self.model.path, dtype=self.model.dtype),
            data=data,
            rollout=self.rollout,
            rewards=self.rewards,
        )
