"""The embedded generator: samples completions in this process, with plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer

from r1engine.architecture import load_tokenizer, read_architecture, read_json
from r1engine.batch import Completion, Prompt
from r1engine.rollout.decoder import Decoder
from r1engine.rollout.rows import Job, Rows, Sampling
from r1engine.rollout.sampling import stream_key


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

    @torch.inference_mode()
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
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
        if num_samples < 1:
            raise ValueError(f"generate: num_samples is {num_samples}, required is at least 1")
        if not self._decoder.weights.is_complete:
            raise RuntimeError("generate: the weights are incomplete, required is a load_weights that succeeded")
        for prompt in prompts:
            self._check_prompt(prompt, max_tokens)
        if not prompts:
            return []
        jobs = self._jobs(prompts, num_samples, step)
        rows = Rows(
            self._decoder,
            jobs,
            num_samples=num_samples,
            slots=self._slots,
            sampling=sampling,
            stop_tokens=self._stop_tokens,
        )
        for num_tokens in rows.run():
            if on_tokens is not None:
                on_tokens(num_tokens)
        return self._completions(jobs)

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

    def _check_prompt(self, prompt: Prompt, max_tokens: int) -> None:
        arch, length = self._decoder.arch, len(prompt.tokens)
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

    def _jobs(self, prompts: list[Prompt], num_samples: int, step: int) -> list[Job]:
        occurrences: dict[int, int] = {}
        jobs = []
        for prompt in prompts:
            first = occurrences.get(prompt.id, 0) * num_samples
            occurrences[prompt.id] = occurrences.get(prompt.id, 0) + 1
            for sample in range(num_samples):
                key = stream_key(self._seed, step, prompt.id, first + sample)
                jobs.append(Job(prompt=prompt, sample=sample, key=key))
        return jobs

    def _completions(self, jobs: list[Job]) -> list[Completion]:
        spoken = [job.tokens if job.is_truncated else job.tokens[:-1] for job in jobs]
        texts = self._tokenizer.decode_batch(spoken, skip_special_tokens=True)
        return [
            Completion(
                prompt=job.prompt,
                sample=job.sample,
                tokens=job.tokens,
                logp=job.logp,
                text=text,
                truncated=job.is_truncated,
                weight_version=self.weight_version,
                experts=job.experts,
            )
            for job, text in zip(jobs, texts, strict=True)
        ]


def stop_tokens(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Every end-of-sequence id that generation_config.json, config.json or tokenizer_config.json of a folder name.

    Raises:
        ValueError: there is none, so no completion could end.
    """
    stops: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = read_json(folder / name).get("eos_token_id")
            stops.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if (folder / "tokenizer_config.json").is_file():
        token = read_json(folder / "tokenizer_config.json").get("eos_token")
        text = token["content"] if isinstance(token, dict) else token
        if text is not None:
            index = tokenizer.token_to_id(text)
            if index is None:
                raise ValueError(f"{folder / 'tokenizer_config.json'}: eos_token {text!r} is not in tokenizer.json")
            stops.add(index)
    if not stops:
        raise ValueError(f"{folder}: no eos_token_id in generation_config.json or config.json, required is one")
    return frozenset(stops)
