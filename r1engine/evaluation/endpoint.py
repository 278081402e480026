"""Draws replies from an OpenAI-compatible server: streamed, bounded, tried again.

A reply is read in parts as it is written, so that a server that hangs is noticed, and one that never ends is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from r1engine.config.evaluation import EndpointSettings, Suite
from r1engine.evaluation.entries import Ask
from r1engine.evaluation.lines import SampleLine
from r1engine.evaluation.samplers import OnReply, Shown, Shows, too_long
from r1engine.web import NoReply, all_of, lines, opened, parsed, request

BYTES_PER_TOKEN = 2048  # of a stream, with the JSON around the text
ROOM_BYTES = 2**20
FAILURES = 3  # replies in a row that fail after all tries: nobody is there
REFUSE_ALL = (401, 403, 404)  # statuses of a wrong key, model or path: the next request fares no better
PAUSE_SECONDS = 0.5  # before the second try; doubles with each


@dataclass
class Streamed:
    """A reply as far as it has come."""

    thoughts: str = ""
    text: str = ""
    finish: str = ""
    tokens: int | None = None
    prompt_tokens: int | None = None
    models: set[str] = field(default_factory=set)

    def add(self, part: dict[str, Any]) -> int:
        """Takes a part of a stream, or a whole reply; returns the parts of text that came.

        Raises:
            NoReply: the server tells of an error, or the part has another form than OpenAI's.
        """
        if part.get("error"):
            raise NoReply(f"the server says {json.dumps(part['error'])[:200]}")
        try:
            return self._add(part)
        except (AttributeError, TypeError):
            raise NoReply(f"the server sent {json.dumps(part)[:200]}, required choices with content") from None

    def _add(self, part: dict[str, Any]) -> int:
        if isinstance(model := part.get("model"), str) and model:
            self.models.add(model)
        if isinstance(usage := part.get("usage"), dict):
            self.tokens, self.prompt_tokens = _count(usage, "completion_tokens"), _count(usage, "prompt_tokens")
        count = 0
        for choice in part.get("choices") or []:
            said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            thoughts, text = said.get("reasoning_content") or said.get("reasoning") or "", said.get("content") or ""
            self.thoughts, self.text, count = self.thoughts + thoughts, self.text + text, count + bool(thoughts or text)
            self.finish = choice.get("finish_reason") or self.finish
        return count

    @property
    def whole(self) -> str:
        """Thoughts that the server took apart stand in their tags again."""
        if not self.thoughts:
            return self.text
        is_open = not self.text and self.finish == "length"
        return f"<think>\n{self.thoughts}" + ("" if is_open else f"\n</think>\n\n{self.text}")


class EndpointSampler:
    """Asks a server for each reply, `parallel` at once."""

    def __init__(self, url: str, suite: Suite, shows: Shows | None, *, context: int | None = None) -> None:
        """
        Args:
            url:     of the server, up to /v1.
            suite:   sampling and section `endpoint`.
            shows:   writes prompts as token ids (mode tokens); None: the server's own chat template.
            context: tokens of prompt and reply; None: the server knows.

        Raises:
            ValueError: the variable of the key is not set.
        """
        self.url, self._suite, self._shows, self._context = url.rstrip("/"), suite, shows, context
        self._settings: EndpointSettings = suite.endpoint
        if self._settings.key_variable and not os.environ.get(self._settings.key_variable):
            raise ValueError(f"endpoint: the environment variable {self._settings.key_variable} is not set")
        self._key = os.environ[self._settings.key_variable] if self._settings.key_variable else ""
        self._failed_in_row, self._models = 0, set[str]()
        self._problem: Exception | None = None

    def models(self) -> list[str]:
        """The names that the server lists; none if it has no list.

        Raises:
            RuntimeError: nobody answers.
        """
        try:
            found = _object(request("GET", self.url + "/models", key=self._key, seconds=30.0))
        except NoReply as error:
            if error.is_refusal:
                return []
            raise RuntimeError(f"{self.url}: {error}") from error
        return sorted(str(model.get("id")) for model in found.get("data") or [] if isinstance(model, dict))

    def draw(self, asks: Sequence[Ask], on_reply: OnReply, on_tokens: Callable[[int], None]) -> None:
        """See `Sampler.draw`. A reply that the server refuses is handed over with its error."""
        shown = self._shows.all(asks) if self._shows else [None] * len(asks)
        asyncio.run(self._draw(list(zip(asks, shown, strict=True)), on_reply, on_tokens))
        if self._problem is not None:
            raise self._problem

    async def _draw(
        self, asks: list[tuple[Ask, Shown | None]], on_reply: OnReply, on_tokens: Callable[[int], None]
    ) -> None:
        waiting = iter(asks)

        async def work(session: aiohttp.ClientSession) -> None:
            for ask, shown in waiting:  # of all workers
                try:
                    on_reply(ask, await self._reply(session, ask, shown, on_tokens))
                except Exception as error:  # the caller gets the first, after the replies that are under way
                    self._problem = self._problem or error
                if self._problem is not None:
                    return

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
            await asyncio.gather(*(work(session) for _ in range(min(self._settings.parallel, len(asks)))))

    def close(self) -> None:
        """Nothing to stop."""

    # ------------------------------------------------------------------ one reply

    async def _reply(
        self, session: aiohttp.ClientSession, ask: Ask, shown: Shown | None, on_tokens: Callable[[int], None]
    ) -> SampleLine:
        started, problem = time.monotonic(), ""
        body, limit = self._body(ask, shown)
        if limit < 1:
            assert shown is not None
            return too_long(ask, shown)
        for attempt in range(self._settings.tries):
            if attempt:
                await asyncio.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                found = await self._streamed(session, body, limit, on_tokens)
            except NoReply as error:
                problem = str(error)
                if not error.is_refusal:
                    continue
                if error.status in REFUSE_ALL:
                    self._note_failure(f"no answer ({problem})")
                break
            self._check_model(found.models)
            self._failed_in_row = 0
            return self._line(ask, shown, found, time.monotonic() - started)
        else:
            self._note_failure(f"no answer after {self._settings.tries} tries ({problem})")
        return SampleLine(ask.item.id, ask.sample, "", None, "error", None, ask.seed, 0.0, problem[:300])

    def _body(self, ask: Ask, shown: Shown | None) -> tuple[dict[str, Any], int]:
        suite, limit = self._suite, self._suite.max_tokens
        if shown is not None and self._context is not None:
            limit = min(limit, self._context - len(shown.tokens))
        body: dict[str, Any] = {
            "model": self._settings.model,
            "temperature": suite.temperature,
            "top_p": suite.top_p,
            "max_tokens": limit,
            "n": 1,
            "seed": ask.seed % 2**31,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if shown is not None:
            return body | {"prompt": shown.tokens}, limit
        system = [{"role": "system", "content": suite.system}] if suite.system else []
        return body | {"messages": [*system, {"role": "user", "content": ask.text}]}, limit

    async def _streamed(
        self, session: aiohttp.ClientSession, body: dict[str, Any], limit: int, on_tokens: Callable[[int], None]
    ) -> Streamed:
        path = "/completions" if "prompt" in body else "/chat/completions"
        stall, found = self._settings.stall_seconds, Streamed()
        most = ROOM_BYTES + BYTES_PER_TOKEN * limit
        timeout = aiohttp.ClientTimeout(total=self._settings.timeout_seconds, sock_connect=stall, sock_read=stall)
        async with (
            opened(session, "POST", self.url + path, body, key=self._key, timeout=timeout) as response,
            contextlib.aclosing(_events(response, most)) as events,
        ):
            async for event in events:
                on_tokens(found.add(event))
        if found.finish not in ("stop", "length"):
            why = f"it ends by {found.finish!r}" if found.finish else "it breaks off"
            raise NoReply(f"the reply is of no use: {why}", status=200 if found.finish else None)
        return found

    def _line(self, ask: Ask, shown: Shown | None, found: Streamed, seconds: float) -> SampleLine:
        text, error = found.whole, ""
        if not text and found.finish == "stop":
            error = "the server's reply is empty"
        return SampleLine(
            ask.item.id,
            ask.sample,
            (shown.opened if shown else "") + text,
            found.tokens,
            "stop" if found.finish == "stop" else "length",
            found.prompt_tokens if shown is None else len(shown.tokens),
            ask.seed,
            round(seconds, 3),
            error,
        )

    def _check_model(self, models: set[str]) -> None:
        self._models |= models
        if len(self._models) > 1:
            names = " and ".join(sorted(self._models))
            raise RuntimeError(f"{self.url}: the server's model has changed: replies are of {names}, required one")

    def _note_failure(self, problem: str) -> None:
        self._failed_in_row += 1
        if self._failed_in_row >= FAILURES and self._problem is None:
            self._problem = RuntimeError(f"{self.url}: {problem}")


def _count(usage: dict[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


async def _events(response: aiohttp.ClientResponse, most_bytes: int) -> AsyncGenerator[dict[str, Any], None]:
    """The JSON objects of a reply: of a stream each event, else the one; NoReply where it is too long or none."""
    if response.content_type != "text/event-stream":
        yield _object(await all_of(response.content, most_bytes))
        return
    total = 0
    async with contextlib.aclosing(lines(response.content, most_bytes, asyncio.Lock())) as found:
        async for line in found:
            total += len(line or b"")
            if total > most_bytes:
                raise NoReply(f"the reply has more than {most_bytes:,} bytes")
            if line is None or not line.startswith(b"data:"):
                continue
            event = line.removeprefix(b"data:").strip()
            if event == b"[DONE]":
                return
            yield _object(event)


def _object(text: bytes | bytearray) -> dict[str, Any]:
    found = parsed(text)
    if not isinstance(found, dict):
        raise NoReply(f"found {bytes(text[:40])!r}, required a JSON object")
    return found
