"""A completion on its way: what both generators fill, may stop in the middle of, and go on from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from r1engine.batch import Completion, Prompt
from r1engine.hf.architecture import Architecture
from r1engine.hf.tokenizer import PromptTokenizer

DRAWING = 1_000_000  # samples of a question that one drawing of a step may have


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0  # divides the logits, also those of the reported log-probabilities
    top_p: float = 1.0  # the smallest set of tokens with this probability; 1: all
    top_k: int = 0  # the likeliest so many tokens; 0: all

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"generate: temperature is {self.temperature}, required is above 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p is {self.top_p}, required is above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"generate: top_k is {self.top_k}, required is at least 0")


class StepEnds(Protocol):
    """Where the steps of a completion end; `search.steps.StepMarks` is one."""

    token_ids: frozenset[int]  # at which a step may end, whatever was before them: where a server can stop
    may_end: frozenset[int]  # at which a step may end at all: a mark may have several tokens

    def ends(self, tokens: Sequence[int], stop: frozenset[int]) -> list[int]:
        """Number of tokens up to and with the last one of each step."""

    def is_end(self, step: Sequence[int]) -> bool:
        """Whether a step ends with the last of its tokens."""


@dataclass
class Draft:
    """One sample of a question. A generator goes on from the tokens that are there, with the weights that it has."""

    prompt: Prompt
    sample: int  # index inside the group
    step: int  # of the run, and
    stream: int  # the question's n-th sample of that step: address of the embedded generator's random numbers
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)  # of each token, when it was drawn
    versions: list[tuple[int, int]] = field(default_factory=list)  # (weights, tokens drawn from them), in order
    finish: Literal["", "stop", "length", "step"] = ""  # "": not ended; "step": at the end of a step that was asked for
    # [T - 1, layers with experts, k] int16, by the weights that ran each token last; only of an ended draft
    experts: torch.Tensor | None = None
    # Where its keys and values may be kept: streams of the draws whose steps the prompt ends with, the first one for
    # the question itself; the embedded generator starts from the last one, and keeps this draft's as `stream`.
    origins: tuple[int, ...] = ()
    cut: int = 0  # tokens that a server drew behind the step's end; dropped

    def add(self, tokens: list[int], logp: list[float], version: int) -> None:
        """Take tokens drawn from one version of the weights."""
        if not tokens:
            return
        self.tokens += tokens
        self.logp += logp
        if self.versions and self.versions[-1][0] == version:
            self.versions[-1] = (version, self.versions[-1][1] + len(tokens))
        else:
            self.versions.append((version, len(tokens)))


def new_drafts(prompts: list[Prompt], *, num_samples: int, step: int, max_tokens: int, drawing: int = 0) -> list[Draft]:
    """Empty drafts, group after group; a question that occurs again draws other samples than before, and in another
    `drawing` of the step, too.

    Raises:
        ValueError: a number is below 1.
    """
    for name, value in (("num_samples", num_samples), ("max_tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"generate: {name} is {value}, required is at least 1")
    occurrences: Counter[int] = Counter()
    drafts = []
    for prompt in prompts:
        first = drawing * DRAWING + occurrences[prompt.id] * num_samples
        occurrences[prompt.id] += 1
        drafts += [Draft(prompt, sample, step, first + sample, max_tokens) for sample in range(num_samples)]
    return drafts


def end_at_step(draft: Draft, ends: StepEnds, stop: frozenset[int]) -> None:
    """What a server has drawn, as a generator that knows steps leaves it: cut behind the first step, or to go on where
    the server stopped at a mark that ends none.

    Args:
        draft: ended by the server, at a stop token or a mark, or at its limit.
        ends:  of the steps.
        stop:  tokens that end a completion.
    """
    end = ends.ends(draft.tokens, stop)[0] if draft.tokens and draft.tokens[0] not in stop else 0
    is_whole = end < len(draft.tokens) and draft.tokens[end] in stop and not ends.is_end(draft.tokens[:end])
    if is_whole or not end:
        return  # the stop token ends it
    if ends.is_end(draft.tokens[:end]):
        draft.cut += len(draft.tokens) - end
        del draft.tokens[end:], draft.logp[end:]
        last, count = draft.versions[-1]
        draft.versions[-1] = (last, count - (sum(n for _, n in draft.versions) - end))
        draft.finish, draft.experts = "step", None
    elif draft.finish == "stop":
        draft.finish = ""


def check_prompts(drafts: list[Draft], arch: Architecture) -> None:
    """That the model can run these prompts to their token limits.

    Raises:
        ValueError: a prompt is empty, too long or has unknown tokens.
    """
    for prompt, max_tokens in {(id(d.prompt), d.max_tokens): (d.prompt, d.max_tokens) for d in drafts}.values():
        length = len(prompt.tokens)
        if not prompt.tokens:
            raise ValueError(f"generate: prompt {prompt.id} has no tokens, required is at least 1")
        if length + max_tokens > arch.max_positions:
            raise ValueError(
                f"generate: prompt {prompt.id} has {length} tokens, with max_tokens={max_tokens} that is "
                f"{length + max_tokens}; the model has max_position_embeddings={arch.max_positions}"
            )
        if min(prompt.tokens) < 0 or max(prompt.tokens) >= arch.vocab_size:
            found = f"tokens {min(prompt.tokens)} to {max(prompt.tokens)}"
            raise ValueError(f"generate: prompt {prompt.id} has {found}, required is 0 to {arch.vocab_size - 1}")


def completions(drafts: list[Draft], tokenizer: PromptTokenizer) -> list[Completion]:
    """Ended drafts as completions, in order."""
    assert all(draft.finish for draft in drafts)
    spoken = [draft.tokens if draft.finish == "length" else draft.tokens[:-1] for draft in drafts]
    texts = tokenizer.decode_batch(spoken, skip_special_tokens=True)
    return [
        Completion(
            prompt=draft.prompt,
            sample=draft.sample,
            tokens=draft.tokens,
            logp=draft.logp,
            text=text,
            truncated=draft.finish == "length",
            versions=tuple(draft.versions),
            experts=draft.experts,
        )
        for draft, text in zip(drafts, texts, strict=True)
    ]
