"""Making data for supervised training: what is left out of samples and conversations, refined, and mixed.

The paper names the filters and gives no threshold; what stands here as "ours" is a choice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from r1engine.config.kind import KindConfig
from r1engine.config.rewards import ChatServer, Rewards
from r1engine.config.section import Count, Fraction, LocalPath, Positive, Section
from r1engine.config.stage import Template

METHODS = ("few_shot", "direct", "r1_zero", "human", "rejection", "given")
RefinePrompt = Literal["translate_thoughts", "conversational", "summary"]


class Refine(Section):
    """Rewriting by a language model (v2 B.3.2), graded again afterwards."""

    server: ChatServer
    prompts: list[RefinePrompt] = Field(default=["translate_thoughts", "summary"], min_length=1)
    """In order. summary: Listing 1. translate_thoughts: of thoughts below language_min, "to the same language as the
    question". conversational: in the first person."""
    examples: LocalPath | None = None
    """Text for `conversational`: rewritings by people, which are shown first; null: none."""
    rewards: Rewards = Rewards()
    """How a row is graded again; of the section, what computes a reward counts, and no weight."""


class TargetModel(Section):
    """The model that is to be trained."""

    path: LocalPath | None = None
    """Local Hugging Face folder; its tokenizer and template decide lengths and markers. null: lengths are those of the
    samples, and markers are not looked for."""
    template: Template = "r1"
    """How conversations will be written for it."""


class CurateConfig(KindConfig):
    """Data for supervised training from samples and conversations. Trains nothing."""

    MAKES: ClassVar[dict[str, str]] = {"data": "data.parquet", "dropped": "dropped.parquet", "counts": "counts.json"}
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("processes", "refine.rewards.workers")
    ALONE: ClassVar[bool] = True

    stage: Literal["curate"] = "curate"
    """Kind of stage."""
    run_dir: LocalPath = Path("runs/curate")
    """Folder that gets data.parquet, dropped.parquet, counts.json and report.html."""
    sources: list[LocalPath] = Field(default=[])
    """Folders of samples, and .jsonl or .parquet files of conversations (docs/sft.md); all their rows together."""
    methods: list[str] | None = None
    """How the rows of each source came to be, one name a source; null: what the rows say, else rejection for
    samples and given for files. The cold start's four ways (section 2.3.1): few_shot, direct, r1_zero, human."""
    decontaminate: list[LocalPath] = Field(default=[])
    """.jsonl or .parquet files of evaluation questions, with `answer` and `solution` if there are; no row may share an
    n-gram with them. v2 D.1."""
    ngram: Positive = 10
    """Words, or characters of scripts without spaces. v2 D.1: "10-gram"."""
    model: TargetModel = TargetModel()
    refine: Refine | None = None
    summaries: dict[str, str] = Field(default={})
    """Language -> text with {answer}, which is the summary of a sample in that language; without a server."""
    language_min: Fraction = 0.95
    """Least share of the thoughts' words in the question's language (section 2.3.3: no "mixed languages"). Ours; for
    the cold start 1.0."""
    max_paragraph: Positive | None = 512
    """Words (characters of scripts without spaces) of a line of the thoughts (section 2.3.3: no "long paragraphs").
    Ours; null: any."""
    code_in_thoughts: bool = False
    """Whether thoughts may hold fenced code (section 2.3.3: no "code blocks"). A summary may."""
    repetition_ngram: Positive = 20
    """Words of the n-grams that repetition is seen by. Ours."""
    repetition_max: Fraction = 0.2
    """Largest share of n-grams of the thoughts that occurred before (v2 B.3.2: "repetition detection"). Ours."""
    max_tokens: Positive = 32_768
    """Tokens of a row. v2 B.4.2: "a maximum context length of 32,768"."""
    near_duplicate: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    """Share of 5-grams (Jaccard) from which two questions count as one for keep_per_question. Ours; null: only equal
    ones."""
    keep_per_question: Positive | None = None
    """Right answers of a question; null: all, as the paper says."""
    prefer: Literal["shortest", "random"] = "random"
    """Which ones are kept. Ours."""
    counts: dict[str, Count] | None = None
    """Domain -> rows of the mixture; other domains are left out. v2 Table 5 has math 395,285, code 211,129, stem
    10,124, logic 10,395, general 177,812. null: all rows."""
    shares: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Domain -> share of the mixture, in any unit, in place of counts: as many rows as the scarcest domain allows."""
    processes: Positive | None = None
    """Processes that filter; null: one a usable core."""

    @model_validator(mode="after")
    def _fits_together(self) -> CurateConfig:
        problems = []
        if self.methods is not None and len(self.methods) != len(self.sources):
            problems.append(
                f"methods: found {len(self.methods)}, required one for each of the {len(self.sources)} sources"
            )
        if unknown := [method for method in self.methods or [] if method not in METHODS]:
            problems.append(f"methods: found {unknown[0]!r}, required one of {', '.join(METHODS)}")
        if self.counts is not None and self.shares is not None:
            problems.append("counts, shares: found both, required one of them or none")
        for key, mixture in (("counts", self.counts), ("shares", self.shares)):
            if mixture is not None and not any(mixture.values()):
                problems.append(f"{key}: found {mixture}, required a domain with rows")
        for language, text in self.summaries.items():
            if "{answer}" not in text:
                problems.append(f"summaries.{language}: found {text!r:.60}, required a text with {{answer}}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def source_problems(self) -> list[str]:
        """What the configuration lacks to find what it reads."""
        problems = [] if self.sources else ["sources: found none, required at least one"]
        if len({*self.sources}) < len(self.sources):
            problems.append("sources: found one twice, required different ones")
        return problems

    def inputs(self) -> dict[str, Path]:
        """Key -> file or folder that the stage reads."""
        found = {f"sources.{i}": path for i, path in enumerate(self.sources)}
        found |= {f"decontaminate.{i}": path for i, path in enumerate(self.decontaminate)}
        found |= {"model.path": self.model.path} if self.model.path is not None else {}
        examples = self.refine.examples if self.refine is not None else None
        return found | ({"refine.examples": examples} if examples is not None else {})
