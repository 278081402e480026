"""The servers of a run and their state, agreed on by all ranks: started, found, restarted, put to sleep."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import torch

from r1engine.config import RlConfig
from r1engine.ranks import World
from r1engine.rollout.sglang import launch
from r1engine.rollout.sglang.client import Client, ServerError
from r1engine.rollout.sglang.dispatch import Endpoint
from r1engine.rollout.sglang.key import key_in, key_of, run_key
from r1engine.rollout.sglang.registry import Registration, Registry, registry
from r1engine.rollout.sglang.server import Server

ASK_SECONDS = 5.0  # for an answer of a server that is not in use
MEMORY_TAGS = ["kv_cache", "cuda_graph", "weights"]  # what a colocated server gives back while the trainer works


class Fleet:
    """Endpoints in the same order on every rank, and the processes that this rank owns."""

    def __init__(self, cfg: RlConfig, world: World, *, dtype: torch.dtype, note: Callable[[str], None]) -> None:
        """Starts (colocated), waits for (disaggregated) or takes (remote) the servers; see SglangGenerator."""
        self._cfg, self._world, self._note = cfg, world, note
        self._dtype = str(dtype).removeprefix("torch.")
        self._server: Server | None = None
        self._is_restarting = False  # this rank's server was started again and is not in use yet
        self._asleep: list[str] = []  # memory that this rank's server has given back
        s = cfg.rollout.sglang
        self._shares_memory = s.mode == "colocated" and world.device.type == "cuda"
        self._key = ""
        self._registry = Registry(registry(cfg), note) if s.mode == "disaggregated" else None
        if s.mode == "colocated":
            self._start_colocated_server()
            self._key = key_of(run_key(cfg.run_dir))
            own: str | None = self._server.client.url if self._server is not None else None
            there = {u: Registration(u) for u in world.everyones(own) if u is not None}
        elif s.mode == "disaggregated":
            self._key = key_of(run_key(cfg.run_dir))
            there = world.from_first(self._wait_registered)
        else:
            self._key = key_in(s.key_variable)
            there = {u: Registration(u, receivers=s.receivers_of(i)) for i, u in enumerate(s.urls)}
        self.endpoints = [self._endpoint(found) for found in there.values()]
        if s.mode != "disaggregated":  # those of a registry are looked at before they are taken
            world.from_first(self._check_all)
        self.sleep()  # the trainer's model is built next

    def _endpoint(self, found: Registration) -> Endpoint:
        stall_seconds = self._cfg.rollout.sglang.stall_seconds
        server, *receivers = (
            Client(u, stall_seconds=stall_seconds, key=self._key) for u in (found.url, *found.receivers)
        )
        return Endpoint(server, starts=found.starts, receivers=receivers)

    def _check_all(self) -> None:
        for endpoint in self.endpoints:
            launch.check_server(endpoint.client, self._cfg, dtype=self._dtype)

    # ------------------------------------------------------------------ where they come from

    def _start_colocated_server(self) -> None:
        """Every block of `tensor` ranks owns a server on its GPUs; on CPUs the first ranks own `servers` of them."""
        s = self._cfg.rollout.sglang
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
        if not ranks_here:  # another launcher than torchrun
            name = socket.gethostname()
            ranks_here = self._world.everyones(name).count(name)
        if ranks_here < self._world.size:
            raise ValueError(
                f"rollout.sglang.mode: found colocated with {ranks_here} of {self._world.size} ranks on this node, "
                "required a single node: its servers listen on 127.0.0.1. Over several nodes use disaggregated"
            )
        if self._world.device.type == "cuda":
            if self._world.size % s.tensor:
                raise ValueError(
                    f"rollout.sglang.tensor: {s.tensor} does not divide the {self._world.size} ranks of the run"
                )
            is_owner = self._world.rank % s.tensor == 0
        else:
            is_owner = self._world.rank < s.servers
        if is_owner:
            self._server = self._start(port=None)
            self._wait_ready()

    def _start(self, port: int | None) -> Server:
        index = self._world.device.index or 0
        s = self._cfg.rollout.sglang
        devices = list(range(index, index + s.tensor)) if self._world.device.type == "cuda" else None
        return launch.start(
            self._cfg, name=f"server{self._world.rank}", host="127.0.0.1", port=port, devices=devices, dtype=self._dtype
        )

    def _wait_ready(self) -> None:
        server = self._server
        assert server is not None
        told = -30.0

        def tell(waited: float) -> None:
            nonlocal told
            if waited - told >= 30:
                told = waited
                self._note(f"waiting for {server.client.url} ({waited:.0f} s, log in {server.log})")

        server.wait_ready(self._cfg.rollout.sglang.start_seconds, tell)

    def _wait_registered(self) -> dict[str, Registration]:
        """The announced servers that can be used, by URL, once there are enough."""
        s, registry = self._cfg.rollout.sglang, self._registry
        assert registry is not None
        started = time.monotonic()
        while True:
            there = registry.look()
            problems = self._problems_of(list(there))
            found = {url: there[url] for url, problem in problems.items() if not problem}
            if len(found) >= s.servers:
                return found
            if time.monotonic() - started > s.start_seconds:
                others = "".join(f"; {url}: {problem}" for url, problem in problems.items() if problem)
                raise RuntimeError(
                    f"sglang: {len(found)} of {s.servers} servers in {registry.folder} can be used after "
                    f"{s.start_seconds:.0f} s{others}; start them with `r1engine serve` and the same configuration"
                )
            for url, problem in problems.items():
                if problem:
                    registry.tell_silent(url, problem)
            time.sleep(1.0)

    def _problems_of(self, urls: list[str]) -> dict[str, str]:
        """URL -> why that server cannot be used now; "": it can. Asks all at once."""

        def problem(url: str) -> str:
            client = Client(url, stall_seconds=ASK_SECONDS, key=self._key)
            try:
                client.get("/health")
                if self._cfg.rollout.sglang.mode != "colocated":
                    launch.check_server(client, self._cfg, dtype=self._dtype)
            except (ServerError, ValueError) as error:
                return str(error)
            return ""

        if not urls:
            return {}
        with ThreadPoolExecutor(len(urls)) as pool:
            return dict(zip(urls, pool.map(problem, urls), strict=True))

    # ------------------------------------------------------------------ state

    def left_out(self) -> list[tuple[str, str]]:
        """(url, reason) of the servers that are not in use."""
        return [(e.client.url, e.problem) for e in self.endpoints if not e.is_usable]

    def restart_failed(self) -> None:
        """Begin to start this rank's server again if it failed. Where it shares memory, the policy is asleep: `sleep`
        waits for it; elsewhere `recover` does."""
        if self._server is None:
            return
        endpoint = self._own_endpoint()
        if self._server.is_running and (endpoint.is_usable or self._is_restarting):
            return
        if endpoint.is_usable:
            endpoint.fail("its process ended")
        port = urlsplit(self._server.client.url).port
        self._server.stop()
        self._server, self._asleep, self._is_restarting = self._start(port), [], True
        self._note(f"{self._server.client.url} is started again ({endpoint.problem})")

    def recover(self) -> None:
        """Take servers that have come or that answer again, drop those that have left; the refresh that follows gives
        them weights. Collective."""
        if self._server is not None:
            self._server.rotate_log()
        if not self._shares_memory:  # else the policy is awake, and a start needs its memory
            self.restart_failed()
        self._await_own()
        self._world.everyones(None)  # every rank's server is up, or given up
        there, usable = self._world.from_first(self._look)
        known = {endpoint.client.url: endpoint for endpoint in self.endpoints}
        self.endpoints[:] = [known.get(url) or self._endpoint(found) for url, found in there.items()]
        for endpoint in self.endpoints:
            found = there[endpoint.client.url]
            if endpoint.starts != found.starts:
                endpoint.starts, endpoint.receivers = found.starts, self._endpoint(found).receivers
                endpoint.fail("it was started again")
            if endpoint.client.url in usable:
                endpoint.is_usable, endpoint.problem, endpoint.strikes = True, "", 0
        self._is_restarting = False

    def _look(self) -> tuple[dict[str, Registration], list[str]]:
        """All servers by URL, those that have come since included and those that have left not; and which of the new
        ones and of those that are out of use can be used."""
        known = {endpoint.client.url: endpoint for endpoint in self.endpoints}
        there = {url: Registration(url, e.starts, receivers=[r.url for r in e.receivers]) for url, e in known.items()}
        if self._registry is not None and (announced := self._registry.look()):  # else it cannot be read
            there = announced
        asked = [u for u, r in there.items() if u not in known or not known[u].is_usable or known[u].starts != r.starts]
        problems = self._problems_of(asked)
        for url, problem in problems.items():
            if problem and url not in known:
                del there[url]
            if problem and self._registry is not None:
                self._registry.tell_silent(url, problem)
        come, gone = there.keys() - known.keys(), known.keys() - there.keys()
        for url in sorted(come | gone):
            self._note(f"{url} has {'come' if url in come else 'left'}: {len(there)} servers")
        return there, [url for url, problem in problems.items() if not problem]

    def _await_own(self) -> None:
        if self._server is not None:
            with contextlib.suppress(RuntimeError):  # it stays left out, with the reason of its first failure
                self._wait_ready()

    # ------------------------------------------------------------------ memory of colocated servers

    def wake(self, *, weights_only: bool = False) -> None:
        """Give the servers their memory back: all before generating, the weights' before a refresh; collective."""
        tags = [tag for tag in self._asleep if tag == "weights" or not weights_only]
        self._asleep = [tag for tag in self._asleep if tag not in tags]
        self._memory("/resume_memory_occupation", tags)

    def sleep(self) -> None:
        """Take the servers' memory while training; collective. Only on GPUs: on a CPU nothing is freed."""
        if self._shares_memory:
            self.restart_failed()
            if self._is_restarting:
                self._await_own()
            self._asleep = list(MEMORY_TAGS)
            self._memory("/release_memory_occupation", MEMORY_TAGS)

    def _memory(self, path: str, tags: list[str]) -> None:
        if self._server is not None and tags:
            try:
                self._server.client.post(path, {"tags": tags}, seconds=120.0)
            except ServerError as error:
                self._own_endpoint().fail(str(error))
                self._server.stop()  # the trainer needs the memory; the next `sleep` starts it again
                self._asleep = []
        self._world.everyones(None)

    def _own_endpoint(self) -> Endpoint:
        """Of the server that this rank owns."""
        assert self._server is not None
        url = self._server.client.url
        return next(endpoint for endpoint in self.endpoints if endpoint.client.url == url)

    def close(self) -> None:
        """End this rank's server."""
        if self._server is not None:
            self._server.stop()
