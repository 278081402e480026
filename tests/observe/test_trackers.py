"""Trackers get every row and sample, keep their run over a resume, and never end ours; Prometheus reads the newest row.

The packages are the real ones, offline; a test is skipped where its package is not installed.
"""

import json
import sqlite3
import urllib.request
from pathlib import Path

import pytest

from r1engine.config import ConfigError, SftConfig
from r1engine.config import read as config_read
from r1engine.observe import trackers
from r1engine.observe.exporter import Exporter
from r1engine.observe.metrics import MetricsLog
from r1engine.observe.trackers import Tracker, Trackers


def open_trackers(run_dir: Path, name: str, *, is_resumed: bool = False) -> Trackers:
    def note(text: str) -> None:
        raise AssertionError(text)

    return Trackers([name], "r1", run_dir, {"seed": 0, "optimizer": {"lr": 1e-6}}, is_resumed=is_resumed, note=note)


def write(run_dir: Path, name: str, step: int, *, is_resumed: bool = False) -> str:
    """One step of a run -> the tracker's name for it."""
    opened = open_trackers(run_dir, name, is_resumed=is_resumed)
    opened.log(step, {"reward/mean": 0.515625 + step / 4})
    opened.samples(step, [{"prompt": "1+1?", "completion": f"of {step}", "group": [{"reward": 1.0}]}])
    opened.close()
    return (run_dir / "trackers" / f"{name}.id").read_text()


def test_wandb_gets_every_row_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = [write(tmp_path, "wandb", 1), write(tmp_path, "wandb", 2, is_resumed=True)]
    assert ids[0] == ids[1]
    wandb.teardown()  # its process writes on after `finish`, until then
    written = [file.read_bytes() for file in sorted(tmp_path.glob(f"wandb/offline-run-*/run-{ids[0].strip()}.wandb"))]
    assert [(b"reward/mean" in data, b"0.765625" in data, b"1.015625" in data) for data in written] == [
        (True, True, False),
        (True, False, True),
    ]
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/table/samples_*"))) == 2


def test_mlflow_gets_every_row_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for tests; MLflow's servers are where people log to
    mlflow.set_tracking_uri(f"file://{tmp_path}/store")
    ids = [write(tmp_path, "mlflow", 1), write(tmp_path, "mlflow", 2, is_resumed=True)]
    assert ids[0] == ids[1]
    client = mlflow.MlflowClient()
    history = client.get_metric_history(ids[0].strip(), "reward/mean")
    assert [(found.step, found.value) for found in history] == [(1, 0.765625), (2, 1.015625)]
    assert client.get_run(ids[0].strip()).data.params == {"seed": "0", "optimizer.lr": "1e-06"}
    assert len(client.list_artifacts(ids[0].strip(), "samples")) == 2


def test_trackio_gets_every_row(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # read when it is imported
    pytest.importorskip("trackio")
    assert write(tmp_path, "trackio", 1) == write(tmp_path, "trackio", 2, is_resumed=True)
    write(tmp_path, "trackio", 3)  # a fresh run in a folder of this name
    with sqlite3.connect(tmp_path / "store" / "r1.db") as store:
        found = [
            (run, step, json.loads(row))
            for run, step, row in store.execute("SELECT run_id, step, metrics FROM metrics")
        ]
    rows = [(step, row["reward/mean"]) for _, step, row in found if "reward/mean" in row]
    assert rows == [(1, 0.765625), (2, 1.015625), (3, 1.265625)]
    tables = [row["samples"]["_value"] for _, _, row in found if "samples" in row]
    assert tables[1] == [{"prompt": "1+1?", "completion": "of 2", "group": '[{"reward": 1.0}]'}] and len(tables) == 3
    assert len({run for run, step, _ in found if step < 3}) == 1 and len({run for run, _, _ in found}) == 2


def test_swanlab_gets_every_row(tmp_path, monkeypatch):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    assert write(tmp_path, "swanlab", 1) == write(tmp_path, "swanlab", 2, is_resumed=True)
    written = [file.read_bytes() for file in sorted(tmp_path.glob("swanlab/run-*/*.swanlab"))]
    assert [b"reward/mean" in data for data in written] == [True, True]
    assert [file.read_text() for file in sorted(tmp_path.glob("swanlab/run-*/media/text/*"))] == ["of 1", "of 2"]


def test_a_tracker_that_fails_is_let_go_of_and_named_once(tmp_path, monkeypatch):
    seen = []

    def fails(row: dict[str, float], step: int) -> None:
        seen.append(step)
        raise ConnectionError("no route to host")

    fake = Tracker(fails, fails, lambda: seen.append("closed"), "7")  # a server that goes away
    monkeypatch.setitem(trackers.OPENERS, "wandb", lambda run: fake)
    notes: list[str] = []
    log = MetricsLog(tmp_path, tensorboard=False, resume_step=None)
    log.follow(Trackers(["wandb"], "r1", tmp_path, {}, is_resumed=False, note=notes.append))
    for step in (1, 2):
        log.log(step, {"loss": 0.5})
        log.log_samples(step, [{"completion": "x"}])
    log.close()
    assert seen == [1]
    assert notes == ["log.trackers: wandb failed (ConnectionError: no route to host); the run goes on without it"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_tracker_that_cannot_be_opened_ends_the_start(tmp_path, monkeypatch):
    def refuses(run: object) -> Tracker:
        raise ValueError("no API key")

    monkeypatch.setitem(trackers.OPENERS, "wandb", refuses)
    with pytest.raises(RuntimeError, match=r"log.trackers: wandb cannot be opened: ValueError: no API key"):
        Trackers(["wandb"], "r1", tmp_path, {}, is_resumed=False, note=print)


def test_a_package_that_is_missing_is_named_before_the_start(monkeypatch):
    monkeypatch.setattr(config_read.importlib.util, "find_spec", lambda name: None)
    cfg = SftConfig(log={"trackers": ["mlflow"], "prometheus_port": 0})
    with pytest.raises(ConfigError) as found:
        config_read.check_files(cfg)
    for package in ("mlflow", "prometheus_client"):
        assert f"log: found no package {package}, required by its keys; `pip install" in str(found.value)


def test_prometheus_reads_the_newest_row():
    parser = pytest.importorskip("prometheus_client.parser")
    exporter = Exporter("127.0.0.1", 0, "demo")
    try:
        exporter.log(1, {"reward/mean": 0.25, "eval/pass_at_1": 0.5})
        exporter.log(2, {"reward/mean": 0.75, "kl": float("nan")})
        with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=30) as reply:
            families = list(parser.text_string_to_metric_families(reply.read().decode()))
        with pytest.raises(RuntimeError, match=r"log.prometheus_port: cannot listen on 127.0.0.1:\d+: Address already"):
            Exporter("127.0.0.1", exporter.port, "second")
    finally:
        exporter.close()
    found = {family.name: family.samples[0] for family in families}
    assert found["r1engine_step"].value == 2 and found["r1engine_reward_mean"].value == 0.75
    assert found["r1engine_eval_pass_at_1"].labels == {"run": "demo"}
    assert found["r1engine_logged_timestamp_seconds"].value > 1.7e9 and "r1engine_kl" not in found
