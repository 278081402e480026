"""Draws replies from an OpenAI-compatible server: streamed, bounded, tried again. Standard library only.

A reply is read in parts as it is written, so that a server that hangs is noticed, and one that never ends is cut.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from r1engine.config.evaluation import EndpointSettings, Suite
from r1engine.evaluation.entries import Ask
from r1engine.evaluation.lines import SampleLine
from r1engine.evaluation.samplers import OnReply, Shown, Shows, too_long

BYTES_PER_TOKEN = 2048  # of a stream, with the JSON around the text
ROOM_BYTES = 2**20
FAILURES = 3  # replies in a row that fail after all tries: nobody is there
PAUSE_SECONDS = 0.5  # before the second try; doubles with each


class ReplyFailed(Exception):
    """No usable reply; the message says why in a line."""

    def __init__(self, message: str, *, is_refusal: bool = False) -> None:
        super().__init__(message)
        self.is_refusal = is_refusal  # it is about this request: another one may be answered


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
        """Takes a part of a stream, or a whole reply; returns the parts of text that came."""
        if isinstance(model := part.get("model"), str) and model:
            self.models.add(model)
        if isinstance(usage := part.get("usage"), dict):
            self.tokens, self.prompt_tokens = usage.get("completion_tokens"), usage.get("prompt_tokens")
        if part.get("error"):
            raise ReplyFailed(f"the server says {json.dumps(part['error'])[:200]}")
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
        self._lock, self._failed_in_row, self._models = threading.Lock(), 0, set[str]()
        self._problem: Exception | None = None

    def models(self) -> list[str]:
        """The names that the server lists; none if it has no list.

        Raises:
            RuntimeError: nobody answers.
        """
        try:
            found = next(iter(self._parts("GET", "/models", None, 2**20, 30.0)))
        except ReplyFailed as error:
            if error.is_refusal:
                return []
            raise RuntimeError(f"{self.url}: {error}") from error
        return sorted(str(model.get("id")) for model in found.get("data") or [] if isinstance(model, dict))

    def draw(self, asks: Sequence[Ask], on_reply: OnReply, on_tokens: Callable[[int], None]) -> None:
        """See `Sampler.draw`. A reply that the server refuses is handed over with its error."""
        waiting: queue.SimpleQueue[tuple[Ask, Shown | None]] = queue.SimpleQueue()
        for ask, shown in zip(asks, self._shows.all(asks) if self._shows else [None] * len(asks), strict=True):
            waiting.put((ask, shown))

        def work() -> None:
            while self._problem is None:
                try:
                    ask, shown = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    line = self._reply(ask, shown, on_tokens)
                    with self._lock:
                        on_reply(ask, line)
                except Exception as error:  # the caller gets the first
                    with self._lock:
                        self._problem = self._problem or error

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self._settings.parallel, len(asks)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._problem is not None:
            raise self._problem

    def close(self) -> None:
        """Nothing to stop."""

    # ------------------------------------------------------------------ one reply

    def _reply(self, ask: Ask, shown: Shown | None, on_tokens: Callable[[int], None]) -> SampleLine:
        started, problem = time.monotonic(), ""
        body, limit = self._body(ask, shown)
        if limit < 1:
            assert shown is not None
            return too_long(ask, shown)
        for attempt in range(self._settings.tries):
            if attempt:
                time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                found = self._streamed(body, limit, on_tokens)
            except ReplyFailed as error:
                problem = str(error)
                if error.is_refusal:
                    break
                continue
            self._check_model(found.models)
            self._failed_in_row = 0
            return self._line(ask, shown, found, time.monotonic() - started)
        else:
            self._note_failure(problem)
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

    def _streamed(self, body: dict[str, Any], limit: int, on_tokens: Callable[[int], None]) -> Streamed:
        path = "/completions" if "prompt" in body else "/chat/completions"
        found = Streamed()
        most = ROOM_BYTES + BYTES_PER_TOKEN * limit
        for part in self._parts("POST", path, body, most, self._settings.timeout_seconds):
            on_tokens(found.add(part))
        if found.finish not in ("stop", "length"):
            why = f"it ends by {found.finish!r}" if found.finish else "it breaks off"
            raise ReplyFailed(f"the reply is of no use: {why}", is_refusal=bool(found.finish))
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
        with self._lock:
            self._models |= models
            if len(self._models) > 1:
                names = " and ".join(sorted(self._models))
                raise RuntimeError(f"{self.url}: the server's model has changed: replies are of {names}, required one")

    def _note_failure(self, problem: str) -> None:
        with self._lock:
            self._failed_in_row += 1
            if self._failed_in_row >= FAILURES and self._problem is None:
                self._problem = RuntimeError(f"{self.url}: no answer after {self._settings.tries} tries ({problem})")

    # ------------------------------------------------------------------ HTTP

    def _parts(self, method: str, path: str, body: dict[str, Any] | None, most: int, seconds: float) -> Iterator[Any]:
        """The JSON objects of a reply: of a stream each event, else the one."""
        url = urlsplit(self.url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname or "", url.port, timeout=min(self._settings.stall_seconds, seconds))
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if self._settings.key_variable:
            headers["Authorization"] = f"Bearer {os.environ[self._settings.key_variable]}"
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, url.path + path, data, headers)
            reply = connection.getresponse()
            if reply.status != 200:
                said = reply.read(300).decode("utf-8", "replace").replace("\n", " ")
                is_refusal = 400 <= reply.status < 500 and reply.status not in (408, 429)
                raise ReplyFailed(f"HTTP {reply.status} {said}".strip(), is_refusal=is_refusal)
            yield from _objects(reply, most, time.monotonic() + seconds)
        except (OSError, http.client.HTTPException) as error:
            raise ReplyFailed(str(error) or type(error).__name__) from None
        finally:
            connection.close()


def _objects(reply: http.client.HTTPResponse, most: int, deadline: float) -> Iterator[Any]:
    """What a reply holds, event by event; ReplyFailed where it is too long, too slow or no JSON."""
    is_stream = "event-stream" in reply.headers.get("Content-Type", "")
    pending, total = b"", 0
    while block := reply.read1(65_536):
        total += len(block)
        if total > most:
            raise ReplyFailed(f"the reply has more than {most:,} bytes")
        if time.monotonic() > deadline:
            raise ReplyFailed("the reply takes longer than endpoint.timeout_seconds")
        pending += block
        while is_stream and b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            if not line.startswith(b"data:"):
                continue
            event = line.removeprefix(b"data:").strip()
            if event == b"[DONE]":
                return
            yield _parsed(event)
    if not is_stream:
        yield _parsed(pending)


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ReplyFailed(f"found {text[:40]!r}, required JSON") from None
    if not isinstance(found, dict):
        raise ReplyFailed(f"found {text[:40]!r}, required a JSON object")
    return found
