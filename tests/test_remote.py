"""Checkpoints in object storage: whole or absent, by digests, and brought back when the folder is empty."""

import json
import threading
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from r1engine import checkpoint
from r1engine.config import Checkpoint, ConfigError
from r1engine.remote import Remote
from r1engine.saving import Saving


class Broken(MemoryFileSystem):
    """A store that refuses some calls."""

    protocol = "broken"
    store: dict = {}  # noqa: RUF012 (as of the class above)
    pseudo_dirs = [""]  # noqa: RUF012
    refused: str = ""

    def ls(self, path, detail=True, **kwargs):
        self._refuse("list")
        return super().ls(path, detail=detail, **kwargs)

    def put_file(self, lpath, rpath, **kwargs):
        self._refuse(f"put {rpath.rpartition('/')[2]}")
        return super().put_file(lpath, rpath, **kwargs)

    def _refuse(self, call: str) -> None:
        if call == self.refused:
            raise PermissionError(f"403 {call}")


fsspec.register_implementation("broken", Broken, clobber=True)


@pytest.fixture
def store():
    for kind in (MemoryFileSystem, Broken):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    Broken.refused = ""


def save(saving: Saving, run_dir, step: int, score: float = 0.0) -> None:
    partial = checkpoint.begin(run_dir, step)
    (partial / "model").mkdir()
    (partial / "model" / "shard").write_bytes(b"%d" % step * 1000)
    saving.start(partial, {"step": step, "scores": {"eval/pass_at_1": score}})
    saving.settle()


def begun(run_dir, url: str, **settings) -> tuple[Saving, Path | None, list[str]]:
    """A run's, the checkpoint that it goes on from, and what it has told."""
    notes: list[str] = []
    saving = Saving(Checkpoint(remote=url, **settings), run_dir, notes.append)
    return saving, saving.newest(), notes


def test_a_run_on_another_machine_goes_on_from_there(store, tmp_path):
    settings = {"keep": 2, "best": "eval/pass_at_1"}
    saving, folder, notes = begun(tmp_path / "a", "memory://bucket/run", **settings)
    assert folder is None
    for step, score in enumerate([0.1, 0.9, 0.2, 0.3], start=1):
        save(saving, tmp_path / "a", step, score)
    saving.check_uploaded()
    assert notes == []
    assert saving.remote.complete() == ["step_00000004", "step_00000003", "step_00000002"]  # two, and the best one

    other, folder, notes = begun(tmp_path / "b", "memory://bucket/run", **settings)
    assert notes == [] and folder == tmp_path / "b" / "checkpoints" / "step_00000004"
    assert (folder / "model" / "shard").read_bytes() == b"4" * 1000
    assert checkpoint.newest_complete(tmp_path / "b", print) == folder
    save(other, tmp_path / "b", 5, 0.4)
    assert checkpoint.best(tmp_path / "b").name == "step_00000002"
    with pytest.raises(
        ConfigError, match=r"memory://bucket/run holds checkpoints up to step_00000005, and checkpoint\.re"
    ):
        begun(tmp_path / "c", "memory://bucket/run", resume=False)
    with pytest.raises(ConfigError, match=r"run_dir: .* holds checkpoints up to step_00000005"):
        begun(tmp_path / "b", "memory://bucket/run", resume=False)


def test_a_step_saved_again_replaces_the_old_one(store, tmp_path):
    for run in ("a", "b"):
        saving, *_ = begun(tmp_path / run, "memory://bucket/run")
        save(saving, tmp_path / run, 1, {"a": 0.1, "b": 0.2}[run])
    _, folder, _ = begun(tmp_path / "c", "memory://bucket/run")
    assert checkpoint.read_state(folder)["scores"] == {"eval/pass_at_1": 0.2}


def test_what_is_damaged_there_is_passed_over_by_its_digest(store, tmp_path):
    saving, *_ = begun(tmp_path / "a", "memory://bucket/run")
    for step in (1, 2):
        save(saving, tmp_path / "a", step)
    files = fsspec.filesystem("memory")
    files.pipe_file("/bucket/run/step_00000002/model/shard", b"2" * 999 + b"3")
    _, folder, notes = begun(tmp_path / "b", "memory://bucket/run")
    assert folder.name == "step_00000001"
    assert len(notes) == 1 and "step_00000002/model/shard has SHA-256" in notes[0].replace(".partial", "").replace(
        "/.", "/"
    )
    manifest = json.loads(files.cat_file("/bucket/run/step_00000001/manifest.json"))
    manifest["files"]["../../../evil"] = manifest["files"]["model/shard"]
    files.pipe_file("/bucket/run/step_00000001/manifest.json", json.dumps(manifest).encode())
    files.store["/bucket/run/step_00000001/../../../evil"] = files.store["/bucket/run/step_00000001/model/shard"]
    with pytest.raises(RuntimeError, match=r"has 2 checkpoint\(s\), none is whole"):
        begun(tmp_path / "c", "memory://bucket/run")
    assert not (tmp_path / "evil").exists()


