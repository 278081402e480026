"""The embedded generator: samples completions in this process, with PyTorch; on CPUs decode steps are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from r1engine.batch import Completion, Prompt
from r1engine.hf.architecture import read_architecture
from r1engine.hf.tokenizer import load_tokenizer, stop_tokens
from r1engine.rollout.draft import Draft, check_prompts, completions, new_drafts
from r1engine.rollout.local.decode_batch import DecodeBatch, Sampling
from r1engine.rollout.local.decoder import Decoder
from r1engine.rollout.local.sampling import stream_key


class LocalGenerator:
    """Samples from a Hugging Face folder's model, with weights that the trainer replaces in place.

    A completion depends on (seed, step, prompt id, sample, weights) only, not on the other prompts, their order or
    the number of slots, up to rounding: matrix products of other shapes round differently, which changes a token
    when its uniform falls within that rounding (about 1e-7 in float32, about 1e-2 in bfloat16) of an edge.
    """

    def __init__(self, model_path: Path, *, seed: int, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        """Reads the configuration and the tokenizer; the weights arrive by `load_weights`.

        Args:
            model_path: folder with config.json and tokenizer.json.
            seed:       of the run.
            slots:      sequences decoded at once.
            device:     where the weights and the cache live.
            dtype:      of both; log-probabilities are float32 always.

        Raises:
            ValueError: the folder is incomplete, or the model is not one that this generator computes.
        """
        if slots < 1:
            raise ValueError(f"LocalGenerator: slots is {slots}, required is at least 1")
        arch = read_architecture(model_path)
        self._tokenizer = load_tokenizer(model_path)
        self._stop_tokens = stop_tokens(model_path, self._tokenizer)
        self._seed = seed
        self._slots = slots
        self._decoder = Decoder(arch, device=device, dtype=dtype)
        self.weight_version = 0

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replaces every weight, in place.

        Args:
            weights: (Hugging Face name, full tensor of any float dtype and device), each name once.

        Raises:
            ValueError: a tensor is unknown, duplicate, misshaped or missing. `generate` then refuses to run until
                a refresh succeeds.
        """
        self._decoder.weights.load(weights)
        self.weight_version += 1

    def generate(
        self,
        prompts: list[Prompt],
        *,
        num_samples: int,
        step: int,
        max_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Samples `num_samples` completions of each prompt.

        Args:
            prompts:     a prompt id that occurs again draws other samples than before.
            num_samples: completions of each prompt (G).
            step:        of the run; other steps draw other samples.
            max_tokens:  limit of a completion; one that reaches it without a stop token is `truncated`.
            temperature: > 0; divides the logits, also those of the reported log-probabilities.
            top_p:       in (0, 1]; 1 keeps every token.
            top_k:       0 keeps every token.
            on_tokens:   called after each decode step with the number of tokens it drew.

        Returns:
            len(prompts) * num_samples completions, group after group, in sample order. `logp` is that of
            softmax(logits / temperature) over the whole vocabulary, not renormalized by top_p and top_k.

        Raises:
            ValueError: an argument is out of range, or a prompt is empty, too long or has unknown tokens.
            RuntimeError: no complete set of weights was loaded.
        """
        drafts = new_drafts(prompts, num_samples=num_samples, step=step, max_tokens=max_tokens)
        self.draw(drafts, temperature=temperature, top_p=top_p, top_k=top_k, on_tokens=on_tokens)
        return self.completions(drafts)

    @torch.inference_mode()
    def draw(
        self,
        drafts: list[Draft],
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        on_tokens: Callable[[int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        """Goes on with every draft from the tokens it has, to its end or until `should_stop`; otherwise as `generate`.

        A draft that was interrupted is what it would have been without, up to rounding, if the weights are the same.

        Args:
            drafts:      filled in place; samples of one question follow each other.
            should_stop: asked after each decode step.
        """
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
        if not self._decoder.weights.is_complete:
            raise RuntimeError("generate: the weights are incomplete, required is a load_weights that succeeded")
        check_prompts(drafts, self._decoder.arch)
        drafts = [draft for draft in drafts if not draft.finish]
        if not drafts:
            return
        rows = DecodeBatch(
            self._decoder,
            drafts,
            keys=[stream_key(self._seed, draft.step, draft.prompt.id, draft.stream) for draft in drafts],
            slots=self._slots,
            sampling=sampling,
            stop_tokens=self._stop_tokens,
            version=self.weight_version,
        )
        for num_tokens in rows.run():
            if on_tokens is not None:
                on_tokens(num_tokens)
            if should_stop is not None and should_stop():
                rows.interrupt()
                return

    def completions(self, drafts: list[Draft]) -> list[Completion]:
        """Ended drafts as completions, in order."""
        return completions(drafts, self._tokenizer)

    def metrics(self) -> dict[str, float]:
        """None of its own: a refresh in this process is a copy."""
        return {}

    def close(self) -> None:
        """Nothing to stop."""

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Inside, `generate` may be called; at the exit its memory goes back to the device.

        The key/value cache lives inside one `generate`. The weights stay on the device, so that `load_weights`
        works outside.
        """
        try:
            yield
        finally:
            if self._decoder.device.type == "cuda":
                torch.cuda.empty_cache()
