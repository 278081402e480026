"""What flows through one GRPO iteration: Prompt -> Completion -> Sample -> PackedBatch.

One index convention everywhere: entry t belongs to tokens[t]; logp[t] = log pi(tokens[t] | tokens before it
in the same sequence). The first token of a sequence has logp 0 and weight 0. Nothing is shifted at borders.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Prompt:
    """One question, rendered and tokenized."""

    id: int  # index in the data file, stable over epochs; part of every sampling seed
    tokens: list[int]
    text: str  # the rendered template
    question: str
    answer: str  # reference answer
    task: str = "math"


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    prompt: Prompt
    sample: int  # index inside the group
    tokens: list[int]  # sampled tokens, the stop token included
    logp: list[float]  # log-probability of each under the generator, at the sampling temperature (nats)
    text: str  # decoded, special tokens skipped
    truncated: bool  # stopped by the token limit, not by a stop token
    weight_version: int = 0  # refresh count of the weights it was drawn from


@dataclass(frozen=True)
class Sample:
    """A completion with what the objective needs of it."""

    completion: Completion
    advantage: float
    is_masked: bool = False  # True: takes part in nothing (a truncated completion under `truncated: mask`)
