"""Samples over several servers: the least loaded takes the next group; what a failing one drew goes on elsewhere."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from r1engine.rollout.sglang.client import Client, Drawn, ServerError

MOST_ATTEMPTS = 6  # of one sample, before the run stops
STRIKES = 3  # failures in a row after which a server that still answers is left out


@dataclass
class Endpoint:
    """A server as the router sees it."""

    client: Client
    version: str | None = None  # of the weights that it is known to hold; None: unknown
    is_usable: bool = True
    problem: str = ""  # why it is not usable
    open_samples: int = 0
    strikes: int = 0
    last_part: float = 0.0  # when a part of any of its samples came (monotonic seconds)
    tasks: set[asyncio.Task] = field(default_factory=set)

    def fail(self, problem: str) -> None:
        """Leave the server out and break off its open samples."""
        self.is_usable, self.problem, self.version = False, problem, None
        for task in self.tasks:
            task.cancel()


@dataclass
class Job:
    """One sample to draw."""

    group: int  # samples of one prompt share it, and with it a server and its prefix
    prompt: list[int]
    max_tokens: int
    drawn: Drawn = field(default_factory=Drawn)
    attempts: int = 0


class Router:
    """Draws jobs from the endpoints that hold the current weights."""

    def __init__(self, endpoints: list[Endpoint], *, vocab_size: int, stall_seconds: float) -> None:
        """
        Args:
            endpoints:     the servers; state is kept in them between runs.
            vocab_size:    tokens outside it are no answer.
            stall_seconds: a server with open samples that sends nothing for so long has failed.
        """
        self.endpoints, self.vocab_size, self.stall_seconds = endpoints, vocab_size, stall_seconds
        self._home: dict[int, Endpoint] = {}

    def run(
        self,
        jobs: list[Job],
        sampling: dict[str, Any],
        *,
        version: str,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Draw every job to its end.

        Args:
            jobs:         filled in place.
            sampling:     SGLang's sampling_params, without max_new_tokens.
            version:      of the weights that every token must come from.
            on_tokens:    called with the number of tokens of each part.

        Returns:
            What went wrong on the way and was mended, for the log.

        Raises:
            RuntimeError: no server with these weights is left, or a sample failed MOST_ATTEMPTS times.
        """
        return asyncio.run(self._run(jobs, sampling, version, on_tokens or (lambda _: None)))

    async def _run(self, jobs: list[Job], sampling: dict, version: str, on_tokens: Any) -> list[str]:
        self._home.clear()
        incidents: list[str] = []
        for endpoint in self.endpoints:
            endpoint.open_samples, endpoint.tasks, endpoint.last_part = 0, set(), time.monotonic()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            watch = asyncio.create_task(self._watch(session, incidents))
            drawing = [
                asyncio.create_task(self._draw(session, job, sampling, version, on_tokens, incidents)) for job in jobs
            ]
            try:
                await asyncio.gather(*drawing)
            finally:
                for task in (watch, *drawing):
                    task.cancel()
                await asyncio.gather(watch, *drawing, return_exceptions=True)
        return incidents

    async def _draw(
        self,
        session: aiohttp.ClientSession,
        job: Job,
        sampling: dict,
        version: str,
        on_tokens: Any,
        incidents: list[str],
    ) -> None:
        while job.drawn.finish is None:
            endpoint = self._pick(job.group, version)
            # What a failed server drew stays: drawing again from nothing would favour short completions.
            body = {
                "input_ids": job.prompt + job.drawn.tokens,
                "sampling_params": sampling | {"max_new_tokens": job.max_tokens - len(job.drawn.tokens)},
                "return_logprob": True,
                "stream": True,
            }
            task = asyncio.create_task(self._stream(session, endpoint, body, job, version, on_tokens))
            endpoint.tasks.add(task)
            endpoint.open_samples += 1
            try:
                await task
                endpoint.strikes = 0
            except (ServerError, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and endpoint.is_usable:
                    raise  # this run is being given up, not the server
                self._note_failure(endpoint, job, error, incidents)
            finally:
                endpoint.tasks.discard(task)
                endpoint.open_samples -= 1

    def _note_failure(self, endpoint: Endpoint, job: Job, error: BaseException, incidents: list[str]) -> None:
        job.attempts += 1
        endpoint.strikes += 1
        reason = endpoint.problem if isinstance(error, asyncio.CancelledError) else str(error)
        if endpoint.is_usable and endpoint.strikes >= STRIKES:
            endpoint.fail(f"{STRIKES} failures in a row, the last: {reason}")
            incidents.append(f"{endpoint.client.url} left out: {endpoint.problem}")
        if job.attempts >= MOST_ATTEMPTS:
            raise RuntimeError(f"sglang: a sample failed {job.attempts} times, the last time: {reason}")
        if len(job.drawn.tokens) >= job.max_tokens:
            job.drawn.finish = "length"  # only the end of the stream was lost

    async def _stream(
        self, session: aiohttp.ClientSession, endpoint: Endpoint, body: dict, job: Job, version: str, on_tokens: Any
    ) -> None:
        """One request; only parts that are whole, sane and of the right weights enter the job."""
        fresh = Drawn()
        async for count in endpoint.client.generate(session, body, fresh):
            endpoint.last_part = time.monotonic()
            if fresh.versions and fresh.versions != [version]:
                endpoint.fail(f"drew from weights {fresh.versions}, required {version}")
                raise ServerError(f"{endpoint.client.url}: {endpoint.problem}")
            new_tokens, new_logp = fresh.tokens[-count:] if count else [], fresh.logp[-count:] if count else []
            self._check(endpoint, new_tokens, new_logp)
            job.drawn.tokens += new_tokens
            job.drawn.logp += new_logp
            on_tokens(count)
        job.drawn.versions, job.drawn.finish = [version], fresh.finish

    def _check(self, endpoint: Endpoint, tokens: list[int], logp: list[float]) -> None:
        for token, value in zip(tokens, logp, strict=True):
            if not (0 <= token < self.vocab_size and math.isfinite(value) and value <= 1e-4):
                raise ServerError(f"{endpoint.client.url}: token {token} with log-probability {value} is no answer")

    def _pick(self, group: int, version: str) -> Endpoint:
        """The group's server while it is usable, else the least loaded one."""
        home = self._home.get(group)
        if home is not None and home.is_usable:
            return home
        usable = [e for e in self.endpoints if e.is_usable and e.version == version]
        if not usable:
            states = "; ".join(f"{e.client.url}: {e.problem or f'weights {e.version}'}" for e in self.endpoints)
            raise RuntimeError(f"sglang: no server holds weights {version} ({states})")
        self._home[group] = min(usable, key=lambda e: e.open_samples)
        return self._home[group]

    async def _watch(self, session: aiohttp.ClientSession, incidents: list[str]) -> None:
        """Finds servers that hang: no part of any open sample for `stall_seconds`, or no answer to /health."""
        every = min(2.0, self.stall_seconds / 4)
        while True:
            await asyncio.sleep(every)
            for endpoint in self.endpoints:
                if not (endpoint.is_usable and endpoint.open_samples):
                    continue
                silent = time.monotonic() - endpoint.last_part
                if silent > self.stall_seconds:
                    endpoint.fail(f"sent nothing for {silent:.0f} s with {endpoint.open_samples} open samples")
                    incidents.append(f"{endpoint.client.url} left out: {endpoint.problem}")
