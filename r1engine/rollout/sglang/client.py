"""One SGLang server's HTTP interface (sglang 0.5.23): control calls, and generation as a stream of tokens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from r1engine.web import NoReply, lines, opened, parsed, whole

MOST_CONTROL_BYTES = 2**30  # checksums of every tensor are long


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
            url:           http://host:port, or https, perhaps with a path.
            stall_seconds: an answer to a control call may take this long.
            key:           that the server asks for; "": it asks for none.
        """
        self.url = url.rstrip("/")
        self.stall_seconds = stall_seconds
        self._key = key

    def post(self, path: str, body: dict[str, Any] | None = None, *, seconds: float | None = None) -> dict[str, Any]:
        """The JSON answer of a control call.

        Raises:
            ServerError: no answer within `seconds`, another status than 200, or `success` is false.
        """
        return asyncio.run(self._once("POST", path, body or {}, seconds))

    def get(self, path: str, *, seconds: float | None = None) -> dict[str, Any]:
        """As `post`, without a body."""
        return asyncio.run(self._once("GET", path, None, seconds))

    def answers(self) -> bool:
        """Whether the server is there now and ready."""
        try:
            self.get("/health", seconds=5.0)
        except ServerError:
            return False
        return True

    async def _once(self, method: str, path: str, body: dict | None, seconds: float | None) -> dict[str, Any]:
        async with aiohttp.ClientSession() as session:
            return await self.call(session, method, path, body, seconds)

    async def call(
        self, session: aiohttp.ClientSession, method: str, path: str, body: dict | None, seconds: float | None = None
    ) -> dict[str, Any]:
        """One call in a running loop; raises as `post`."""
        try:
            text = await whole(
                session,
                method,
                self.url + path,
                body,
                key=self._key,
                seconds=seconds or self.stall_seconds,
                most_bytes=MOST_CONTROL_BYTES,
            )
            answer = parsed(text) if text.strip().startswith((b"{", b"[")) else {}
        except NoReply as error:
            said = str(error) if error.status else f"no answer ({error})"
            if error.status == 401:
                said = "HTTP 401 (rollout.sglang.key_variable names the variable with its key)"
            raise ServerError(f"{self.url}{path}: {said}") from error
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
            long_lines: of this server, see `lines`; only the last part of a sample with its experts is long.

        Yields:
            The number of tokens of each part; 0 while a long part is on its way.

        Raises:
            ServerError: as `post`; or the stream breaks, or what it sends is not what was asked for.
        """
        # No limit on silence here: a sample may wait its turn for minutes behind others. Whether the server as a whole
        # stands still is the router's to see.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.stall_seconds, sock_read=None)
        try:
            async with (
                opened(session, "POST", self.url + "/generate", body, key=self._key, timeout=timeout) as response,
                contextlib.aclosing(lines(response.content, most_bytes, long_lines)) as found,
            ):
                async for line in found:
                    if line is None:
                        yield 0
                    elif line.strip() == b"data: [DONE]":
                        break
                    elif line.startswith(b"data:"):
                        yield self._take(parsed(line[5:]), drawn)
        except ServerError:
            raise
        except Exception as error:  # whatever it is, it comes from this server's answer
            kind = "" if isinstance(error, NoReply) else f"{type(error).__name__}: "
            raise ServerError(f"{self.url}/generate: {kind}{error}") from error
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
