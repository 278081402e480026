"""The launcher starts a killed run again, and goes on with the node that is left."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from cases import DRIVER, Case, logged, same_run
from ranks import torchrun


@pytest.mark.rotating
def test_torchrun_starts_a_killed_run_again_three_times(case, undisturbed, tmp_path):
    done = case.run(tmp_path, ranks=2, start=partial(torchrun, restarts=3), kill=signal.SIGKILL, at="3,6,2")
    assert done.returncode == 0, done.stderr[-3000:]
    same_run(case.undisturbed_on(2), tmp_path)
    starts = json.loads((tmp_path / "provenance.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 0, 4, 4]  # the first one was killed before a checkpoint


@pytest.mark.rotating
def test_torchrun_goes_on_with_the_node_that_is_left(case, undisturbed, tmp_path):
    """Two agents of `--nnodes 1:2` stand for two nodes. One is lost after update 6, with the rank that it started."""
    if case.kind != "sft":
        pytest.skip("minutes of waiting for launchers; one kind is enough")
    first, second = (agent(case, tmp_path, kill, at) for kill, at in ((0, 0), (signal.SIGKILL, 6)))
    try:
        (rank,) = children(second.pid)
        while Path(f"/proc/{rank}/stat").read_text().split(") ")[1][0] != "Z":
            time.sleep(0.02)
        os.killpg(second.pid, signal.SIGKILL)  # before it starts its rank again
        assert first.wait(timeout=400) == 0
    finally:
        for process in (first, second):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    starts = json.loads((tmp_path / "provenance.json").read_text())["starts"]
    assert [(start["ranks"], start["step"]) for start in starts] == [(2, 0), (1, 4)]
    found, expected = logged(tmp_path)[0], logged(undisturbed)[0]
    assert [row["step"] for row in found] == [row["step"] for row in expected]


def agent(case: Case, run_dir: Path, kill: int, at: int) -> subprocess.Popen:
    """A node's torchrun. The first of them keeps the store, and the other one waits for it: both start at once."""
    meeting = case.folder / "port"
    if not meeting.exists():
        with socket.create_server(("127.0.0.1", 0)) as free:
            meeting.write_text(str(free.getsockname()[1]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
    command += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{meeting.read_text()}"]
    rendezvous = f"last_call_timeout=20,keep_alive_interval=1,read_timeout=120,is_host={int(at == 0)}"
    command += ["--rdzv-conf", rendezvous, "--monitor-interval", "3"]
    command += [str(word) for word in (DRIVER, kill, at, "train", case.config, *case.settings, f"run_dir={run_dir}")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    log = (run_dir.parent / f"{run_dir.name}-{at}.log").open("w")
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=log)


def children(pid: int) -> list[str]:
    """Processes that it has started, once there are some."""
    end = time.monotonic() + 300
    while not (found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found
