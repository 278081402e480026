"""Servers that come and go: what `r1engine serve` announces, and what the trainer makes of it. The servers stand in for
SGLang's (tests/support/sleeping_server.py)."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import sleeping_server
import torch

from r1engine.config import ConfigError, RlConfig, Sglang
from r1engine.ranks import World
from r1engine.rollout.sglang import launch, registry, serve
from r1engine.rollout.sglang.client import Client
from r1engine.rollout.sglang.fleet import Fleet
from r1engine.rollout.sglang.listening import listening_host, own_name
from r1engine.rollout.sglang.registry import Registration, Registry, announce, read
from r1engine.rollout.sglang.server import Server, free_port, url_of

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def config(folder: Path, run_dir: Path, **settings) -> RlConfig:
    sglang = {"mode": "disaggregated", "python": sys.executable, "stall_seconds": 30, "start_seconds": 60} | settings
    rollout = {"engine": "sglang", "sglang": sglang, "max_tokens": 8}
    return RlConfig(run_dir=run_dir, model={"path": folder}, data={"max_prompt_tokens": 32}, rollout=rollout)


def use_stand_ins(patch: pytest.MonkeyPatch) -> None:
    command = launch.command
    start = [sys.executable, sleeping_server.__file__]
    patch.setattr(launch, "command", lambda *a, **options: [*start, *command(*a, **options)[3:]])
    for module in (launch, serve):
        patch.setattr(module, "check_environment", lambda python: "0.5.23")


def serving(folder: Path, run_dir: Path, servers: int = 2, route: str = "tensor") -> None:
    """What the process of `r1engine serve` does."""
    use_stand_ins(pytest.MonkeyPatch())
    serve.serve(config(folder, run_dir, route=route), servers, "127.0.0.1")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may end before or while it is read
        return False


def wait_for(what: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.rotating
def test_sigterm_ends_the_servers_and_their_registrations(folders, tmp_path):
    folder = registry.registry(config(folders["qwen2"][0], tmp_path))
    process = ranks._forks.Process(target=serving, args=(folders["qwen2"][0], tmp_path))
    process.start()
    wait_for(lambda: len(list(folder.glob("*.json"))) == 2)
    files = sorted(folder.glob("*.json"))
    assert [file.name for file in files] == ["127.0.0.1-0.json", "127.0.0.1-1.json"]
    (first,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[:1]
    os.killpg(int(first), signal.SIGKILL)  # it is started again under the same URL, and announced as another one
    wait_for(lambda: max(read(file).starts for file in files) == 2)
    beats = read(files[0]).beats
    wait_for(lambda: read(files[0]).beats > beats)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    assert list(folder.iterdir()) == [] and len(children) == 2
    assert not any(is_running(pid) for pid in children)


@pytest.mark.rotating
def test_a_receiver_is_announced_with_its_server_and_started_again(folders, tmp_path):
    folder = registry.registry(config(folders["qwen2"][0], tmp_path))
    process = ranks._forks.Process(target=serving, args=(folders["qwen2"][0], tmp_path, 1, "receivers"))
    process.start()
    wait_for(lambda: list(folder.glob("*.json")))
    (file,) = folder.glob("*.json")
    (url,) = read(file).receivers
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    (pid,) = [p for p in children.read_text().split() if b"sglang.receiver" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.killpg(int(pid), signal.SIGKILL)
    wait_for(lambda: read(file).starts == 2)  # for the trainer it is another server, which joins anew
    assert read(file).receivers == [url] and Client(url, stall_seconds=5.0).answers()
    left = [int(pid) for pid in children.read_text().split()]
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert len(left) == 2 and not any(is_running(pid) for pid in left)


@pytest.fixture
def started(folders, tmp_path, monkeypatch):
    """Starts stand-ins of the run in tmp_path and announces them; a dict of name -> server."""
    use_stand_ins(monkeypatch)
    cfg = config(folders["qwen2"][0], tmp_path)
    servers: dict[str, Server] = {}

    def start(name: str) -> Server:
        servers[name] = launch.start(cfg, name=name, host="127.0.0.1", port=None, devices=None, dtype="float32")
        servers[name].wait_ready(60)
        announce(registry.registry(cfg) / f"{name}.json", Registration(servers[name].client.url))
        return servers[name]

    yield start
    for server in servers.values():
        server.stop()


def test_servers_come_return_and_leave_between_refreshes_and_dead_ones_are_named(
    folders, tmp_path, monkeypatch, started
):
    cfg, notes = config(folders["qwen2"][0], tmp_path), []
    folder = registry.registry(cfg)
    one = started("one")
    announce(folder / "dead.json", Registration("http://127.0.0.1:9"))
    (folder / "broken.json").write_text("{")
    fleet = Fleet(cfg, ALONE, dtype=torch.float32, note=notes.append)  # servers: 1
    assert [e.client.url for e in fleet.endpoints] == [one.client.url]
    first = fleet.endpoints[0]
    monkeypatch.setattr(registry, "STALE_SECONDS", 0.0)
    two = started("two")
    for _ in range(2):
        fleet.recover()
    assert [e.client.url for e in fleet.endpoints] == [one.client.url, two.client.url]
    assert fleet.endpoints[0] is first and all(e.is_usable for e in fleet.endpoints)
    assert [note for note in notes if "broken.json is no registration" in note] == [n for n in notes if "broken" in n]
    (stale,) = [note for note in notes if "is stale" in note]
    assert "dead.json" in stale and "http://127.0.0.1:9" in stale
    assert f"{two.client.url} has come: 2 servers" in notes
    announce(folder / "one.json", Registration(one.client.url, starts=2))
    fleet.recover()  # what it held is gone: it is no member of a group any more
    assert fleet.endpoints[0].is_usable and fleet.endpoints[0].failures == 1
    (folder / "one.json").unlink()
    fleet.recover()
    assert [e.client.url for e in fleet.endpoints] == [two.client.url]
    assert f"{one.client.url} has left: 1 servers" in notes


def test_a_server_of_another_layout_or_precision_is_not_taken(folders, tmp_path, monkeypatch, started):
    cfg, notes = config(folders["qwen2"][0], tmp_path, tensor=2, start_seconds=0.01), []
    one = started("one")
    monkeypatch.setattr(one.client.__class__, "get", fake_info(one.client.__class__.get, tp_size=1))
    with pytest.raises(RuntimeError, match=r"0 of 1 servers in .* has 1 tensor-parallel ranks, required are 2"):
        Fleet(cfg, ALONE, dtype=torch.float32, note=notes.append)
    monkeypatch.setattr(one.client.__class__, "get", fake_info(one.client.__class__.get, tp_size=2, dtype="bfloat16"))
    with pytest.raises(RuntimeError, match=r"computes in bfloat16, required is the trainer's float32"):
        Fleet(cfg, ALONE, dtype=torch.float32, note=notes.append)


def fake_info(get: Callable, **more) -> Callable:
    """The stand-in's /server_info, and more."""
    return lambda client, path, **options: get(client, path, **options) | (more if path == "/server_info" else {})


