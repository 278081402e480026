"""Supervised fine-tuning on texts. Defaults are the paper's for the cold start and for the second SFT."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from r1engine.config.section import LocalPath, Positive, Section
from r1engine.config.stage import Data, Optimizer, StageConfig


class TextData(Data):
    """The texts."""

    train: LocalPath | None = None
    """.jsonl or .parquet file with the fields `question` and `completion`."""
    heldout: LocalPath | None = None
    """The same, for the held-out loss; null: no evaluation."""
    template: Literal["r1_zero", "none"] = "none"
    """What stands before the completion: the paper's Table 1 around the question, or the question as it is."""
    max_tokens: Positive = 32_768
    """Tokens of a text with its end token; a longer one is refused. v2 B.4.2: "a maximum context length of 32,768"."""


class Sft(Section):
    """How often and in which batches the texts are trained on."""

    epochs: Positive = 2
    """Passes over the texts. Section 2.3.3: "two epochs"; v2 B.4.2: 2 to 3."""
    batch_size: Positive = 128
    """Texts of an optimizer step. v2 B.4.2: 128; distillation, B.4.3: 64."""


class SftConfig(StageConfig):
    """Supervised fine-tuning: cross-entropy of completions."""

    stage: Literal["sft"] = "sft"
    """Kind of stage."""
    data: TextData = TextData()
    sft: Sft = Sft()
    optimizer: Optimizer = Optimizer(lr=5e-5, schedule="cosine")  # v2 B.4.2: a cosine from 5e-5 to 5e-6

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest text."""
        return self.data.max_tokens

    @model_validator(mode="after")
    def _fits_together(self) -> SftConfig:
        if problems := self.row_problems(f"data.max_tokens {self.data.max_tokens}"):
            raise ValueError("\n".join(problems))
        return self
