"""The miniature of the whole paper: sums asked in two languages, general questions, and what is not to be told."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from r1engine.config.kind import KindConfig
from r1engine.config.section import LocalPath, Positive
from r1engine.config.tiny import TinyConfig


class TinyR1Config(KindConfig):
    """Makes the bilingual miniature's questions, texts and two random models (r1engine/demo/tiny_r1.py)."""

    MAKES: ClassVar[dict[str, str]] = {
        "model": "model",
        "student": "student",
        "texts": "texts.jsonl",
        "student_texts": "student_texts.jsonl",
        "reasoning": "reasoning.jsonl",
        "cold": "cold.jsonl",
        "more": "more.jsonl",
        "general": "general.jsonl",
        "chats": "chats.jsonl",
        "pairs": "pairs.jsonl",
        "heldout_pairs": "heldout_pairs.jsonl",
        "labels": "labels.jsonl",
        "heldout_labels": "heldout_labels.jsonl",
        "heldout": "heldout.jsonl",
    }
    ALONE: ClassVar[bool] = True

    stage: Literal["tiny_r1"] = "tiny_r1"
    """Kind of stage."""
    run_dir: LocalPath = Path("runs/tiny_r1")
    """Folder that gets the files."""
    hidden_size: Positive = 128
    """Numbers of a token's hidden state."""
    student_hidden_size: Positive = 64
    """The same of the student."""
    layers: Positive = 2
    """Decoder layers of both; with one layer no digits are copied."""
    vocab_size: Positive = 704
    """Rows of the embedding."""
    texts: Positive = 115_200
    """Texts to pre-train on."""
    student_texts: Positive = 67_200
    """The same of the student."""
    heldout: Positive = 64
    """Sums kept out of all training."""
    cold: Positive = 1_000
    """Sums that the cold start is drawn from."""
    more: Positive = 2_400
    """Sums that the later rejection sampling is drawn from."""

    def model_of(self, hidden_size: int) -> TinyConfig:
        """The shape of the model, or of the student."""
        return TinyConfig(
            run_dir=self.run_dir,
            seed=self.seed,
            hidden_size=hidden_size,
            layers=self.layers,
            intermediate_size=2 * hidden_size,
            vocab_size=self.vocab_size,
        )
