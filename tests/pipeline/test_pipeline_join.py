"""Launches that join each other share a pipeline's stages out, and make what one launch makes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from ranks import forked, on_ranks

from r1engine.config import ConfigError
from r1engine.config.pipeline import load_pipeline
from r1engine.pipeline import driver
from r1engine.pipeline.claims import LOCKS, Claims
from r1engine.pipeline.companions import companions

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "tests" / "killed.py"
FILE = """
stages:
  tiny: {stage: tiny, hidden_size: 32, layers: 1, intermediate_size: 64, texts: 96, heldout: 4}
  base: &base
    stage: sft
    threads: 1
    model: {path: tiny}
    data: {train: tiny/texts.jsonl, template: r1_zero, max_tokens: 64}
    sft: {epochs: 1, batch_size: 24}
    max_row_tokens: 512
    checkpoint: {every: 2}
    log: {tensorboard: false}
  other: {<<: *base, seed: 1}
  second: {<<: *base, model: {path: base}}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "p.yaml"
    path.write_text(f"run_dir: {path.parent / 'run'}\n{FILE}")
    return path


@pytest.fixture(scope="module")
def weights(file) -> dict[str, bytes]:
    """What one launch makes."""
    done = forked(1, DRIVER, 0, 0, "pipeline", file)
    assert done.returncode == 0, done.stderr[-3000:]
    return models(file.parent / "run")


def models(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name / "model" / "model.safetensors").read_bytes() for name in ("base", "other", "second")}


class Launch(threading.Thread):
    """A launch that joins, beside this thread; `done` is there when it has ended."""

    def __init__(self, file: Path, folder: Path, *, kill: int = 0, at: int = 0) -> None:
        super().__init__()
        self._arguments = (kill, at, "pipeline", file, f"run_dir={folder}", "--join", "1")
        self.done: subprocess.CompletedProcess
        self.start()

    def run(self) -> None:
        self.done = forked(1, DRIVER, *self._arguments)


def test_two_launches_make_what_one_makes_and_each_stage_once(file, weights, tmp_path):
    launches = [Launch(file, tmp_path / "run") for _ in range(2)]
    for launch in launches:
        launch.join()
        assert launch.done.returncode == 0, launch.done.stderr[-3000:]
    assert models(tmp_path / "run") == weights
    told = "".join(launch.done.stdout for launch in launches)
    assert [told.count(f"{name} is done in") for name in ("tiny", "base", "other", "second")] == [1, 1, 1, 1]


def test_a_stage_goes_on_in_another_launch_when_its_own_is_killed(file, weights, tmp_path):
    killed = Launch(file, tmp_path / "run", kill=signal.SIGKILL, at=3)  # in `base`, behind a checkpoint
    lock = tmp_path / "run" / LOCKS / "base"
    while not (lock.is_file() and lock.read_bytes()):
        assert killed.is_alive()
        time.sleep(0.02)
    launch = Launch(file, tmp_path / "run")
    killed.join()
    launch.join()
    assert killed.done.returncode == -signal.SIGKILL
    assert launch.done.returncode == 0, launch.done.stderr[-3000:]
    assert models(tmp_path / "run") == weights


def test_a_launch_takes_what_is_ready_and_what_no_other_has(file, weights, tmp_path):
    pipeline = load_pipeline(file, [f"run_dir={tmp_path}"])
    (tmp_path / "tiny").symlink_to(file.parent / "run" / "tiny")  # done
    folder = tmp_path / LOCKS
    folder.mkdir()
    script = "import sys; from pathlib import Path; from r1engine.run_lock import locked\n"
    script += "lock = locked(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(folder / "base")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        claims = Claims(pipeline, partial(driver.is_done, pipeline))
        assert claims.take() == "other"  # not `second`, which is made from `base`
        assert claims.waits_for() == f"base (process {other.pid} on {socket.gethostname()})"
        claims.give_back()
        other.kill()
    assert claims.take() == "base" and not claims.are_done()
    claims.give_back()


def test_a_stage_that_is_done_with_other_settings_stops_a_launch_that_joins(file, weights, tmp_path):
    shutil.copytree(file.parent / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "base")
    path = tmp_path / "p.yaml"  # with other settings than `second` has
    path.write_text(file.read_text().replace("sft: {epochs: 1,", "optimizer: {lr: 0.01}\n    sft: {epochs: 1,"))
    shutil.rmtree(tmp_path / "run" / "other")
    done = forked(1, DRIVER, 0, 0, "pipeline", path, f"run_dir={tmp_path / 'run'}", "--join", "1")
    assert done.returncode == 2 and "stage second is done, but not with what is asked for" in done.stderr


def test_a_rank_that_fails_alone_tells_why(file, weights, tmp_path):
    (tmp_path / "tiny").symlink_to(file.parent / "run" / "tiny")
    done = forked(2, DRIVER, -1, 1, "pipeline", file, f"run_dir={tmp_path}", "--join", "1", "--until", "base")
    assert done.returncode == 1 and "error: OSError: a node is ill" in done.stderr


def join(file: Path) -> None:
    driver.run_pipeline(load_pipeline(file, []), joins=True)


def test_a_launch_that_ends_writes_the_page_of_what_others_have_made(file, weights):
    page = file.parent / "run" / "report.html"
    page.unlink()
    on_ranks(1, join, file)
    assert "4 of 4" in page.read_text()


def test_a_plain_launch_and_one_that_joins_keep_each_other_out(file, weights, tmp_path):
    script = "import sys, torch; from pathlib import Path\n"
    script += "from r1engine.ranks import World; from r1engine.run_lock import held\n"
    script += "with held(Path(sys.argv[1]), World(0, 1, torch.device('cpu')), is_shared=sys.argv[2] == 'joins'):\n"
    script += "    print('held', flush=True); sys.stdin.read()"
    for how, joins in (("joins", ()), ("plain", ("--join", "1"))):
        command = [sys.executable, "-c", script, str(tmp_path / how), how]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout.readline() == "held\n"
            done = forked(1, DRIVER, 0, 0, "pipeline", file, f"run_dir={tmp_path / how}", *joins)
            assert done.returncode == 2 and f"is in use by process {other.pid} on " in done.stderr
            other.stdin.close()


def test_a_launch_starts_others_that_join(file, tmp_path):
    command = [sys.executable, "-m", "r1engine", "pipeline", str(file), "--join", "2", "--until", "tiny", "--"]
    done = subprocess.run([*command, f"run_dir={tmp_path}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
    told = done.stdout + (tmp_path / "process_2.log").read_text()
    assert told.count("tiny is done in") == 1


def test_processes_are_for_one_machine_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ConfigError, match="--join: found 2 under torchrun; required --join 1"),
        companions(tmp_path, 2),
    ):
        pass
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(ConfigError, match="--join: found a GPU"), companions(tmp_path, 2):
        pass
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("shutil.which", lambda name: None)
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"--join: .*/file: File exists; required a folder"),
        companions(tmp_path / "file", 2),
    ):
        pass


def test_a_process_that_is_killed_is_told(tmp_path, monkeypatch, capfd):
    script = tmp_path / "killed"
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with companions(tmp_path, 2):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    assert capfd.readouterr().err == f"process 2 ended with status -9: {tmp_path}/process_2.log\n"


def test_a_stage_is_not_made_again_by_launches_that_join(file):
    done = forked(1, DRIVER, 0, 0, "pipeline", file, "--join", "1", "--redo", "base")
    assert done.returncode == 2 and "--redo: found processes that join" in done.stderr
