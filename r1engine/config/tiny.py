"""The demonstration's world: two-digit sums, texts about them, and a tiny model with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from r1engine.config.kind import KindConfig
from r1engine.config.section import LocalPath, Positive


class TinyConfig(KindConfig):
    """Makes the demonstration's task, texts and random model (r1engine/demo/tiny.py). Trains nothing."""

    MAKES: ClassVar[dict[str, str]] = {
        "model": "model",
        "texts": "texts.jsonl",
        "train": "train.jsonl",
        "heldout": "heldout.jsonl",
    }
    ALONE: ClassVar[bool] = True

    stage: Literal["tiny"] = "tiny"
    """Kind of stage."""
    run_dir: LocalPath = Path("runs/tiny")
    """Folder that gets model/, texts.jsonl, train.jsonl and heldout.jsonl."""
    family: Literal["qwen2", "deepseek_v3"] = "qwen2"
    """deepseek_v3: latent attention; experts after the first layer."""
    experts: Annotated[int, Field(ge=4)] = 8
    """Routed experts of such a layer, in two groups; two a token."""
    hidden_size: Positive = 128
    """Numbers of a token's hidden state."""
    layers: Positive = 3
    """Decoder layers."""
    heads: Positive = 4
    """Attention heads."""
    kv_heads: Positive = 2
    """Heads of keys and values."""
    intermediate_size: Positive = 256
    """Width of the MLP."""
    vocab_size: Positive = 512
    """Rows of the embedding; the tokenizer needs about 470."""
    texts: Positive = 86_400
    """Texts to pre-train on."""
    heldout: Positive = 64
    """Questions kept out of all training."""

    @model_validator(mode="after")
    def _fits_together(self) -> TinyConfig:
        problems = []
        if self.hidden_size % (2 * self.heads):
            problems.append(
                f"hidden_size: found {self.hidden_size}, required a multiple of {2 * self.heads} "
                f"(heads {self.heads}, each of even size for the rotary embedding)"
            )
        if self.heads % self.kv_heads:
            problems.append(f"heads: found {self.heads}, required a multiple of kv_heads = {self.kv_heads}")
        if problems:
            raise ValueError("\n".join(problems))
        return self
