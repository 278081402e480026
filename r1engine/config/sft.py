"""Supervised fine-tuning on texts. Defaults are the paper's for the cold start and for the second SFT."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from r1engine.config.section import Fraction, LocalPath, Positive, Section
from r1engine.config.stage import Data, Optimizer, StageConfig, Template, column_problems

TEXT_FIELDS = ("question", "completion", "messages", "domain")


class TextData(Data):
    """The conversations."""

    train: LocalPath | None = None
    """.jsonl or .parquet file with the field `messages` (docs/sft.md), or with `question` and `completion`."""
    heldout: LocalPath | None = None
    """The same, for the held-out loss; null: no evaluation."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our field -> its column, dots lead into nested values: {messages: conversations} or {question: prompt,
    completion: response.text}. A list of messages is messages, or the user's (question) or assistant's (completion)."""
    template: Template = "none"
    """The model's own chat template, the shipped r1 or plain, the paper's Table 1, or the question as it is."""
    train_on: Literal["all", "last"] = "all"
    """Assistant turns of a conversation that are trained on, each as a text of its own behind all that precedes it."""
    max_tokens: Positive = 32_768
    """Tokens of a text with its end token; none is ever cut. v2 B.4.2: "a maximum context length of 32,768"."""
    max_dropped: Fraction = 0.05
    """Share of texts that may be left out (too long, or with a token of the template inside); more are refused."""


class Sft(Section):
    """How often and in which batches the texts are trained on."""

    epochs: Positive = 2
    """Passes over the texts. Section 2.3.3: "two epochs"; v2 B.4.2: 2 to 3."""
    batch_size: Positive = 128
    """Texts of an optimizer step. v2 B.4.2: 128; distillation, B.4.3: 64."""


class SftOptimizer(Optimizer):
    """AdamW and its learning rate; a file that sets one of them keeps the paper's others."""

    lr: Annotated[float, Field(gt=0)] = 5e-5
    """Learning rate. v2 B.4.2: a cosine from 5e-5 to 5e-6; distillation, Table 6: 1e-4 to 2e-5."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """constant after the warm-up, or a cosine down to min_lr_ratio."""


class SftConfig(StageConfig):
    """Supervised fine-tuning: cross-entropy of completions."""

    stage: Literal["sft"] = "sft"
    """Kind of stage."""
    data: TextData = TextData()
    sft: Sft = Sft()
    optimizer: SftOptimizer = SftOptimizer()

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest text."""
        return self.data.max_tokens

    @model_validator(mode="after")
    def _fits_together(self) -> SftConfig:
        problems = self.row_problems(f"data.max_tokens {self.data.max_tokens}")
        if problems := problems + column_problems(self.data.columns, TEXT_FIELDS):
            raise ValueError("\n".join(problems))
        return self
