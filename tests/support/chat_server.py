"""A stand-in for an OpenAI-compatible server with faults to order. For tests of what a real one does not do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer(ThreadingHTTPServer):
    """Streams the parts that `reply(number, body)` returns: each a text of `content`, or a dict that is a whole event,
    or one of the words "cut", "hang", "half", "status 500", "status 400", "endless". The last part carries `finish`.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply: Callable[[int, dict], list[Any]], *, model: str = "m", finish: str = "stop") -> None:
        super().__init__(("127.0.0.1", 0), _Streaming)
        self.reply, self.model, self.finish = reply, model, finish
        self.seen: list[dict] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Streaming(BaseHTTPRequestHandler):
    server: ChatServer

    def do_GET(self) -> None:
        self._head(200, "application/json")
        self.wfile.write(json.dumps({"data": [{"id": self.server.model}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.seen)
            self.server.seen.append(body)
        parts = self.server.reply(number, body)
        if isinstance(parts[0], str) and parts[0].startswith("status"):
            self._head(int(parts[0].split()[1]), "application/json")
            self.wfile.write(b'{"error": "boom"}')
            return
        if not body.get("stream"):  # whole, as most harnesses ask
            choice = {"index": 0, "message": {"content": "".join(parts)}, "finish_reason": self.server.finish}
            self._head(200, "application/json")
            self.wfile.write(json.dumps({"model": self.server.model, "choices": [choice]}).encode())
            return
        self._head(200, "text/event-stream")
        try:
            for part in parts:
                if not self._part(part):
                    return
            self._event({"choices": [{"delta": {}, "finish_reason": self.server.finish}]})
            if not any(isinstance(part, dict) and "usage" in part for part in parts):
                self._event({"choices": [], "usage": {"completion_tokens": len(parts), "prompt_tokens": 3}})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:  # the client has gone
            return

    def _part(self, part: Any) -> bool:
        if part == "hang":
            time.sleep(30)
            return False
        if part == "half":
            self.wfile.write(b'data: {"choices": [{"del\n\n')
            return False
        while part == "endless":
            self.wfile.write(b": " + b"x" * 60_000 + b"\n")
        if part == "cut":
            return False
        self._event(part if isinstance(part, dict) else {"choices": [{"delta": {"content": part}}]})
        return True

    def _event(self, event: dict) -> None:
        self.wfile.write(b"data: " + json.dumps({"model": self.server.model} | event).encode() + b"\n\n")
        self.wfile.flush()

    def _head(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""
