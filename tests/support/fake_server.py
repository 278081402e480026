"""A stand-in for SGLang's HTTP interface with faults to order. For tests of what a real server cannot be made to do."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable

from aiohttp import web


class FakeServer:
    """Answers /generate with tokens that count up from the last one of the input: token = (last + 1) % 50 + 2.

    The logp of a token is -token / 100. `fault(request_number, tokens_sent)` may return a word for what goes wrong, or
    what is sent in place of a part: "data: ...". `experts(num_tokens)` is the last part's `routed_experts`.
    """

    def __init__(
        self,
        fault: Callable[[int, int], str | None] = lambda number, sent: None,
        *,
        slots: int = 100,
        experts: Callable[[int], str] | None = None,
    ) -> None:
        self.experts = experts
        self.fault, self.requests, self.aborted, self.version = fault, [], [], "1"
        self._loop, self._slots = asyncio.new_event_loop(), asyncio.Semaphore(slots)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self._ready.wait()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_get("/health", self._health)
        app.router.add_post("/abort_request", self._abort)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())  # ends the requests that hang

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.Response()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        async with self._slots:  # the others wait in silence
            return await self._draw(request)

    async def _draw(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.requests)
        self.requests.append(body)
        if self.fault(number, 0) == "status 500":
            return web.Response(status=500, text="boom")
        response = web.StreamResponse()
        await response.prepare(request)
        last, limit = body["input_ids"][-1], body["sampling_params"]["max_new_tokens"]
        for sent in range(limit):
            what = self.fault(number, sent)
            if what == "slow":
                await asyncio.sleep(0.1)
            if what == "hang":
                await asyncio.sleep(3600)
            if what == "cut":
                request.transport.close()
                return response
            if what == "endless":
                while True:
                    await response.write(b"data: " * 10_000)
            if what and what.startswith("data:"):
                await response.write(what.encode("utf-8", "surrogateescape") + b"\n\n")
                return response
            last = (last + 1) % 50 + 2
            token = -5 if what == "bad token" else last
            meta = {
                "output_token_logprobs": [[-token / 100, token, None]],
                "weight_version": "0" if what == "old weights" else self.version,
                "finish_reason": {"type": "length"} if sent == limit - 1 else None,
            }
            line = json.dumps({"output_ids": [token], "meta_info": meta})
            if self.experts is not None and sent == limit - 1:
                await self._write_experts(response, line, self.experts(len(body["input_ids"]) + limit))
            else:
                await response.write(f"data: {line}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _write_experts(self, response: web.StreamResponse, line: str, experts: str) -> None:
        """The last part, piece by piece: no copy of a long text stays here, so that a test can measure the client."""
        await response.write(f'data: {line[:-2]}, "routed_experts": "'.encode())
        for start in range(0, len(experts), 2**16):
            await response.write(experts[start : start + 2**16].encode())
        await response.write(b'"}}\n\n')
