"""Draws from SGLang servers that are started for a folder; prompts are the same token ids as in this process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from r1engine.config import ConfigError
from r1engine.config.evaluation import Suite
from r1engine.evaluation.endpoint import EndpointSampler
from r1engine.evaluation.entries import Ask
from r1engine.evaluation.lines import SampleLine
from r1engine.evaluation.samplers import OnReply, shows_of
from r1engine.hf.architecture import read_architecture
from r1engine.rollout.sglang.open_servers import KEY_VARIABLE, OpenServers


class ServedSampler:
    """Servers of a folder, each with its share of the questions."""

    def __init__(self, folder: Path, suite: Suite, ranks: int, out: Path, note: Callable[[str], None]) -> None:
        """Starts the servers.

        Raises:
            ConfigError: several ranks would start them.
            ValueError, RuntimeError: see `OpenServers.start`.
        """
        if ranks > 1:
            raise ConfigError(
                f"generator: found sglang on {ranks} ranks, required one process: `sglang.servers` says how many start"
            )
        s = suite.sglang
        assert s.python is not None  # of a suite with this generator
        wanted = OpenServers(
            folder,
            s.python,
            out / "sglang",
            servers=s.servers,
            tensor=s.tensor,
            memory_fraction=s.memory_fraction,
            start_seconds=s.start_seconds,
            args=s.args,
        )
        shows, context = shows_of(folder, suite), read_architecture(folder).max_positions
        name = folder.resolve().name
        own = {"model": name, "key_variable": KEY_VARIABLE if KEY_VARIABLE in os.environ else ""}
        asked = suite.model_copy(update={"endpoint": suite.endpoint.model_copy(update=own)})
        self._servers = wanted.start(note)
        self._samplers = [
            EndpointSampler(f"{server.client.url}/v1", asked, shows, context=context) for server in self._servers
        ]

    def draw(self, asks: Sequence[Ask], on_reply: OnReply, on_tokens: Callable[[int], None]) -> None:
        """See `Sampler.draw`."""
        lock, problems = threading.Lock(), list[Exception]()

        def replied(ask: Ask, line: SampleLine) -> None:
            with lock:
                on_reply(ask, line)

        def work(index: int, sampler: EndpointSampler) -> None:
            try:
                sampler.draw(asks[index :: len(self._samplers)], replied, on_tokens)
            except Exception as error:  # the caller gets the first
                problems.append(error)

        threads = [threading.Thread(target=work, args=pair) for pair in enumerate(self._samplers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if problems:
            raise problems[0]

    def close(self) -> None:
        """Ends the servers."""
        for server in self._servers:
            server.stop()
