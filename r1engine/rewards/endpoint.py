"""JSON over HTTP to a server of models: time-outs, retries, and errors in one line. Standard library only."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

MAX_REPLY_BYTES = 16 * 2**20
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # servers of the cluster, not of the web


class EndpointError(Exception):
    """The server gave no usable reply; the message says what happened, in one line."""


@dataclass(frozen=True)
class Endpoint:
    """Where a server is and how patient to be with it."""

    url: str  # e.g. http://10.0.0.7:30000/v1
    timeout_seconds: float = 60.0  # of one request
    tries: int = 3
    pause_seconds: float = 1.0  # before the second try; doubles with each
    key_variable: str = ""  # environment variable that holds the API key; "": none is sent

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint: found url {self.url!r}, required http://... or https://...")
        if self.key_variable and not os.environ.get(self.key_variable):
            raise ValueError(f"endpoint: the environment variable {self.key_variable} is not set")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON reply to a POST; usable from any thread.

        A refused or broken connection, a time-out, status 429 or 5xx and a reply that is no JSON are tried again.

        Raises:
            EndpointError: no reply after all tries, or another status.
        """
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        url = self.url.rstrip("/") + path
        # A completion can hold half a surrogate pair; JSON escapes it.
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        problem = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.pause_seconds * 2 ** (attempt - 1))
            try:
                with _DIRECT.open(request, timeout=self.timeout_seconds) as reply:
                    return json.loads(reply.read(MAX_REPLY_BYTES))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {_start(error)}".strip()
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
                problem = str(getattr(error, "reason", error) or type(error).__name__)
            except (ValueError, RecursionError):
                problem = "the reply is no JSON"
        raise EndpointError(f"{url}: {problem}"[:300])


def _start(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(150).decode("utf-8", "replace").replace("\n", " ")
    except (OSError, http.client.HTTPException):
        return ""
