"""Replies of language models behind OpenAI-compatible endpoints, kept in a file that a killed stage goes on from.

A half last line, which a kill leaves, is cut off at the start.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from functools import cache
from pathlib import Path
from typing import Any

from r1engine.config.rewards import ChatServer
from r1engine.rewards.from_config import servers_of
from r1engine.rewards.servers.endpoint import ModelServersError

NO_REPLY = 8  # rows in a row without a reply end a stage: the servers are gone


class Replies:
    """Answered requests, in a file that grows by whole lines; usable from any thread."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: a line that is not the last is broken.
        """
        self.path, self._places, self._lock = path, dict[str, tuple[int, int]](), threading.Lock()
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by `close`)
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                key = json.loads(line)["key"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: no reply stands there: {error}; remove the line") from error
            self._places[key] = (end, len(line))
            end += len(line)
        self._file.truncate(end)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> str | None:
        """The reply under a key."""
        with self._lock:
            if (place := self._places.get(key)) is None:
                return None
            return json.loads(os.pread(self._file.fileno(), place[1], place[0]))["reply"]

    def add(self, key: str, reply: str, about: dict[str, str]) -> None:
        """Write a reply; it is on the disk when this returns."""
        line = (json.dumps({"key": key, **about, "reply": reply}) + "\n").encode()
        with self._lock:
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._places[key] = (place, len(line))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class KeptChat:
    """A language model that is asked once: what it has replied is read from the file; usable from any thread."""

    def __init__(self, server: ChatServer, replies: Replies) -> None:
        """
        Raises:
            ValueError: a URL is none, or an API key is not set.
        """
        self._server, self._servers, self._replies = server, servers_of(server), replies

    def ask(self, messages: list[dict[str, str]], asked: list[Any], about: dict[str, str]) -> dict[str, Any]:
        """What the model replies: content, finish, and the tokens that the server counts.

        Args:
            messages: of the request.
            asked:    what, beside the model and its settings, tells this request from every other.
            about:    what the line in the file says of it.

        Raises:
            ModelServersError: there is no reply, or one without content.
        """
        server = self._server
        told = json.dumps([server.model, server.temperature, server.max_tokens, *asked])
        key = hashlib.sha256(told.encode()).hexdigest()
        reply = self._replies.get(key)
        if reply is None:
            reply = self._post(messages)
            self._replies.add(key, reply, about | {"model": server.model})
        found: dict[str, Any] = json.loads(reply)
        return found

    def _post(self, messages: list[dict[str, str]]) -> str:
        body = {
            "model": self._server.model,
            "messages": messages,
            "temperature": self._server.temperature,
            "max_tokens": self._server.max_tokens,
        }
        reply = self._servers.post("/chat/completions", body)
        try:
            choice = reply["choices"][0]
            content, finish = choice["message"]["content"], choice.get("finish_reason")
            tokens = (reply.get("usage") or {}).get("total_tokens")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ModelServersError("the reply has no choices[0].message.content", is_refusal=True) from error
        return json.dumps({"content": str(content or ""), "finish": finish, "tokens": tokens})


@cache
def prompt_text(name: str) -> str:
    """A prompt as it is shipped, with the places that are to be filled in."""
    return (Path(__file__).parent / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
