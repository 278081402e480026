"""A server as a child process: its start, its log in errors, its end. The processes stand in for SGLang."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import real

from r1engine.config import RlConfig
from r1engine.rollout.sglang import launch
from r1engine.rollout.sglang.server import Server, check_environment, check_nccl, free_port

# Answers every GET with 200 after it has started a child that ignores SIGTERM.
ANSWERS = """
import http.server, signal, subprocess, sys
ignore = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", ignore])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def start(tmp_path: Path, code: str) -> Server:
    port = free_port()
    command = [sys.executable, "-c", code, str(port)]
    return Server(command, {}, url=f"http://127.0.0.1:{port}", log=tmp_path / "server.log", stall_seconds=5.0)


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may end before or while it is read
        return False


def test_stop_ends_the_whole_tree_even_what_ignores_sigterm_or_is_stopped(tmp_path):
    server = start(tmp_path, ANSWERS)
    server.wait_ready(60.0)
    child = int(server.log.read_text().split()[1])
    os.kill(server.process.pid, signal.SIGSTOP)
    server.stop(grace_seconds=0.5)
    assert not exists(child) and not server.is_running


def test_a_server_is_no_rank_of_the_trainer(tmp_path, monkeypatch):
    told = (
        "RANK",
        "LOCAL_RANK",
        "GROUP_WORLD_SIZE",
        "MASTER_PORT",
        "TORCHELASTIC_USE_AGENT_STORE",
        "TORCHELASTIC_RUN_ID",
    )
    for name in (*told, "OF_THE_USER"):
        monkeypatch.setenv(name, "1")
    server = start(tmp_path, "import os; print(*os.environ)")
    server.process.wait()
    found = server.log.read_text().split()
    assert "OF_THE_USER" in found and "PATH" in found and not {*told} & {*found}


def test_a_start_that_fails_shows_the_last_lines_of_the_log(tmp_path):
    server = start(tmp_path, "print('line one'); raise SystemExit('CUDA out of memory: tried to allocate')")
    with pytest.raises(
        RuntimeError, match=r"(?s)ended with status 1; it ran out of memory: lower rollout.sglang.*line one"
    ):
        server.wait_ready(60.0)


def test_a_start_that_takes_too_long_is_given_up(tmp_path):
    server = start(tmp_path, "import time; print('loading', flush=True); time.sleep(60)")
    with pytest.raises(RuntimeError, match=r"is not ready after \d+ s"):
        server.wait_ready(1.0)
    assert not server.is_running


def test_a_taken_port_is_named(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 is in use"):
            Server(["true"], {}, url=f"http://127.0.0.1:{port}", log=tmp_path / "log", stall_seconds=1.0)


def test_a_server_dies_with_a_trainer_that_is_killed(tmp_path):
    code = f"""
import os, signal, sys
from pathlib import Path
from r1engine.rollout.sglang.server import Server, free_port
port = free_port()
server = Server([sys.executable, "-c", "import time; time.sleep(60)"], {{}}, url=f"http://127.0.0.1:{{port}}",
                log=Path({str(tmp_path / "log")!r}), stall_seconds=1.0)
print(server.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    end = time.monotonic() + 30.0
    while exists(pid):
        assert time.monotonic() < end, f"process {pid} is still there"


def test_an_environment_without_sglang_gets_the_install_command(tmp_path):
    with pytest.raises(ValueError, match=r"found no .*python.*pip install sglang==0.5.23"):
        check_environment(tmp_path / "python")
    with pytest.raises(ValueError, match=r"has no sglang; install it: .*pip install sglang==0.5.23"):
        check_environment(Path(sys.executable))


@pytest.mark.parametrize(
    ("packages", "wanted", "named"),
    [
        ({}, [], None),
        ({"nvidia-nccl-cu13": "2.29.7"}, ["nvidia-nccl-cu13"], None),
        ({"nvidia-nccl-cu13": "2.30.7"}, ["nvidia-nccl-cu13"], "nvidia-nccl-cu13"),
        ({"nvidia_nccl_cu12": "2.30.7"}, ["nvidia-nccl-cu12"], "nvidia-nccl-cu12"),
        ({"nvidia-nccl-cu12": "2.29.7.post1"}, ["nvidia-nccl-cu12"], None),
        # Two are installed: torch's is what counts.
        ({"nvidia-nccl-cu12": "2.29.7", "nvidia-nccl-cu13": "2.30.7"}, ["nvidia-nccl-cu13"], "nvidia-nccl-cu13"),
        ({"nvidia-nccl-cu12": "2.30.7", "nvidia-nccl-cu13": "2.29.7"}, ["nvidia-nccl-cu13"], None),
        ({"nvidia-nccl-cu13": "2.30.7"}, [], None),  # torch has its own, which is not known
    ],
)
def test_two_versions_of_nccl_are_named_before_they_meet(tmp_path, packages, wanted, named):
    needs = "".join(f'Requires-Dist: {name}==2.30.7; platform_system == "Linux"\n' for name in wanted)
    for name, version, more in [("torch", "2.14.1", needs), *((n, v, "") for n, v in packages.items())]:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}")
    python = tmp_path / "python"  # of an environment that has these packages alone
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH={tmp_path}\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    refused = pytest.raises(
        ValueError, match=rf"NCCL 2\.29\.7 here and 2\.30\.7 in .*--no-deps {named}==2\.29\.7; or another route"
    )
    with refused if named else contextlib.nullcontext():
        check_nccl(python, (2, 29, 7))


@pytest.mark.parametrize(("rope", "given"), [(None, None), ("yarn", 512), ("linear", None)])
def test_a_server_is_started_with_the_context_that_yarn_makes(tmp_path, rope, given):
    config = {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 128}
    scaling = {"rope_type": rope, "factor": 4.0, "original_max_position_embeddings": 128} if rope else None
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    cfg = RlConfig(model={"path": tmp_path}, rollout={"engine": "sglang", "sglang": {"python": sys.executable}})
    words = launch.command(cfg, host="127.0.0.1", port=1, dtype="float32", on_gpu=True)
    assert given == (int(words[words.index("--context-length") + 1]) if "--context-length" in words else None)


def test_dynamic_scaling_is_refused_since_servers_compute_it_otherwise(folders, tmp_path):
    folder = shutil.copytree(folders["llama"][0], tmp_path / "model")
    path = folder / "config.json"
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": rope}))
    with pytest.raises(
        ValueError, match=r"config\.json: rope_type 'dynamic', required is another one with rollout\.engine"
    ):
        real.generator(folder, ["http://127.0.0.1:1"], tmp_path)