REFUSED = {
    "rollout.engine local": ({"engine": "local"}, {}, "node1"),
    "mode colocated": ({}, {"mode": "colocated"}, "node1"),
    "--host 0.0.0.0": ({}, {}, "0.0.0.0"),
    "--host ::": ({}, {}, "::"),
    "ports: found 30000-30001, required at least 3": ({}, {"ports": "30000-30001"}, "127.0.0.1"),
    "found no /nowhere/python": ({}, {"python": "/nowhere/python"}, "127.0.0.1"),
}


@pytest.mark.parametrize("found", REFUSED)
def test_serve_refuses_before_it_starts_anything(folders, tmp_path, monkeypatch, found):
    rollout, settings, host = REFUSED[found]
    cfg = config(folders["qwen2"][0], tmp_path, **settings)
    cfg = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update=rollout)})
    if "python" not in settings:
        monkeypatch.setattr(serve, "check_environment", lambda python: "0.5.23")
    with pytest.raises(ValueError, match=found):
        serve.serve(cfg, 3, host)
    assert not list(tmp_path.glob("sglang/*.log"))


def test_a_machine_whose_name_is_public_needs_an_address(monkeypatch):
    found = ["10.1.2.3", "2001:4860::8"]
    infos = lambda *args, **kwargs: [(0, 0, 0, "", (address, 1)) for address in found]  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", infos)
    with pytest.raises(ConfigError, match=r"public address 2001:4860::8, required --host with its address in the clu"):
        own_name()
    found.pop()
    assert own_name() == socket.gethostname()


