"""The servers' key: made once, readable by its owner alone, on no command line, asked for by every port we open."""

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import sleeping_server
from ranks import on_ranks

from r1engine.config import RlConfig
from r1engine.rollout.sglang import launch, open_servers
from r1engine.rollout.sglang.client import Client, ServerError
from r1engine.rollout.sglang.key import key_in, key_of, run_key
from r1engine.rollout.sglang.open_servers import OpenServers


def make(run_dir: Path, found: Path) -> None:
    """What each of several ranks does at the same time."""
    (found / str(os.getpid())).write_text(key_of(run_key(run_dir)))


def test_a_run_has_one_key_whoever_makes_it_and_only_its_owner_reads_it(tmp_path):
    found = tmp_path / "found"
    found.mkdir()
    on_ranks(2, make, tmp_path, found)
    keys = {file.read_text() for file in found.iterdir()}
    assert len(keys) == 1 and len(keys.pop()) == 64
    path = run_key(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600 and len(list(path.parent.iterdir())) == 1
    path.chmod(0o640)
    with pytest.raises(ValueError, match=r"key.yaml has mode 640, required 600: chmod 600"):
        key_of(path)
    path.chmod(0o600)
    path.write_text("something else")
    with pytest.raises(ValueError, match=r"key.yaml holds no key, required a line 'api-key: ...'"):
        key_of(path)


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("R1_SERVERS_KEY", raising=False)
    assert key_in("") == ""
    with pytest.raises(ValueError, match="the environment variable R1_SERVERS_KEY is not set, required the servers'"):
        key_in("R1_SERVERS_KEY")


def test_a_server_of_a_run_answers_nobody_without_the_key(folders, tmp_path, monkeypatch):
    command = launch.command
    start = [sys.executable, sleeping_server.__file__]
    monkeypatch.setattr(launch, "command", lambda *a, **options: [*start, *command(*a, **options)[3:]])
    monkeypatch.setattr(launch, "check_environment", lambda python: "0.5.23")
    sglang = {"python": sys.executable, "stall_seconds": 30}
    cfg = RlConfig(
        run_dir=tmp_path, model={"path": folders["qwen2"][0]}, rollout={"engine": "sglang", "sglang": sglang}
    )
    server = launch.start(cfg, name="server", host="127.0.0.1", port=None, devices=None, dtype="float32")
    try:
        server.wait_ready(60)
        assert server.client.get("/server_info")["skip_tokenizer_init"]
        key = key_of(run_key(tmp_path))
        words = Path(f"/proc/{server.process.pid}/cmdline").read_text() + Path(
            f"/proc/{server.process.pid}/environ"
        ).read_text(errors="replace")
        assert key not in words and "--api-key" not in words
        for wrong in ("", "another"):
            with pytest.raises(ServerError, match=r"HTTP 401 \(rollout.sglang.key_variable names the variable"):
                Client(server.client.url, stall_seconds=30, key=wrong).get("/server_info")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{server.client.url}/release_memory_occupation", data=b"{}", timeout=30)
    finally:
        server.stop()


def test_servers_that_other_machines_reach_are_refused_without_a_key(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(open_servers, "check_environment", lambda python: "0.5.23")
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    for host in ("0.0.0.0", "10.0.0.7", "node3"):
        wanted = OpenServers(folders["qwen2"][0], Path(sys.executable), tmp_path, host=host)
        with pytest.raises(
            ValueError,
            match=rf"serve: found host {host} and no key, required one in the environment variable SGLANG_API",
        ):
            wanted.start(print)
