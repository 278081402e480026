"""The world of the miniature of search: chains of sums and products whose every step has exact truth."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from r1engine.config.kind import KindConfig
from r1engine.config.section import LocalPath, Positive
from r1engine.config.tiny import TinyConfig


class TinyChainConfig(KindConfig):
    """Makes the questions, texts and random model of r1engine/demo/tiny_chain.py. Trains nothing."""

    MAKES: ClassVar[dict[str, str]] = {
        "model": "model",
        "clean": "clean.jsonl",
        "texts": "texts.jsonl",
        "train": "train.jsonl",
        "more": "more.jsonl",
        "heldout": "heldout.jsonl",
        "tests": "tests.jsonl",
    }
    ALONE: ClassVar[bool] = True

    stage: Literal["tiny_chain"] = "tiny_chain"
    """Kind of stage."""
    run_dir: LocalPath = Path("runs/tiny_chain")
    """Folder of model/, of clean.jsonl and texts.jsonl to pre-train on in this order, and of the questions train.jsonl,
    more.jsonl, heldout.jsonl and tests.jsonl."""
    hidden_size: Positive = 128
    """Numbers of a token's hidden state."""
    layers: Positive = 3
    """Decoder layers; two cannot check a step and remember those before."""
    vocab_size: Positive = 512
    """Rows of the embedding."""
    texts: Positive = 24_000
    """Texts of each of the two files to pre-train on."""
    train: Positive = 2_000
    """Questions to draw solutions to."""
    more: Positive = 400
    """Other questions, for a round of search and training."""
    heldout: Positive = 200
    """Questions kept out of all training."""
    tests: Positive = 200
    """Others kept out of all training, on which a round of search and training is tested."""

    def as_model(self) -> TinyConfig:
        """The shape of the model."""
        return TinyConfig(
            run_dir=self.run_dir,
            seed=self.seed,
            hidden_size=self.hidden_size,
            layers=self.layers,
            intermediate_size=2 * self.hidden_size,
            vocab_size=self.vocab_size,
        )


class TinyChainTruthConfig(KindConfig):
    """Labels the steps of solutions to chains exactly, in place of the labels that they have. Trains nothing."""

    MAKES: ClassVar[dict[str, str]] = {"data": "steps.jsonl"}
    ALONE: ClassVar[bool] = True

    stage: Literal["tiny_chain_truth"] = "tiny_chain_truth"
    """Kind of stage."""
    run_dir: LocalPath = Path("runs/tiny_chain_truth")
    """Folder that gets steps.jsonl."""
    steps: LocalPath | None = None
    """File of labelled steps, as `stage: label` makes it, of questions of `tiny_chain`."""
    labels: Literal["correctness", "value", "hard"] = "correctness"
    """correctness: 1 for right steps, 0 for the first wrong one, unknown behind it; value: the probability that the
    generator of the texts gets to the answer from there; hard: 1 in place of every label above 0."""

    def inputs(self) -> dict[str, Path]:
        """Key -> file that the stage reads."""
        return {"steps": self.steps} if self.steps is not None else {}

    def source_problems(self) -> list[str]:
        """What the configuration lacks."""
        return [] if self.steps is not None else ["steps: found null, required a file of labelled steps"]


class TinyChainReportConfig(KindConfig):
    """Compares what was labelled, trained and searched with the truth of the chains. Trains nothing."""

    MAKES: ClassVar[dict[str, str]] = {"summary": "summary.json", "page": "report.html"}
    ALONE: ClassVar[bool] = True

    stage: Literal["tiny_chain_report"] = "tiny_chain_report"
    """Kind of stage."""
    run_dir: LocalPath = Path("runs/tiny_chain_report")
    """Folder that gets summary.json, table.md and report.html."""
    steps: LocalPath | None = None
    """File of steps with soft labels, of `stage: label`."""
    searches: dict[str, LocalPath] = Field(default={})
    """Name -> search.jsonl. `exact`, `rollouts`: by the models of these labels; `before`, `round`, `after`, `reject`
    and `rejected`: of a round of search and training, and of rejection sampling beside it."""
    trained: dict[str, LocalPath] = Field(default={})
    """Name -> model of a stage. `exact`, `hard`, `soft`: process reward models; `rule`, `sum`, `min`: policies."""

    def inputs(self) -> dict[str, Path]:
        """Key -> file or folder that the stage reads."""
        found = {f"searches.{name}": path for name, path in self.searches.items()}
        found |= {f"trained.{name}": path for name, path in self.trained.items()}
        return found | ({"steps": self.steps} if self.steps is not None else {})
