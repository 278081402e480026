"""One SGLang server's HTTP interface (sglang 0.5.23): control calls, and generation as a stream of tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

LONG_LINE = 2**20  # bytes; only the last part of a sample with its experts is longer


class ServerError(RuntimeError):
    """A server that does not answer, answers with an error, or answers something that is no answer."""


@dataclass
class Drawn:
    """What one request has brought so far."""

    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    versions: list[str] = field(default_factory=list)  # of the weights, in the order of their use
    experts: str | None = None  # the server's `routed_experts`, which come with the last part


class Client:
    """Calls of one server. A session belongs to one event loop, so each run of a loop opens its own."""

    def __init__(self, url: str, *, stall_seconds: float, key: str = "") -> None:
        """
        Args:
            url:           http://host:port.
            stall_seconds: an answer to a control call may take this long.
            key:           that the server asks for; "": it asks for none.
        """
        self.url = url.rstrip("/")
        self.stall_seconds = stall_seconds
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def post(self, path: str, body: dict[str, Any] | None = None, *, seconds: float | None = None) -> dict[str, Any]:
        """The JSON answer of a control call.

        Raises:
            ServerError: no answer within `seconds`, another status than 200, or `success` is false.
        """
        return asyncio.run(self._once("POST", path, body or {}, seconds))

    def get(self, path: str, *, seconds: float | None = None) -> dict[str, Any]:
        """As `post`, without a body."""
        return asyncio.run(self._once("GET", path, None, seconds))

    async def _once(self, method: str, path: str, body: dict | None, seconds: float | None) -> dict[str, Any]:
        async with aiohttp.ClientSession() as session:
            return await self.call(session, method, path, body, seconds)

    async def call(
        self, session: aiohttp.ClientSession, method: str, path: str, body: dict | None, seconds: float | None = None
    ) -> dict[str, Any]:
        """One call in a running loop; raises as `post`."""
        timeout = aiohttp.ClientTimeout(total=seconds or self.stall_seconds)
        try:
            async with session.request(
                method, self.url + path, json=body, timeout=timeout, headers=self._headers
            ) as response:
                text = await response.text(errors="replace")
        except Exception as error:  # whatever it is, it comes from this server
            raise ServerError(f"{self.url}{path}: no answer ({type(error).__name__}: {error})") from error
        if response.status != 200:
            hint = " (rollout.sglang.key_variable names the variable with its key)" if response.status == 401 else ""
            raise ServerError(f"{self.url}{path}: status {response.status}{hint}: {text[:300]}")
        try:
            answer = json.loads(text) if text.strip().startswith(("{", "[")) else {}
        except (ValueError, RecursionError) as error:
            raise ServerError(f"{self.url}{path}: not JSON: {text[:300]}") from error
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerError(f"{self.url}{path}: {answer.get('message') or answer.get('error_message')}"[:500])
        return answer

    async def generate(
        self,
        session: aiohttp.ClientSession,
        body: dict[str, Any],
        drawn: Drawn,
        *,
        most_bytes: int,
        long_lines: asyncio.Lock,
    ) -> AsyncGenerator[int, None]:
        """Streams one sample into `drawn`, which keeps what came even when the stream breaks.

        Args:
            session:    of the running loop.
            body:       of the request.
            drawn:      filled in place.
            most_bytes: of one part; more is no answer.
            long_lines: see `_lines`.

        Yields:
            The number of tokens of each part; 0 while a long part is on its way.

        Raises:
            ServerError: as `post`; or the stream breaks, or what it sends is not what was asked for.
        """
        # No limit on silence here: a sample may wait its turn for minutes behind others. Whether the server as a whole
        # stands still is the router's to see.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.stall_seconds, sock_read=None)
        try:
            async with session.post(
                self.url + "/generate", json=body, timeout=timeout, headers=self._headers
            ) as response:
                if response.status != 200:
                    text = (await response.content.read(300)).decode(errors="replace")
                    raise ServerError(f"{self.url}/generate: status {response.status}: {text}")
                async with contextlib.aclosing(_lines(response.content, most_bytes, long_lines)) as lines:
                    async for line in lines:
                        if line is None:
                            yield 0
                        elif line.strip() == b"data: [DONE]":
                            break
                        elif line.startswith(b"data:"):
                            yield self._take(json.loads(line[5:]), drawn)
        except ServerError:
            raise
        except Exception as error:  # whatever it is, it comes from this server's answer
            raise ServerError(f"{self.url}/generate: {type(error).__name__}: {error}") from error
        if drawn.finish is None:
            raise ServerError(f"{self.url}/generate: the stream ended before the sample did")

    def _take(self, part: dict[str, Any], drawn: Drawn) -> int:
        """Add one part, which holds what is new since the last (incremental streaming)."""
        if "error" in part:
            raise ServerError(f"{self.url}/generate: {part['error']}")
        meta = part["meta_info"]
        tokens = part["output_ids"]
        if not all(type(token) is int for token in tokens):
            raise ServerError(f"{self.url}/generate: output_ids are {tokens!r:.80}, required are whole numbers")
        logp = [float(entry[0]) for entry in meta.get("output_token_logprobs") or []]
        if len(logp) != len(tokens):
            raise ServerError(f"{self.url}/generate: {len(tokens)} tokens with {len(logp)} log-probabilities")
        drawn.tokens += tokens
        drawn.logp += logp
        for span in meta.get("weight_versions") or [{"version": meta.get("weight_version")}]:
            if not drawn.versions or drawn.versions[-1] != span["version"]:
                drawn.versions.append(span["version"])
        drawn.experts = meta.get("routed_experts") or drawn.experts
        if meta.get("finish_reason"):
            reason = meta["finish_reason"]
            if reason["type"] not in ("stop", "length"):
                raise ServerError(f"{self.url}/generate: ended by {reason['type']!r:.20}: {reason.get('message')}")
            drawn.finish = reason["type"]
        return len(tokens)


async def _lines(
    content: aiohttp.StreamReader, most_bytes: int, long_lines: asyncio.Lock
) -> AsyncGenerator[bytearray | None, None]:
    """Lines of a stream, of up to `most_bytes` each; None for a piece of a long one.

    aiohttp's own lines end at 512 KiB. A server's long lines come one after the other: who has the lock reads on, the
    others stop reading and so stop their sender. The lock is held until the next line is asked for.
    """
    begun, is_long = bytearray(), False  # the line whose end has not come; whether it has the lock
    try:
        while chunk := await content.readany():
            *ends, rest = chunk.split(b"\n")
            for end in ends:
                begun += end
                yield begun
                begun = bytearray()
                if is_long:
                    long_lines.release()
                    is_long = False
            begun += rest
            if len(begun) > most_bytes:
                raise ValueError(f"a line of more than {most_bytes} bytes")
            if is_long:
                yield None
            elif len(begun) > LONG_LINE:
                await long_lines.acquire()
                is_long = True
    finally:
        if is_long:
            long_lines.release()
