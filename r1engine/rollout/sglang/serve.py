"""`r1engine serve`: the servers of a disaggregated run on one machine, kept alive and announced to the trainer."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from r1engine.config import ConfigError, RlConfig
from r1engine.ending import exit_status
from r1engine.hf.architecture import read_architecture
from r1engine.rollout.sglang import launch
from r1engine.rollout.sglang.client import Client, ServerError
from r1engine.rollout.sglang.key import key_of, run_key
from r1engine.rollout.sglang.listening import listening_host, own_name
from r1engine.rollout.sglang.registry import Registration, announce, read, registry
from r1engine.rollout.sglang.server import Server, check_environment, free_ports

BEAT_SECONDS = 2.0  # between two looks at the servers
MOST_STARTS = 5  # of a server that never gets ready, one after the other


class _Served:
    """A server, its registration, and how it is started again."""

    def __init__(self, cfg: RlConfig, host: str, index: int, ports: list[int]) -> None:
        """`ports` are its own and those of its receivers."""
        self._cfg, self._host, self._index, self._ports = cfg, host, index, ports
        self.file = registry(cfg) / f"{host.replace(':', '_')}-{index}.json"
        self._starts, self._beats, self._tries = 1, 0, 1
        self._started = time.monotonic()
        self.receivers: list[Server] = []
        self.server = self._start()

    def _devices(self) -> list[int] | None:
        tensor = self._cfg.rollout.sglang.tensor
        own = range(self._index * tensor, (self._index + 1) * tensor)
        return list(own) if torch.cuda.is_available() else None

    def _start(self) -> Server:
        """The server and its receivers, under the addresses that they had."""
        self._start_receivers()
        devices, port = self._devices(), self._ports[0]
        dtype = "bfloat16" if devices is not None else "float32"
        return launch.start(self._cfg, name=self.file.stem, host=self._host, port=port, devices=devices, dtype=dtype)

    def _start_receivers(self) -> None:
        for receiver in self.receivers:
            receiver.stop()
        name, devices = self.file.stem, self._devices()
        self.receivers = launch.start_receivers(
            self._cfg, name=name, host=self._host, ports=self._ports[1:], devices=devices
        )

    def wait_ready(self) -> None:
        for process in (self.server, *self.receivers):
            process.wait_ready(self._cfg.rollout.sglang.start_seconds)
        self._announce()

    def look(self) -> None:
        """Renews the registration of a server that runs; starts again one that has ended."""
        self.server.rotate_log()
        if not self.server.is_running:
            self._start_again("ended")
        elif ended := [receiver for receiver in self.receivers if not receiver.is_running]:
            self._count_start(f"the receiver {ended[0].client.url} ended")
            self._start_receivers()
        elif self._tries == 0:
            self._announce()
        elif all(process.is_ready for process in (self.server, *self.receivers)):
            self._starts += 1
            self._announce()
            print(f"{self.server.client.url} is ready again", flush=True)
        elif time.monotonic() - self._started > self._cfg.rollout.sglang.start_seconds:
            self._start_again("does not answer")

    def _announce(self) -> None:
        self._tries, self._beats = 0, self._beats + 1
        receivers = [receiver.client.url for receiver in self.receivers]
        announce(self.file, Registration(self.server.client.url, self._starts, self._beats, receivers))

    def _start_again(self, why: str) -> None:
        self._count_start(why)
        self.server.stop()
        self.server = self._start()

    def _count_start(self, why: str) -> None:
        """Until everything answers it is not announced, and then as another start."""
        if self._tries == MOST_STARTS:
            raise RuntimeError(f"{self.server.client.url} {why} after {MOST_STARTS} starts; see {self.server.log}")
        print(f"{self.server.client.url}: {why}; it is started again", flush=True)
        self._tries, self._started = self._tries + 1, time.monotonic()

    def end(self) -> None:
        """Nobody is sent to it any more, then it ends."""
        for file in self.file.parent.glob(
            f"{self.file.name}*"
        ):  # half a new one too, if the signal came while it was written
            file.unlink(missing_ok=True)
        for process in (self.server, *self.receivers):
            process.stop()


def serve(cfg: RlConfig, servers: int, host: str | None) -> None:
    """Starts servers, announces each in the run folder, and starts again what ends, until Ctrl-C or SIGTERM.

    Args:
        cfg:     the run's; its run_dir is on a file system that the trainer sees.
        servers: on this machine; each takes the next `rollout.sglang.tensor` GPUs.
        host:    address that the trainer reaches this machine by; None: its name.

    Raises:
        ValueError: the configuration is not that of a disaggregated run, fewer GPUs than the servers need, no usable
            SGLang, no usable address, or servers of this machine that are announced already.
        RuntimeError: a server does not start.
    """
    host = _checked(cfg, servers, host)
    each = _ports_of_one(cfg)
    ports = free_ports(servers * each, host, cfg.rollout.sglang.port_range)
    served: list[_Served] = []
    with _until_signal(served):
        for index in range(servers):
            served.append(_Served(cfg, host, index, ports[index * each :][:each]))
        for one in served:
            one.wait_ready()
            print(f"{one.server.client.url} is ready", flush=True)
        while True:
            time.sleep(BEAT_SECONDS)
            for one in served:
                one.look()


def _ports_of_one(cfg: RlConfig) -> int:
    """That a server takes, those of its receivers included."""
    s = cfg.rollout.sglang
    return 1 + s.tensor if s.route == "receivers" else 1


@contextlib.contextmanager
def _until_signal(served: list[_Served]) -> Iterator[None]:
    """Whatever ends it, the servers end and their registrations are gone. Ctrl-C ends it with status 0."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(exit_status(number))

    before = signal.signal(signal.SIGTERM, end)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
        for one in served:
            one.end()
        for number, handler in (kept | {signal.SIGTERM: before}).items():
            signal.signal(number, handler)


def _checked(cfg: RlConfig, servers: int, host: str | None) -> str:
    """The address to listen on, when everything is there that the servers need."""
    s = cfg.rollout.sglang
    if cfg.rollout.engine != "sglang" or s.mode != "disaggregated":
        raise ConfigError(
            f"serve: found rollout.engine {cfg.rollout.engine} with rollout.sglang.mode {s.mode}, required "
            "rollout.engine=sglang rollout.sglang.mode=disaggregated: other runs start their servers themselves"
        )
    assert s.python is not None  # Sglang.problems
    check_environment(s.python)
    read_architecture(cfg.model.folder)
    if torch.cuda.is_available() and servers * s.tensor > torch.cuda.device_count():
        raise ValueError(
            f"serve: {servers} servers of {s.tensor} GPUs need {servers * s.tensor}, this machine has "
            f"{torch.cuda.device_count()}"
        )
    if s.port_range is not None and len(s.port_range) < (needed := servers * _ports_of_one(cfg)):
        raise ConfigError(
            f"rollout.sglang.ports: found {s.ports}, required at least {needed}, one a server or receiver"
        )
    default = own_name() if host is None and torch.cuda.is_available() else "127.0.0.1"
    host = listening_host(host if host is not None else default)
    key = key_of(run_key(cfg.run_dir))
    for file in (registry(cfg) / f"{host.replace(':', '_')}-{index}.json" for index in range(servers)):
        if (url := _answering(file, key)) is not None:
            raise ConfigError(f"serve: {file} names {url}, which answers: the servers of {host} run already")
    return host


def _answering(file: Path, key: str) -> str | None:
    """URL of a registration whose server answers."""
    with contextlib.suppress(OSError, ValueError, ServerError):
        url = read(file).url
        Client(url, stall_seconds=5.0, key=key).get("/health")
        return url
    return None