def test_an_upload_that_breaks_off_does_not_count_and_is_tried_again(store, tmp_path):
    saving, _, notes = begun(tmp_path / "a", "broken://bucket/run")
    save(saving, tmp_path / "a", 1)
    Broken.refused = "put manifest.json"
    save(saving, tmp_path / "a", 2)
    assert len(notes) == 1 and "step_00000002: cannot be uploaded: PermissionError: 403" in notes[0]
    with pytest.raises(RuntimeError, match="cannot be uploaded"):
        saving.check_uploaded()
    assert begun(tmp_path / "b", "broken://bucket/run")[1].name == "step_00000001"
    Broken.refused = ""
    save(saving, tmp_path / "a", 3)
    saving.check_uploaded()
    assert saving.remote.complete() == ["step_00000003", "step_00000001"]
    assert "step_00000002" not in saving.remote._names()  # what was not whole is gone


def test_a_store_that_forbids_listing_is_named_before_the_run(store, tmp_path):
    Broken.refused = "list"
    with pytest.raises(
        ConfigError, match=r"^checkpoint\.remote: broken://bucket/run: cannot list there \(PermissionError"
    ):
        begun(tmp_path, "broken://bucket/run")


@pytest.mark.parametrize("url", ["nosuch://bucket", "s3x://b/c"])
def test_an_address_without_a_protocol_is_named(url):
    with pytest.raises(ConfigError, match=r"checkpoint\.remote: found .*; required an address of fsspec"):
        Remote(url)


def test_what_a_run_changes_meanwhile_is_not_in_the_checkpoint(store, tmp_path, monkeypatch):
    go_on, commit = threading.Event(), checkpoint.commit
    monkeypatch.setattr(checkpoint, "commit", lambda *arguments: (go_on.wait(), commit(*arguments))[1])
    saving = Saving(Checkpoint(), tmp_path, print)
    state = {"step": 1, "on_the_way": [1]}
    saving.start(checkpoint.begin(tmp_path, 1), state)
    state["on_the_way"].append(2)
    assert not saving.settle(0.01)
    assert checkpoint.newest_complete(tmp_path, lambda text: None) is None  # the run goes on before it is committed
    go_on.set()
    assert saving.settle()
    assert checkpoint.read_state(checkpoint.newest_complete(tmp_path, print))["on_the_way"] == [1]


def test_a_commit_that_fails_is_raised_once(store, tmp_path):
    saving, *_ = begun(tmp_path, "memory://bucket/run")
    partial = checkpoint.begin(tmp_path, 1)
    saving.start(partial, {"step": float("nan")})
    with pytest.raises(ValueError, match=r"NaN|Out of range"):
        saving.settle()
    saving.settle()
    assert checkpoint.newest_complete(tmp_path, print) is None


@pytest.fixture
def bucket(monkeypatch):
    """An S3 server of this process; a run under the key "reader" may write and read, and not list."""
    pytest.importorskip("s3fs")
    server_of = pytest.importorskip("moto.server").ThreadedMotoServer
    boto3 = pytest.importorskip("boto3")
    server = server_of(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", url := f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    use_key(monkeypatch, "admin", "secret")
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield url
    server.stop()


def use_key(monkeypatch, key: str, secret: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    fsspec.filesystem("s3").clear_instance_cache()


def test_an_s3_server_holds_a_run(bucket, tmp_path):
    saving, _, notes = begun(tmp_path / "a", "s3://bucket/runs/one", keep=1)
    for step in (1, 2):
        save(saving, tmp_path / "a", step)
    saving.check_uploaded()
    assert notes == [] and saving.remote.complete() == ["step_00000002"]
    _, folder, _ = begun(tmp_path / "b", "s3://bucket/runs/one")
    assert (folder / "model" / "shard").read_bytes() == b"2" * 1000


def test_an_s3_bucket_that_forbids_listing_is_named(bucket, tmp_path, monkeypatch):
    import urllib.request

    import boto3

    allowed = {"Effect": "Allow", "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"], "Resource": "*"}
    iam = boto3.client("iam")
    iam.create_user(UserName="reader")
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
    iam.put_user_policy(UserName="reader", PolicyName="files", PolicyDocument=policy)
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    request = urllib.request.Request(f"{bucket}/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"})
    urllib.request.urlopen(request).close()  # from here on rights are looked at
    use_key(monkeypatch, key["AccessKeyId"], key["SecretAccessKey"])
    with pytest.raises(ConfigError, match=r"s3://bucket/runs/one: cannot list there \(PermissionError"):
        begun(tmp_path, "s3://bucket/runs/one")
