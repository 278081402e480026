"""One SGLang server as a child process: its command, its start, its log, its end."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from r1engine.ending import end_with_parent
from r1engine.rollout.sglang.client import Client

TESTED_VERSION = "0.5.23"
INSTALL = f"python3.12 -m venv sglang-env && sglang-env/bin/pip install sglang=={TESTED_VERSION}"
# What torchrun tells this rank. PyTorch in a server would take it for itself, and wait for the store of torchrun.
LAUNCHERS = re.compile(r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")
# The NCCL that this environment's torch asks for, as NAME==VERSION: there may be packages for two versions of CUDA.
NCCL_OF_TORCH = """
import importlib.metadata, re
for name in {re.match("[A-Za-z0-9_.-]+", text)[0] for text in importlib.metadata.requires("torch") or ()}:
    if name.lower().replace("_", "-").startswith("nvidia-nccl-cu"):
        print(name + "==" + importlib.metadata.version(name))
"""
LOG_LINES = 25  # shown when a start fails
LOG_BYTES, LOG_FILES = 64 * 2**20, 3  # of a log before it is begun anew; how many older ones are kept


def check_environment(python: Path) -> str:
    """Version of SGLang in the environment of an interpreter.

    Raises:
        ValueError: there is none, or not the version that r1engine is tested with; the message has the install command.
    """
    if not python.is_file():
        raise ValueError(
            f"rollout.sglang.python: found no {python}, required the Python of an environment with sglang: {INSTALL}"
        )
    code = "import importlib.metadata as m; print(m.version('sglang'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise ValueError(f"rollout.sglang.python: {python} has no sglang; install it: {INSTALL}")
    version = done.stdout.strip()
    if version != TESTED_VERSION:
        raise ValueError(
            f"rollout.sglang.python: {python} has sglang {version}, required is {TESTED_VERSION}, the version that "
            f"r1engine is tested with: {INSTALL}"
        )
    return version


def check_nccl(python: Path, own: tuple[int, ...]) -> None:
    """That the servers' environment has the trainer's NCCL; different ones refuse each other when they meet.

    Args:
        python: interpreter of that environment; what it does not tell is not checked.
        own:    torch.cuda.nccl.version() of this process.

    Raises:
        ValueError: it has another version.
    """
    done = subprocess.run([python, "-c", NCCL_OF_TORCH], capture_output=True, text=True, timeout=120, check=False)
    found, ours = done.stdout.split(), ".".join(map(str, own))
    for package, theirs in (one.split("==") for one in found if done.returncode == 0):
        if theirs.split(".")[:3] == ours.split("."):
            continue  # 2.26.2.post1 is 2.26.2
        raise ValueError(
            f"rollout.sglang.route: found distributed with NCCL {ours} here and {theirs} in {python}, required the "
            f"same: {python} -m pip install --no-deps {package}=={ours}; or another route"
        )


def visible_gpus(devices: Sequence[int]) -> str:
    """CUDA_VISIBLE_DEVICES of a child process that gets these GPUs, as PyTorch numbers them in this one.

    Raises:
        ValueError: this process sees fewer.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return ",".join(map(str, devices))
    # CUDA looks no further than the first name that is none.
    names = list(itertools.takewhile(lambda name: name not in ("", "-1"), map(str.strip, visible.split(","))))
    if max(devices) >= len(names):
        raise ValueError(
            f"rollout.sglang: found CUDA_VISIBLE_DEVICES={visible!r} with {len(names)} GPUs, required "
            f"{max(devices) + 1} for the trainer and its servers"
        )
    return ",".join(names[device] for device in devices)


def free_port(host: str = "127.0.0.1", ports: range | None = None) -> int:
    """A port that nobody listens on; see `free_ports`."""
    return free_ports(1, host, ports)[0]


