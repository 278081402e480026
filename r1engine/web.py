"""HTTP to servers of models: one request, whose reply comes whole or line by line. On aiohttp.

Servers of models stand in the cluster: proxies of the environment are not asked, and no redirection is followed, which
could take a key elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from functools import cache
from typing import Any

import aiohttp

LONG_LINE = 2**20  # bytes
MAX_REPLY_BYTES = 16 * 2**20


class NoReply(Exception):
    """A request without a usable reply; the message says why, in one line."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status  # of the reply; None: there is none, or it breaks off

    @property
    def is_refusal(self) -> bool:
        """It is about this request, so that another one may be answered."""
        return self.status is not None and self.status < 500 and self.status not in (408, 429)


@contextlib.asynccontextmanager
async def opened(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    body: Any = None,
    *,
    key: str = "",
    timeout: aiohttp.ClientTimeout,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """What a server replies to a request, with its content still to be read.

    Args:
        session: of the running loop.
        method:  GET or POST.
        url:     whole.
        body:    sent as JSON; half a surrogate pair is escaped. None: nothing is sent.
        key:     that the server asks for; "": it asks for none.
        timeout: of connecting, of silence and of all.

    Raises:
        NoReply: nobody answers in time, or the status is not 200.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    reply = session.request(method, url, data=data, headers=headers, timeout=timeout, allow_redirects=False)
    async with contextlib.AsyncExitStack() as stack:
        with _failures():
            response = await stack.enter_async_context(reply)
            if response.status != 200:
                said = (await response.content.read(300)).decode(errors="replace").replace("\n", " ")
                said = f"it sends to {response.headers.get('Location')}" if 300 <= response.status < 400 else said
                raise NoReply(f"HTTP {response.status} {said}".strip(), status=response.status)
        yield response


async def whole(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    body: Any = None,
    *,
    key: str = "",
    seconds: float,
    most_bytes: int = MAX_REPLY_BYTES,
) -> bytes:
    """The reply to a request within `seconds`; arguments and errors as of `opened` and `all_of`."""
    async with opened(session, method, url, body, key=key, timeout=aiohttp.ClientTimeout(total=seconds)) as response:
        return await all_of(response.content, most_bytes)


def request(method: str, url: str, body: Any = None, *, key: str = "", seconds: float) -> bytes:
    """As `whole`, for any thread. Those of all threads run in one loop: to begin one for each costs milliseconds."""

    async def once() -> bytes:
        async with aiohttp.ClientSession() as session:
            return await whole(session, method, url, body, key=key, seconds=seconds)

    return asyncio.run_coroutine_threadsafe(once(), _loop_of(os.getpid())).result()


@cache
def _loop_of(process: int) -> asyncio.AbstractEventLoop:
    """A loop that runs in a thread of its own; a forked process has none of its parent's threads."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="requests", daemon=True).start()
    return loop


def parsed(text: bytes | bytearray) -> Any:
    """The JSON value that a server sent.

    Raises:
        NoReply: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NoReply(f"the reply is no JSON but {bytes(text[:40])!r}") from None


async def all_of(content: aiohttp.StreamReader, most_bytes: int) -> bytes:
    """The rest of a reply; raises NoReply where it breaks off or is longer."""
    found = bytearray()
    async for piece in _pieces(content):
        found += piece
        if len(found) > most_bytes:
            raise NoReply(f"the reply has more than {most_bytes:,} bytes")
    return bytes(found)


async def _pieces(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    while True:
        with _failures():
            piece = await content.readany()
        if not piece:
            return
        yield piece


async def lines(
    content: aiohttp.StreamReader, most_bytes: int, long_lines: asyncio.Lock
) -> AsyncGenerator[bytearray | None, None]:
    """Lines of a reply, of up to `most_bytes` each; None for a piece of a long one.

    aiohttp's own lines end at 512 KiB. Of those that share `long_lines`, who has it reads a long line on; the others
    stop reading and so stop their sender. It is held until the next line is asked for.
    """
    begun, is_long = bytearray(), False  # the line whose end has not come; whether it has the lock
    try:
        async for piece in _pieces(content):
            *ends, rest = piece.split(b"\n")
            for end in ends:
                begun += end
                yield begun
                begun = bytearray()
                if is_long:
                    long_lines.release()
                    is_long = False
            begun += rest
            if len(begun) > most_bytes:
                raise NoReply(f"a line of more than {most_bytes} bytes")
            if is_long:
                yield None
            elif len(begun) > LONG_LINE:
                await long_lines.acquire()
                is_long = True
    finally:
        if is_long:
            long_lines.release()


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Whatever goes wrong inside comes from the server, or from the way to it."""
    try:
        yield
    except NoReply:
        raise
    except TimeoutError as error:
        raise NoReply(f"no reply in time ({error})" if str(error) else "no reply in time") from error
    except aiohttp.ClientConnectorError as error:  # its own text holds no reason
        code, is_ssl = error.os_error.errno or 0, isinstance(error.os_error, ssl.SSLError)
        raise NoReply(os.strerror(code) if code > 0 and not is_ssl else str(error.os_error)) from error
    except Exception as error:
        raise NoReply(f"{type(error).__name__}: {error}".removesuffix(": ")) from error