@pytest.mark.parametrize("host", ["0.0.0.0", "0", "::", "[::]", "0:0:0:0:0:0:0:0", "", "*"])
def test_every_form_of_all_interfaces_is_refused(host):
    with pytest.raises(ConfigError, match=r"required the one address that the trainer reaches"):
        listening_host(host)


def test_an_address_may_have_every_form():
    assert [listening_host(host) for host in ("::1", "[::1]", "127.0.0.1", "localhost")] == [
        "::1", "::1", "127.0.0.1", "localhost",
    ]  # fmt: skip
    for host, problem in (("no-such-host.invalid", "stands for no address"), ("fe80::1%eth0", "without a zone")):
        with pytest.raises(ConfigError, match=problem):
            listening_host(host)


def test_ports_come_from_the_range_and_addresses_of_every_form_fit():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"tried all of {port}-{port} on 127.0.0.1 .*required a free port"):
            free_port("127.0.0.1", range(port, port + 1))
        assert free_port("127.0.0.1", range(port, port + 9)) in range(port + 1, port + 9)
    assert url_of("::1", 30000) == "http://[::1]:30000" and url_of("node1", 30000) == "http://node1:30000"
    with pytest.raises(ValueError, match="required a free port of this machine"):
        free_port("192.0.2.1")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"ports": "30009-30000"}, "ports: found 30009-30000, required FIRST-LAST within 1024-65535"),
        ({"ports": "80-90"}, "ports: found 80-90, required FIRST-LAST within 1024-65535"),
        ({"args": ["--host=0.0.0.0", "--log-level", "info"]}, "args: found --host=0.0.0.0, required are others"),
        ({"args": ["--api-key", "secret"]}, "args: found --api-key, required are others"),
    ],
)
def test_what_a_configuration_must_not_say(settings, problem):
    (found,) = Sglang(python=sys.executable, **settings).problems()
    assert found.startswith(f"rollout.sglang.{problem}")


def test_a_long_log_is_begun_anew_while_the_server_writes_on(tmp_path):
    port = free_port()
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    code = f"print('one' * 99, flush=True); open({str(fifo)!r}).read(); print('two', flush=True)"
    server = Server(
        [sys.executable, "-c", code], {}, url=url_of("127.0.0.1", port), log=tmp_path / "log", stall_seconds=5
    )
    wait_for(lambda: server.log.stat().st_size > 99)
    (tmp_path / "log.1").write_text("before")
    server.rotate_log(most_bytes=50)
    assert server.log.read_text() == "" and (tmp_path / "log.1").read_text() == "one" * 99 + "\n"
    assert (tmp_path / "log.2").read_text() == "before"
    fifo.write_text("")
    server.process.wait()
    assert server.log.read_text() == "two\n"
    server.rotate_log(most_bytes=50)
    assert server.log.read_text() == "two\n"


@pytest.mark.parametrize("text", ["", "[]", '{"url": 5}', '{"url": "nowhere"}', '{"url": "http://a:1", "starts": "x"}'])
def test_a_file_that_is_no_registration_is_named_and_skipped(tmp_path, text):
    notes: list[str] = []
    (tmp_path / "a.json").write_text(text)
    found = Registry(tmp_path, notes.append)
    assert found.look() == found.look() == {} and len(notes) == 1 and "a.json" in notes[0]
    (tmp_path / "b.json").write_text(json.dumps({"url": "https://[::1]:30000", "starts": 3, "beats": 9}))
    assert found.look() == {"https://[::1]:30000": Registration("https://[::1]:30000", 3, 9)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor": 4, "expert": 3}, "rollout.sglang.expert: found 3, required a divisor of rollout.sglang.tensor 4"),
        ({"mode": "colocated", "route": "receivers"}, "rollout.sglang.route: found receivers with mode colocated"),
        (
            {"mode": "remote", "route": "receivers", "urls": ["http://a:1"], "tensor": 2, "receivers": ["http://a:2"]},
            "rollout.sglang.receivers: found 1, required 2",
        ),
        ({"receivers": ["http://a:2"]}, "rollout.sglang.receivers: found 1, required 0"),
    ],
)
def test_a_route_of_receivers_that_cannot_be_is_refused(settings, message):
    (found,) = Sglang(python=sys.executable, **settings).problems()
    assert found.startswith(message)