def free_ports(count: int, host: str = "127.0.0.1", ports: range | None = None) -> list[int]:
    """Different ports that nobody listens on, of these; None: any.

    Raises:
        ValueError: too many of them are in use, or the host is not this machine.
    """
    problem: OSError | None = None
    with contextlib.ExitStack() as held:
        found: list[int] = []
        for port in ports or itertools.repeat(0, count):
            probe = held.enter_context(_probe(host))
            try:
                probe.bind((host, port))
            except OSError as error:
                problem = error
                continue
            found.append(probe.getsockname()[1])
            if len(found) == count:
                return found
    tried, free = (
        f"all of {ports[0]}-{ports[-1]}" if ports else "any",
        f"{count} free ports" if count > 1 else "a free port",
    )
    raise ValueError(f"rollout.sglang.ports: tried {tried} on {host} ({problem}), required {free} of this machine")


def _probe(host: str) -> socket.socket:
    probe = socket.socket(socket.getaddrinfo(host, 1, type=socket.SOCK_STREAM)[0][0])
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return probe


def url_of(host: str, port: int) -> str:
    """Address of a server on this machine; an IPv6 address stands in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server:
    """A running server. It dies with this process, and `stop` ends its whole process tree."""

    def __init__(
        self, command: list[str], env: dict[str, str], *, url: str, log: Path, stall_seconds: float, key: str = ""
    ) -> None:
        """Starts the process; `wait_ready` waits for it.

        Args:
            command:       of the launcher, its --host and --port those of `url`.
            env:           added to this process's environment, without what a launcher of ranks put there.
            url:           http://host:port.
            log:           file of the server's output.
            stall_seconds: see Client.
            key:           that the command makes it ask for.

        Raises:
            ValueError: the port is taken.
        """
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 0
        with _probe(host) as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ValueError(
                    f"rollout.sglang: port {port} of {host} is in use ({error}); free it or choose another"
                ) from error
        self.client = Client(url, stall_seconds=stall_seconds, key=key)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                env={name: value for name, value in os.environ.items() if not LAUNCHERS.fullmatch(name)} | env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its group is its whole tree
                preexec_fn=partial(end_with_parent, signal.SIGKILL),
            )

    def wait_ready(self, seconds: float, on_wait: Callable[[float], None] | None = None) -> None:
        """Returns when the server answers.

        Args:
            seconds: most time of a start.
            on_wait: called about twice a second with the seconds waited.

        Raises:
            RuntimeError: the process ended or did not answer in time; with the last lines of its log.
        """
        started = time.monotonic()
        while True:
            if (code := self.process.poll()) is not None:
                raise RuntimeError(f"sglang: {self.client.url} ended with status {code}{self._reason()}")
            if self.client.answers():
                return
            waited = time.monotonic() - started
            if waited > seconds:
                self.stop()
                raise RuntimeError(f"sglang: {self.client.url} is not ready after {waited:.0f} s{self._reason()}")
            if on_wait is not None:
                on_wait(waited)
            time.sleep(0.5)

    @property
    def is_ready(self) -> bool:
        """Whether it answers now."""
        return self.client.answers()

    def rotate_log(self, most_bytes: int = LOG_BYTES) -> None:
        """Begin the log anew if it is longer; LOG_FILES older ones are kept as .1, .2, ... The server writes on."""
        if not self.log.is_file() or self.log.stat().st_size <= most_bytes:
            return
        older = [self.log.with_name(f"{self.log.name}.{number}") for number in range(1, LOG_FILES + 1)]
        for file, next_file in reversed(list(itertools.pairwise(older))):
            if file.is_file():
                file.replace(next_file)
        shutil.copyfile(self.log, older[0])
        os.truncate(self.log, 0)  # the server appends, wherever the end is

    def _reason(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:] if self.log.is_file() else []
        text = "\n  ".join(lines)
        hint = ""
        if re.search(r"out of memory|OutOfMemory|Not enough memory", text, re.IGNORECASE):
            hint = "; it ran out of memory: lower rollout.sglang.memory_fraction or raise rollout.sglang.tensor"
        return f"{hint}; the last lines of {self.log}:\n  {text}"

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def stop(self, grace_seconds: float = 5.0) -> None:
        """Ends the server and every process that it started."""
        for sent, wait in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGCONT)  # a stopped process takes no SIGTERM
                os.killpg(self.process.pid, sent)
            end = time.monotonic() + wait
            while time.monotonic() < end:
                self.process.poll()  # reaps the launcher
                if not _group_exists(self.process.pid):
                    return
                time.sleep(0.05)


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
