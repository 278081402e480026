"""Replies of language models behind OpenAI-compatible endpoints, kept in a file that a killed stage goes on from.

A half last line, which a kill leaves, is cut off at the start.
"""

from __future__ import annotations

import json
import os
import threading
from functools import cache
from pathlib import Path

from r1engine.config.rewards import ChatServer
from r1engine.rewards.servers.endpoint import ModelServers, ModelServersError

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


@cache
def prompt_text(name: str) -> str:
    """A prompt as it is shipped, with the places that are to be filled in."""
    return (Path(__file__).parent / "prompts" / f"{name}.txt").read_text(encoding="utf-8")


def chat(servers: ModelServers, server: ChatServer, messages: list[dict[str, str]]) -> str:
    """What the model replies: JSON with content, finish, and the tokens that the server counts.

    Raises:
        ModelServersError: there is no reply, or one without content.
    """
    body = {
        "model": server.model,
        "messages": messages,
        "temperature": server.temperature,
        "max_tokens": server.max_tokens,
    }
    reply = servers.post("/chat/completions", body)
    try:
        choice = reply["choices"][0]
        content, finish = choice["message"]["content"], choice.get("finish_reason")
        tokens = (reply.get("usage") or {}).get("total_tokens")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelServersError("the reply has no choices[0].message.content", is_refusal=True) from error
    return json.dumps({"content": str(content or ""), "finish": finish, "tokens": tokens})
