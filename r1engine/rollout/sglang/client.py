"""One SGLang server's HTTP interface (sglang 0.5.23): control calls, and generation as a stream of tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp


class ServerError(RuntimeError):
    """A server that does not answer, answers with an error, or answers something that is no answer."""


@dataclass
class Drawn:
    """What one request has brought so far."""

    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finish: str | None = None  # "stop", "length" or "abort"
    versions: list[str] = field(default_factory=list)  # of the weights, in the order of their use
    experts: str | None = None  # the server's `routed_experts`, which come with the last part


class Client:
    """Calls of one server. A session belongs to one event loop, so each run of a loop opens its own."""

    def __init__(self, url: str, *, stall_seconds: float) -> None:
        """
        Args:
            url:           http://host:port.
            stall_seconds: an answer to a control call may take this long.
        """
        self.url = url.rstrip("/")
        self.stall_seconds = stall_seconds

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
            async with session.request(method, self.url + path, json=body, timeout=timeout) as response:
                text = await response.text(errors="replace")
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise ServerError(f"{self.url}{path}: no answer ({type(error).__name__}: {error})") from error
        if response.status != 200:
            raise ServerError(f"{self.url}{path}: status {response.status}: {text[:300]}")
        try:
            answer = json.loads(text) if text.strip().startswith(("{", "[")) else {}
        except json.JSONDecodeError as error:
            raise ServerError(f"{self.url}{path}: not JSON: {text[:300]}") from error
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerError(f"{self.url}{path}: {answer.get('message') or answer.get('error_message')}"[:500])
        return answer

    async def generate(self, session: aiohttp.ClientSession, body: dict[str, Any], drawn: Drawn) -> AsyncIterator[int]:
        """Streams one sample into `drawn`, which keeps what came even when the stream breaks.

        Yields:
            The number of tokens of each part.

        Raises:
            ServerError: as `post`; or the stream breaks, or what it sends is not what was asked for.
        """
        # No limit on silence here: a sample may wait its turn for minutes behind others. Whether the server as a whole
        # stands still is the router's to see.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.stall_seconds, sock_read=None)
        try:
            async with session.post(self.url + "/generate", json=body, timeout=timeout) as response:
                if response.status != 200:
                    raise ServerError(f"{self.url}/generate: status {response.status}: {(await response.text())[:300]}")
                while line := await response.content.readline():
                    if not line.startswith(b"data:"):
                        continue
                    payload = line[5:].strip()
                    if payload == b"[DONE]":
                        break
                    yield self._take(json.loads(payload), drawn)
        except (aiohttp.ClientError, TimeoutError, ConnectionError, ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self.url}/generate: {type(error).__name__}: {error}") from error
        if drawn.finish is None:
            raise ServerError(f"{self.url}/generate: the stream ended before the sample did")

    def _take(self, part: dict[str, Any], drawn: Drawn) -> int:
        """Add one part, which holds what is new since the last (incremental streaming)."""
        if "error" in part:
            raise ServerError(f"{self.url}/generate: {part['error']}")
        meta = part["meta_info"]
        tokens = part["output_ids"]
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
            drawn.finish = meta["finish_reason"]["type"]
            if drawn.finish == "abort":
                raise ServerError(f"{self.url}/generate: aborted: {meta['finish_reason'].get('message')}")
        return len(tokens)
