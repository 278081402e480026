"""A stand-in for a colocated SGLang server on a GPU: no model, no GPU, but SGLang 0.5.23's rules about memory.

It takes the command line and the environment of a real one. Released memory is gone until it is resumed; weights come
back without content unless there is a copy on the host; what computes then breaks, and /health computes unless it is
told not to. With `--config FILE` everything but /health, /ready and /metrics asks for the file's api-key. What breaks a
real server is an entry of GET /faults here. A token is (last + 1) % 50 + 2, its logp -token / 100.
"""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

OPTIONS = dict(zip(sys.argv, sys.argv[1:], strict=False))
HAS_COPY = "--enable-weights-cpu-backup" in sys.argv
KEY = Path(OPTIONS["--config"]).read_text().removeprefix("api-key: ").strip() if "--config" in OPTIONS else ""
HEALTH_COMPUTES = os.environ.get("SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION", "1") != "0"


class State:
    """Of the whole server."""

    released: ClassVar[set[str]] = set()
    has_weights = True
    version = "none"
    faults: ClassVar[list[str]] = []


def compute(path: str) -> None:
    """What a forward pass needs."""
    if State.released:
        State.faults.append(f"{path} while {sorted(State.released)} are given back")
    elif not State.has_weights:
        State.faults.append(f"{path} with weights that came back without content")


class Handler(BaseHTTPRequestHandler):
    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        is_open = self.path.startswith(("/health", "/ready", "/metrics"))
        if is_open or not KEY or self.headers["Authorization"] == f"Bearer {KEY}":
            return True
        self.send_error(401, "Unauthorized")
        return False

    def do_GET(self) -> None:
        if self.path == "/health" and HEALTH_COMPUTES:
            compute(self.path)
        info = {"skip_tokenizer_init": True, "incremental_streaming_output": True, "context_length": 4096}
        answers = {"/faults": {"faults": State.faults, "released": sorted(State.released)}, "/server_info": info}
        self._answer(answers.get(self.path, {"model_path": OPTIONS["--model-path"]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/generate":
            compute(self.path)
            self._generate(body)
            return
        if self.path == "/release_memory_occupation":
            State.released |= set(body["tags"])
            State.has_weights &= HAS_COPY or "weights" not in body["tags"]
        elif self.path == "/resume_memory_occupation":
            if not set(body["tags"]) <= State.released:
                State.faults.append(f"KeyError in the scheduler: {body['tags']} of {sorted(State.released)}")
            State.released -= set(body["tags"])
        elif self.path.startswith("/update_weights"):
            if "weights" in State.released:
                State.faults.append(f"{self.path} while weights are given back")
            State.has_weights, State.version = True, body["weight_version"]
        self._answer({})

    def _generate(self, body: dict) -> None:
        last, limit, lines = body["input_ids"][-1], body["sampling_params"]["max_new_tokens"], []
        for index in range(limit):
            last = (last + 1) % 50 + 2
            meta = {
                "output_token_logprobs": [[-last / 100, last, None]],
                "weight_version": State.version,
                "finish_reason": {"type": "length"} if index == limit - 1 else None,
            }
            lines.append(f"data: {json.dumps({'output_ids': [last], 'meta_info': meta})}\n\n")
        self._send("".join(lines) + "data: [DONE]\n\n")

    def _answer(self, answer: dict) -> None:
        self._send(json.dumps(answer))

    def _send(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


if __name__ == "__main__":
    ThreadingHTTPServer((OPTIONS["--host"], int(OPTIONS["--port"])), Handler).serve_forever()
