"""A fake, at the edge of our code: a real HTTP server on this machine in the place of SGLang, for tests of the graders.

It speaks the two requests that the graders make, /v1/chat/completions and /classify, and no model is behind it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, bytes]


class ModelServer(ThreadingHTTPServer):
    """Answers a request with what `reply(path, body)` gives: (status, bytes), or None to hang up. A GET has no body."""

    daemon_threads = True
    request_queue_size = 64  # many requests begin at once

    def __init__(self, reply: Callable[[str, dict], Reply | None], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.reply, self.seen = reply, []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: dict) -> None:
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        answer = self.server.reply(self.path, body)
        if answer is not None:
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

    def log_message(self, *_: object) -> None:
        pass


def says(word: Any) -> Reply:
    """A chat completion."""
    return 200, json.dumps({"choices": [{"message": {"content": word}}]}).encode()


def shown_texts(body: dict) -> list[str]:
    """The two texts that a request shows the judge, in their order."""
    lines = body["messages"][1]["content"].split("\n")
    return [lines[1], lines[4]]


def fair_judge(_: str, body: dict) -> Reply:
    """An honest judge of fractions."""
    values = []
    for text in shown_texts(body):
        try:
            values.append(Fraction(text))
        except (ValueError, ZeroDivisionError):
            values.append(text)
    return says("SAME" if values[0] == values[1] else "DIFFERENT")


def rates(score: Callable[[str], Any]) -> Callable[[str, dict], Reply]:
    """A reward model that gives each text `score(text)`."""
    return lambda _, body: (200, json.dumps([{"embedding": [score(text)]} for text in body["text"]]).encode())
