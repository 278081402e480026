"""What samples completions from the present policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from r1engine.batch import Completion, PackedBatch, Prompt
from r1engine.rollout.draft import Draft, Sampling, StepEnds, new_drafts

Logprobs = Callable[[list[PackedBatch]], list[torch.Tensor]]  # of a policy: [T] float32 a row
ON_POLICY = Sampling()


class BrokenOff(RuntimeError):
    """Weights did not arrive, and what carried them is gone; the same weights can be given again."""


class Generator(Protocol):
    """Samples with weights that the trainer replaces in place. Every rank has one and draws its own share."""

    weight_version: int  # refreshes so far
    takes_shares: bool  # `load_weights` is given, of each rank, a share of the weights; otherwise all of them
    tokens_run: int | None  # tokens that the model has computed so far; None: not known

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights: full tensors under their Hugging Face names, each once. Collective.

        Raises:
            BrokenOff: give them again.
            ValueError: a tensor is unknown, misshaped or missing.
            RuntimeError: the weights did not arrive where the samples are drawn.
        """

    def verify(self, logprobs: Logprobs, *, row_multiple: int) -> None:
        """Prove that what draws the samples computes the same as the policy, where that is not this process.

        Args:
            logprobs:     the policy's, at the rollout's temperature. Collective. It needs memory that `awake` gives
                          away on a device that both share.
            row_multiple: tokens of a row must be a multiple of this.

        Raises:
            RuntimeError: it does not, beyond what rounding explains.
        """

    def draw(
        self,
        drafts: list[Draft],
        sampling: Sampling,
        *,
        on_tokens: Callable[[int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        stop_after: StepEnds | None = None,
        on_ended: Callable[[Draft], None] | None = None,
    ) -> None:
        """Go on with every draft from the tokens it has, to its end or until `should_stop`.

        The log-probability of a token is that of softmax(logits / temperature) over the whole vocabulary, not
        renormalized by top_p and top_k.

        Args:
            drafts:      filled in place; samples of one question follow each other.
            sampling:    how tokens are drawn; by default from the policy as it is.
            on_tokens:   called with the number of tokens of each part that is drawn.
            should_stop: asked now and then; what is interrupted keeps its tokens.
            stop_after:  a draft ends with the first step, which begins with its first token, too.
            on_ended:    called with each draft as it ends, from one thread at a time.

        Raises:
            ValueError: a prompt is empty, too long or has unknown tokens.
            RuntimeError: there are no complete weights, or nothing is left that draws.
        """

    def completions(self, drafts: list[Draft]) -> list[Completion]:
        """Ended drafts as completions, in order."""

    def keep_steps(self, max_bytes: int) -> None:
        """Keep keys and values of drafts with `origins`, so that other drafts start from them; 0: no more."""

    def forget(self, question: int) -> None:
        """Nothing more is drawn for this prompt id: drop what is kept of it."""

    def awake(self) -> AbstractContextManager[None]:
        """Inside, `draw` may be called; at the exit memory goes back to the device. Collective."""

    def metrics(self) -> dict[str, float]:
        """Of the last refresh."""

    def close(self) -> None:
        """Stop what this process started."""


def generate(
    generator: Generator,
    prompts: list[Prompt],
    *,
    num_samples: int,
    step: int,
    max_tokens: int,
    sampling: Sampling = ON_POLICY,
    on_tokens: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Sample completions of each prompt.

    Args:
        generator:   with the weights to sample from, awake.
        prompts:     a prompt id that occurs again draws other samples than before.
        num_samples: completions of each prompt (G).
        step:        of the run; other steps draw other samples (SGLang's random numbers are its own).
        max_tokens:  limit of a completion; one that reaches it without a stop token is `truncated`.
        sampling:    how tokens are drawn; by default from the policy as it is.
        on_tokens:   called with the number of tokens of each part that is drawn.

    Returns:
        len(prompts) * num_samples completions, group after group, in sample order.

    Raises:
        ValueError, RuntimeError: see `Generator.draw`; or a number is below 1.
    """
    drafts = new_drafts(prompts, num_samples=num_samples, step=step, max_tokens=max_tokens)
    generator.draw(drafts, sampling, on_tokens=on_tokens)
    return generator.completions(drafts)
