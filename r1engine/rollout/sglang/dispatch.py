"""Samples over several servers: the least loaded takes the next group; what a failing one drew goes on elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import aiohttp

from r1engine.hf.architecture import Architecture
from r1engine.ranks import World
from r1engine.rollout.draft import Draft
from r1engine.rollout.sglang.client import Client, Drawn, ServerError
from r1engine.rollout.sglang.routed_experts import decode_experts, encoded_bytes

MOST_ATTEMPTS = 6  # of one sample, before the run stops
STRIKES = 3  # failures in a row after which a server that still answers is left out
PART_BYTES = 2**20  # a part of an answer is no larger than this,
TOKEN_BYTES = 512  # and so much a token, besides the experts
POLL_SECONDS = 0.05  # how often a run asks whether it should stop


@dataclass
class Endpoint:
    """A server as the router sees it."""

    client: Client
    version: int | None = None  # of the weights that it is known to hold; None: unknown
    is_usable: bool = True
    problem: str = ""  # why it is not usable
    open_samples: int = 0
    strikes: int = 0
    starts: int = 1  # of the server under this URL, as it is announced
    receivers: list[Client] = field(default_factory=list)  # one beside each of its ranks (route: receivers)
    failures: int = 0  # it is not the same server as before, where this has grown
    last_part: float = 0.0  # when a part of any of its samples came (monotonic seconds)
    tasks: set[asyncio.Task] = field(default_factory=set)
    long_lines: asyncio.Lock = field(default_factory=asyncio.Lock)  # whose long line is read, see web.py

    def fail(self, problem: str) -> None:
        """Leave the server out and break off its open samples."""
        self.is_usable, self.problem, self.version = False, problem, None
        self.failures += 1
        for task in self.tasks:
            task.cancel()


def agree(endpoints: list[Endpoint], world: World) -> None:
    """A server that any rank saw fail is left out by all; the first rank's knowledge of versions is everybody's."""
    if world.size == 1:
        return
    states = world.everyones([(e.is_usable, e.problem, e.version) for e in endpoints])
    for endpoint, seen in zip(endpoints, zip(*states, strict=True), strict=True):
        failed = next((state for state in seen if not state[0]), None)
        endpoint.is_usable, endpoint.version = True, seen[0][2]
        if failed is not None:
            endpoint.fail(failed[1])


class _Calls(NamedTuple):
    """Who is told what while drafts are drawn."""

    on_tokens: Callable[[int], None]  # the number of tokens of each part
    on_ended: Callable[[Draft], None]


class Dispatcher:
    """Draws drafts from the endpoints that hold the current weights."""

    def __init__(
        self, endpoints: list[Endpoint], *, vocab_size: int, stall_seconds: float, replays: Architecture | None = None
    ) -> None:
        """
        Args:
            endpoints:     the servers; state is kept in them between runs.
            vocab_size:    tokens outside it are no answer.
            stall_seconds: a server with open samples that sends nothing for so long has failed.
            replays:       the model, if the servers shall tell the experts that they choose.
        """
        self.endpoints, self.vocab_size, self.stall_seconds = endpoints, vocab_size, stall_seconds
        self._replays = replays
        self._home: dict[int, Endpoint] = {}

    def run(
        self,
        drafts: list[Draft],
        sampling: dict[str, Any],
        *,
        version: int,
        on_tokens: Callable[[int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        on_ended: Callable[[Draft], None] | None = None,
    ) -> list[str]:
        """Draw every draft on, to its end or until `should_stop`; what has come by then stays.

        Args:
            drafts:      filled in place.
            sampling:    SGLang's sampling_params, without max_new_tokens.
            version:     of the weights that every new token must come from.
            on_tokens:   called with the number of tokens of each part.
            should_stop: asked every POLL_SECONDS.
            on_ended:    called with each draft as it ends.

        Returns:
            What went wrong on the way and was mended, for the log.

        Raises:
            RuntimeError: no server with these weights is left, or a sample failed MOST_ATTEMPTS times.
        """
        calls = _Calls(on_tokens or (lambda _: None), on_ended or (lambda _: None))
        return asyncio.run(self._run(drafts, sampling, version, calls, should_stop))

    async def _run(
        self, drafts: list[Draft], sampling: dict, version: int, calls: _Calls, should_stop: Any
    ) -> list[str]:
        self._home.clear()
        incidents: list[str] = []
        for endpoint in self.endpoints:
            endpoint.open_samples, endpoint.tasks, endpoint.last_part = 0, set(), time.monotonic()
            endpoint.long_lines = asyncio.Lock()  # of this loop
        # A new connection each: a server closes idle ones when it likes, and three such races would look like failures.
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
            watch = asyncio.create_task(self._watch(session, incidents))
            drawing = [
                asyncio.create_task(self._draw(session, draft, sampling, version, calls, incidents))
                for draft in drafts
                if not draft.finish
            ]
            try:
                await _gather_until(drawing, should_stop)
            finally:
                for task in (watch, *drawing):
                    task.cancel()
                await asyncio.gather(watch, *drawing, return_exceptions=True)
        return incidents

    async def _draw(
        self,
        session: aiohttp.ClientSession,
        draft: Draft,
        sampling: dict,
        version: int,
        calls: _Calls,
        incidents: list[str],
    ) -> None:
        attempts = 0
        while not draft.finish:
            endpoint = self._pick(draft.prompt.id, version)
            # What a failed server drew stays: drawing again from nothing would favour short completions.
            rid = uuid.uuid4().hex
            body: dict[str, Any] = {
                "rid": rid,
                "input_ids": draft.prompt.tokens + draft.tokens,
                "sampling_params": sampling | {"max_new_tokens": draft.max_tokens - len(draft.tokens)},
                "return_logprob": True,
                "stream": True,
            }
            if self._replays is not None:
                body["return_routed_experts"] = True
            task = asyncio.create_task(self._stream(session, endpoint, body, draft, version, calls.on_tokens))
            endpoint.tasks.add(task)
            if not endpoint.open_samples:
                endpoint.last_part = time.monotonic()  # it has been idle, which is no silence
            endpoint.open_samples += 1
            try:
                await task
                endpoint.strikes = 0
            except (ServerError, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and endpoint.is_usable:
                    await self._abort(session, endpoint, rid)
                    raise  # this run is being given up, not the server
                attempts += 1
                self._note_failure(endpoint, attempts, error, incidents)
                # Only the end of the stream was lost; the experts with it, which the trainer then chooses itself.
                draft.finish = _end_of(draft, sampling)
                if draft.finish and self._replays is not None:
                    lost = f"{endpoint.client.url}: the experts of a sample are lost ({endpoint.problem or error})"
                    incidents.append(lost)
            finally:
                endpoint.tasks.discard(task)
                endpoint.open_samples -= 1
        calls.on_ended(draft)

    async def _abort(self, session: aiohttp.ClientSession, endpoint: Endpoint, rid: str) -> None:
        """Tell a server that nobody waits for this sample any more."""
        with contextlib.suppress(ServerError):  # if it cannot be told, the next run or refresh finds out why
            await endpoint.client.call(session, "POST", "/abort_request", {"rid": rid})

    def _note_failure(self, endpoint: Endpoint, attempts: int, error: BaseException, incidents: list[str]) -> None:
        endpoint.strikes += 1
        reason = endpoint.problem if isinstance(error, asyncio.CancelledError) else str(error)
        if endpoint.is_usable and endpoint.strikes >= STRIKES:
            endpoint.fail(f"{STRIKES} failures in a row, the last: {reason}")
            incidents.append(f"{endpoint.client.url} left out: {endpoint.problem}")
        if attempts >= MOST_ATTEMPTS:
            raise RuntimeError(f"sglang: a sample failed {attempts} times, the last time: {reason}")

    async def _stream(
        self, session: aiohttp.ClientSession, endpoint: Endpoint, body: dict, draft: Draft, version: int, on_tokens: Any
    ) -> None:
        """One request; only parts that are whole, sane and of the right weights enter the draft."""
        fresh = Drawn()
        most_bytes = self._most_bytes(len(draft.prompt.tokens) + draft.max_tokens)
        parts = endpoint.client.generate(session, body, fresh, most_bytes=most_bytes, long_lines=endpoint.long_lines)
        async with contextlib.aclosing(parts):
            async for count in parts:
                endpoint.last_part = time.monotonic()
                if fresh.versions and fresh.versions != [str(version)]:
                    endpoint.fail(f"drew from weights {fresh.versions}, required {version}")
                    raise ServerError(f"{endpoint.client.url}: {endpoint.problem}")
                new_tokens, new_logp = fresh.tokens[-count:] if count else [], fresh.logp[-count:] if count else []
                self._check(endpoint, new_tokens, new_logp)
                draft.add(new_tokens, new_logp, version)
                if fresh.finish is not None:  # in the part of the last token: an interruption never comes between
                    if self._replays is not None:
                        num_tokens = len(draft.prompt.tokens) + len(draft.tokens)
                        draft.experts = decode_experts(fresh.experts, self._replays, num_tokens, endpoint.client.url)
                    draft.finish = fresh.finish
                on_tokens(count)

    def _most_bytes(self, num_tokens: int) -> int:
        """Of a part of an answer: it may bring all tokens of a sequence at once, and their experts."""
        experts = encoded_bytes(self._replays, num_tokens) if self._replays is not None else 0
        return PART_BYTES + TOKEN_BYTES * num_tokens + experts

    def _check(self, endpoint: Endpoint, tokens: list[int], logp: list[float]) -> None:
        for token, value in zip(tokens, logp, strict=True):
            if not (0 <= token < self.vocab_size and math.isfinite(value) and value <= 1e-4):
                raise ServerError(f"{endpoint.client.url}: token {token} with log-probability {value} is no answer")

    def _pick(self, group: int, version: int) -> Endpoint:
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


def _end_of(draft: Draft, sampling: dict) -> Literal["", "stop", "length"]:
    """How a sample ended whose tokens are all there; "" if they are not."""
    if draft.tokens and draft.tokens[-1] in sampling.get("stop_token_ids", ()):
        return "stop"
    return "length" if len(draft.tokens) >= draft.max_tokens else ""


async def _gather_until(tasks: list[asyncio.Task], should_stop: Callable[[], bool] | None) -> None:
    """Waits for all tasks, or until `should_stop`; raises what a task raised."""
    waiting = set(tasks)
    while waiting and not (should_stop is not None and should_stop()):
        timeout = None if should_stop is None else POLL_SECONDS
        done, waiting = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
