"""The embedded generator: samples completions in this process, with PyTorch; on CPUs dense models are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from r1engine.batch import Completion
from r1engine.hf.architecture import read_architecture
from r1engine.hf.kv_shape import kv_bytes
from r1engine.hf.tokenizer import load_tokenizer, stop_tokens
from r1engine.rollout.draft import Draft, Sampling, StepEnds, check_prompts, completions
from r1engine.rollout.generator import Logprobs
from r1engine.rollout.local.cache import Cache, KVCache
from r1engine.rollout.local.decode_batch import PREFILL_TOKENS, DecodeBatch, DraftEnds
from r1engine.rollout.local.decoder import Decoder
from r1engine.rollout.local.kv_store import KVStore
from r1engine.rollout.local.memory import free_bytes, pages_that_fit
from r1engine.rollout.local.pages import PagedCache
from r1engine.rollout.local.sampling import stream_keys


class LocalGenerator:
    """Samples from a Hugging Face folder's model, with weights that the trainer replaces in place.

    A completion depends on (seed, step, prompt id, sample, weights) only, not on the other prompts, their order, the
    number of slots, or on what is kept of it: in every bit where the model is compiled (`compiled.is_compiled`).
    Elsewhere up to rounding: matrix products of other shapes round differently, which changes a token when its
    uniform falls within that rounding (about 1e-7 in float32, about 1e-2 in bfloat16) of an edge.
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
        if arch.moe is not None and device.type == "cuda":
            sizes = arch.hidden_size, arch.moe.intermediate_size
            if dtype != torch.bfloat16 or any(size % 8 for size in sizes):  # rows of 16 bytes
                raise ValueError(
                    f"LocalGenerator: found {str(dtype).removeprefix('torch.')} experts of hidden_size {sizes[0]} and "
                    f"moe_intermediate_size {sizes[1]}, required bfloat16 and multiples of 8 on a GPU"
                )
        self._tokenizer = load_tokenizer(model_path)
        self._stop_tokens = stop_tokens(model_path, self._tokenizer)
        self._seed = seed
        self._slots = slots
        self._decoder = Decoder(arch, device=device, dtype=dtype)
        self._store: KVStore | None = None
        self._cache: KVCache | None = None
        self.weight_version, self.takes_shares = 0, False
        self.tokens_run: int | None = 0

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replaces every weight, in place.

        Args:
            weights: (Hugging Face name, full tensor of any float dtype and device), each name once.

        Raises:
            ValueError: a tensor is unknown, duplicate, misshaped or missing. `draw` then refuses to run until
                a refresh succeeds.
        """
        if self._store is not None:
            self._store.clear()  # of other weights
        self._decoder.weights.load(weights)
        self.weight_version += 1

    def verify(self, logprobs: Logprobs, *, row_multiple: int) -> None:
        """Nothing to prove: a refresh in this process is a copy, and every iteration compares log-probabilities."""

    @torch.inference_mode()
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
        """See `Generator.draw`. `on_tokens` and `should_stop` are called after each decode step, `on_ended` with each
        draft that has ended, before the step is counted.

        A draft that was interrupted is what it would have been without, if the weights are the same, as exactly as the
        class says.
        """
        if not self._decoder.weights.is_complete:
            raise RuntimeError("generate: the weights are incomplete, required is a load_weights that succeeded")
        check_prompts(drafts, self._decoder.arch)
        drafts = [draft for draft in drafts if not draft.finish]
        if not drafts:
            return
        batch = DecodeBatch(
            self._decoder,
            drafts,
            keys=stream_keys([(self._seed, draft.step, draft.prompt.id, draft.stream) for draft in drafts]),
            slots=self._slots,
            sampling=sampling,
            version=self.weight_version,
            ends=DraftEnds(self._stop_tokens, stop_after, self._store, on_ended),
            cache=self._cache_for(drafts),
        )
        for num_tokens in batch.run():
            if on_tokens is not None:
                on_tokens(num_tokens)
            if should_stop is not None and should_stop():
                batch.interrupt()
                break
        self.tokens_run = (self.tokens_run or 0) + batch.tokens_run

    def _cache_for(self, drafts: list[Draft]) -> Cache:
        """Memory for keys and values. Raises RuntimeError where a GPU has no room for one draft."""
        device, arch, dtype = self._decoder.device, self._decoder.arch, self._decoder.dtype
        rows = min(self._slots, len(drafts))
        longest = max(len(draft.prompt.tokens) + draft.max_tokens for draft in drafts)
        if device.type == "cpu":
            # A search draws a few tokens many times: new memory each time would take longer than it is filled.
            if self._cache is None or not self._cache.fits(rows, longest):
                self._cache = KVCache(arch, rows=rows, limit=longest, dtype=dtype)
            return self._cache
        kept = self._store.max_bytes - self._store.num_bytes if self._store is not None else 0
        pages = pages_that_fit(
            arch,
            rows=rows,
            longest=longest,
            prefill=max(PREFILL_TOKENS, *(len(draft.prompt.tokens) + len(draft.tokens) for draft in drafts)),
            size=torch.finfo(dtype).bits // 8,
            free=free_bytes(device) - kept,
        )
        return PagedCache(arch, rows=rows, limit=longest, pages=pages, device=device, dtype=dtype)

    def keep_steps(self, max_bytes: int) -> None:
        """See `Generator.keep_steps`; what is kept now is dropped, as by `load_weights` and when `awake` ends."""
        self._store = KVStore(max_bytes) if max_bytes else None

    def forget(self, question: int) -> None:
        """See `Generator.forget`."""
        if self._store is not None:
            self._store.forget(question)

    def bytes_of(self, num_tokens: int) -> int:
        """Memory of the keys and values of so many tokens."""
        return num_tokens * kv_bytes(self._decoder.arch, torch.finfo(self._decoder.dtype).bits // 8)

    def kept_bytes(self) -> tuple[int, int]:
        """Bytes of keys and values that are kept, and the most that there were."""
        return (self._store.num_bytes, self._store.peak_bytes) if self._store is not None else (0, 0)

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
        """Inside, `draw` may be called; at the exit its memory goes back to the device.

        The key/value cache lives inside one `draw`, on CPUs until the exit. The weights stay on the device, so that
        `load_weights` works outside.
        """
        try:
            yield
        finally:
            self._cache = None
            if self._store is not None:
                self._store.clear()
            if self._decoder.device.type == "cuda":
                torch.cuda.empty_cache()
