"""One generate call: which sequence is in which row of the decoder, until every sequence has ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from r1engine.batch import Prompt
from r1engine.rollout.cache import KVCache
from r1engine.rollout.decoder import Decoder, Prefill
from r1engine.rollout.sampling import sample, uniforms

PREFILL_TOKENS = 8192  # padded prompt tokens run at once, unless one prompt alone is longer


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"generate: max_tokens is {self.max_tokens}, required is at least 1")
        if not self.temperature > 0:
            raise ValueError(f"generate: temperature is {self.temperature}, required is above 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p is {self.top_p}, required is above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"generate: top_k is {self.top_k}, required is at least 0")


@dataclass
class Job:
    """One completion to sample; filled when it ends."""

    prompt: Prompt
    sample: int
    key: np.uint64  # its stream of uniforms
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    is_truncated: bool = False
    experts: torch.Tensor | None = None  # [prompt + completion - 1, layers with experts, k] int16


class Rows:
    """Decodes jobs, one a row. A row whose job ends takes the next job; when none is left, the last row moves into
    its place, so that a decode step never computes a finished sequence."""

    def __init__(
        self,
        decoder: Decoder,
        jobs: list[Job],
        *,
        num_samples: int,
        slots: int,
        sampling: Sampling,
        stop_tokens: frozenset[int],
    ) -> None:
        """Every `num_samples` jobs have the same prompt."""
        self._decoder, self._sampling = decoder, sampling
        self._jobs, self._num_samples = jobs, num_samples
        self._next_job = 0
        self._num_rows = num_rows = min(slots, len(jobs))
        self._is_stop = np.zeros(decoder.arch.vocab_size, dtype=bool)
        self._is_stop[[token for token in stop_tokens if token < decoder.arch.vocab_size]] = True
        limit = max(len(job.prompt.tokens) for job in jobs) + sampling.max_tokens
        self._cache = KVCache(decoder.arch, rows=num_rows, limit=limit, device=decoder.device, dtype=decoder.dtype)
        # What follows is on the host, one entry a row.
        self._job_of = np.zeros(num_rows, dtype=np.int64)
        self._keys = np.zeros(num_rows, dtype=np.uint64)
        self._input = np.zeros(num_rows, dtype=np.int64)  # the token the row decodes next
        self._positions = np.zeros(num_rows, dtype=np.int64)  # and its index in the sequence
        self._counts = np.zeros(num_rows, dtype=np.int64)  # tokens sampled
        self._tokens = np.zeros((num_rows, 64), dtype=np.int64)
        self._logp = np.zeros((num_rows, 64), dtype=np.float64)
        self._experts: list[list[np.ndarray]] = [[] for _ in range(num_rows)]  # of the tokens run, in order
        self._prefill: Prefill | None = None  # of prompts [_first_prompt, _last_prompt)
        self._first_prompt = self._last_prompt = 0

    def run(self) -> Iterator[int]:
        """Decodes everything; yields how many tokens each decode step, or each batch of first tokens, drew."""
        holes = np.arange(self._num_rows)
        while True:
            while len(holes) and self._next_job < len(self._jobs):
                admitted, holes = self._admit(holes)
                yield admitted
            if len(holes):
                self._compact(holes)
            if self._num_rows == 0:
                return
            rows = np.arange(self._num_rows)
            logits, experts = self._step()
            if experts is not None:
                for row, of_token in enumerate(experts.to(torch.int16).cpu().numpy()):
                    self._experts[row].append(of_token[None])
            holes = self._draw(rows, logits)
            yield len(rows)

    def _step(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Decodes one token of every row; returns as `Decoder.step`."""
        live = slice(0, self._num_rows)
        length = int(self._positions[live].max()) + 1
        self._cache.reserve(length)
        inputs = torch.from_numpy(np.stack([self._input[live], self._positions[live]])).to(self._decoder.device)
        return self._decoder.step(inputs[0], inputs[1], self._cache, length=length)

    def _admit(self, holes: np.ndarray) -> tuple[int, np.ndarray]:
        """Puts jobs of the prefilled prompts into `holes` and draws their first tokens.

        Returns:
            the number of jobs, and the rows that are holes still or again.
        """
        if self._next_job == self._last_prompt * self._num_samples:
            self._prefill = None  # frees its keys and values before the next ones are made
            self._prefill = self._prefill_prompts()
        prefill = self._prefill
        assert prefill is not None
        num_jobs = min(self._last_prompt * self._num_samples - self._next_job, len(holes))
        jobs = np.arange(self._next_job, self._next_job + num_jobs)
        self._next_job += num_jobs
        rows, holes = holes[:num_jobs], holes[num_jobs:]
        source = jobs // self._num_samples - self._first_prompt
        lengths = np.array(prefill.lengths)[source]
        self._job_of[rows] = jobs
        self._keys[rows] = [self._jobs[job].key for job in jobs]
        self._positions[rows] = lengths - 1
        self._counts[rows] = 0
        if prefill.experts is not None:
            of_prompts = prefill.experts.to(torch.int16).cpu().numpy()
            for row, i, length in zip(rows, source, lengths, strict=True):
                self._experts[row] = [of_prompts[i, :length]]
        self._cache.reserve(prefill.kv[0].shape[3])
        upload = torch.from_numpy(np.stack([rows, source, lengths])).to(self._decoder.device)
        self._cache.fill(upload[0], prefill.kv, upload[1], upload[2])
        return num_jobs, np.concatenate([self._draw(rows, prefill.logits[upload[1]]), holes])

    def _prefill_prompts(self) -> Prefill:
        """Runs the next prompts: no more than the rows can take at once, within PREFILL_TOKENS."""
        most = -(-self._num_rows // self._num_samples)
        first = self._last_prompt
        prompts: list[list[int]] = []
        longest = 0
        for job in self._jobs[first * self._num_samples :: self._num_samples][:most]:
            longest = max(longest, len(job.prompt.tokens))
            if prompts and longest * (len(prompts) + 1) > PREFILL_TOKENS:
                break
            prompts.append(job.prompt.tokens)
        self._first_prompt, self._last_prompt = first, first + len(prompts)
        return self._decoder.prefill(prompts)

    def _draw(self, rows: np.ndarray, logits: torch.Tensor) -> np.ndarray:
        """Draws the next token of each of `rows`; returns those whose job ended with it."""
        uniform = torch.from_numpy(uniforms(self._keys[rows], self._counts[rows])).to(logits.device)
        drawn, logp = sample(
            logits,
            uniform,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            top_k=self._sampling.top_k,
        )
        # One transfer, the only point where the host waits for the device. float64 holds every token id exactly.
        fetched = torch.stack([drawn.double(), logp.double()]).cpu().numpy()
        tokens = fetched[0].astype(np.int64)
        self._tokens[rows, self._counts[rows]] = tokens
        self._logp[rows, self._counts[rows]] = fetched[1]
        self._input[rows] = tokens
        self._positions[rows] += 1
        self._counts[rows] += 1
        if self._counts[rows].max() == self._tokens.shape[1]:
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)], axis=1)
            self._logp = np.concatenate([self._logp, np.zeros_like(self._logp)], axis=1)
        is_ended = self._is_stop[tokens] | (self._counts[rows] == self._sampling.max_tokens)
        for row in rows[is_ended]:
            job, count = self._jobs[self._job_of[row]], self._counts[row]
            job.tokens = self._tokens[row, :count].tolist()
            job.logp = self._logp[row, :count].tolist()
            job.is_truncated = not self._is_stop[job.tokens[-1]]
            if self._experts[row]:
                job.experts = torch.from_numpy(np.concatenate(self._experts[row]))
        return rows[is_ended]

    def _compact(self, holes: np.ndarray) -> None:
        """Moves the last rows into `holes`, so that the live rows are the first ones."""
        num_rows = self._num_rows - len(holes)
        is_hole = np.zeros(self._num_rows, dtype=bool)
        is_hole[holes] = True
        self._num_rows, target = num_rows, np.flatnonzero(is_hole[:num_rows])
        if not len(target):
            return
        source = num_rows + np.flatnonzero(~is_hole[num_rows:])
        for column in (self._job_of, self._keys, self._input, self._positions, self._counts, self._tokens, self._logp):
            column[target] = column[source]
        for old, new in zip(source, target, strict=True):
            self._experts[new] = self._experts[old]
        upload = torch.from_numpy(np.stack([source, target])).to(self._decoder.device)
        self._cache.move(upload[0], upload[1], int(self._positions[target].max()))
