"""Servers of a model that grades or writes: time-outs, retries, rest, and errors in one line."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from typing import Any

from r1engine.config.addresses import address_problem


class ModelServersError(Exception):
    """The servers gave no usable reply; the message says what happened, in one line."""

    def __init__(self, message: str, *, is_refusal: bool = False) -> None:
        super().__init__(message)
        self.is_refusal = is_refusal  # it is about this request, so that another one may be answered


@dataclass
class _Server:
    url: str
    failures: int = 0  # in a row
    failing_since: float = 0.0  # time.monotonic() of the first of them
    rests_until: float = 0.0
    problem: str = ""  # the last one


class ModelServers:
    """Servers that answer alike, and how patient to be with them; usable from any thread.

    A request goes to the next server in turn, and if that one fails, to the one after it. A server that goes on
    failing rests for a while: a server that is gone costs a few requests their time and not all of them. While all
    rest, requests fail at once.
    """

    def __init__(
        self,
        *urls: str,
        timeout_seconds: float = 60.0,
        tries: int = 3,
        pause_seconds: float = 1.0,
        rest_seconds: float = 30.0,
        key_variable: str = "",
    ) -> None:
        """
        Args:
            urls:            of each server, e.g. http://10.0.0.7:30000/v1
            timeout_seconds: of one try.
            tries:           of one request, over all servers.
            pause_seconds:   before the second try; doubles with each.
            rest_seconds:    of a server that fails `tries` times in a row and as long as a request goes on trying.
            key_variable:    environment variable that holds the API key; "": none is sent.

        Raises:
            ValueError: there is no URL, one is none, or the variable is not set.
        """
        if not urls:
            raise ValueError("endpoint: found no url, required at least one")
        for url in urls:
            if problem := address_problem(url):
                raise ValueError(f"endpoint: found url {url!r}, required {problem}")
        if key_variable and not os.environ.get(key_variable):
            raise ValueError(f"endpoint: the environment variable {key_variable} is not set")
        self._servers = [_Server(url.rstrip("/")) for url in urls]
        self._timeout, self._tries, self._pause, self._rest = timeout_seconds, tries, pause_seconds, rest_seconds
        self._key_variable = key_variable
        self._turn = itertools.count()

    @property
    def urls(self) -> str:
        """Of all servers, for messages."""
        return ", ".join(server.url for server in self._servers)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON reply to a POST.

        A refused or broken connection, a time-out, status 429 or 5xx and a reply that is no JSON are tried again.

        Raises:
            ModelServersError: no reply after all tries, all servers rest, or another status.
        """
        return self._ask("POST", path, body)

    def get(self, path: str) -> Any:
        """The JSON reply to a GET; errors as of `post`."""
        return self._ask("GET", path, None)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        first, problem = next(self._turn), ""
        for attempt in range(self._tries):
            if attempt:
                time.sleep(self._pause * 2 ** (attempt - 1))
            awake = [server for server in self._servers if server.rests_until <= time.monotonic()]
            if not awake:
                problem = problem or f"{self._servers[0].problem} (it rests, and was not asked again)"
                break
            server = awake[(first + attempt) % len(awake)]
            try:
                reply = self._ask_once(method, server.url + path, body)
            except ModelServersError as error:
                if error.is_refusal:
                    server.failures = 0
                    raise
                problem = str(error)
                self._note_failure(server, problem)
            else:
                server.failures = 0
                return reply
        raise ModelServersError(problem[:300])

    def _note_failure(self, server: _Server, problem: str) -> None:
        clock = time.monotonic()
        if not server.failures:
            server.failing_since = clock
        server.failures, server.problem = server.failures + 1, problem
        # Not by number alone: a server that is busy for a moment fails many requests at once.
        patience = self._pause * (2 ** (self._tries - 1) - 1)
        if server.failures >= self._tries and clock - server.failing_since >= patience:
            server.rests_until = clock + self._rest

    def _ask_once(self, method: str, url: str, body: dict[str, Any] | None) -> Any:
        from r1engine.web import NoReply, parsed, request  # aiohttp is slow to import, and few runs ask servers

        key = os.environ[self._key_variable] if self._key_variable else ""
        try:
            return parsed(request(method, url, body, key=key, seconds=self._timeout))
        except NoReply as error:
            raise ModelServersError(f"{url}: {error}", is_refusal=error.is_refusal) from None
