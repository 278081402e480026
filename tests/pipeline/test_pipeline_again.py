"""A pipeline that is looked at, made again in part, renamed and locked; what its manifests say is true."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import forked

from r1engine.config import ConfigError
from r1engine.config.pipeline import load_pipeline
from r1engine.pipeline.driver import check, set_aside

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "tests" / "killed.py"
FILE = """
stages:
  tiny: {stage: tiny, hidden_size: 32, layers: 1, intermediate_size: 64, texts: 48, heldout: 4}
  base: &base
    stage: sft
    threads: 1
    model: {path: tiny}
    data: {train: tiny/texts.jsonl, template: r1_zero, max_tokens: 64}
    sft: {epochs: 1, batch_size: 24}
    max_row_tokens: 512
    log: {tensorboard: false}
  second: {<<: *base, model: {path: base}}
  other: {<<: *base, seed: 3}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """A pipeline's file, and its folder: all of it but the last stage ran to the end."""
    file = tmp_path_factory.mktemp("pipeline") / "p.yaml"
    file.write_text(f"run_dir: {file.parent / 'run'}\n{FILE}")
    done = run(file, "--until", "second")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (file.parent / "run" / "other").exists()
    return file, file.parent / "run"


@pytest.fixture
def copied(finished, tmp_path) -> tuple[Path, Path]:
    """The same in a folder that may be changed."""
    shutil.copytree(finished[1], tmp_path / "run")
    (tmp_path / "p.yaml").write_text(finished[0].read_text().replace(str(finished[1]), str(tmp_path / "run")))
    return tmp_path / "p.yaml", tmp_path / "run"


def run(file: Path, *more: str, ranks: int = 1) -> subprocess.CompletedProcess:
    return forked(ranks, DRIVER, 0, 0, "pipeline", file, *more)


def recomputed(path: Path) -> str:
    """SHA-256 of an output, by the words of docs/pipeline.md."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    lines = b""
    for file in sorted(os.listdir(path)):
        content = (path / file).read_bytes()
        if file != "SHA256SUMS" and not file.startswith("."):
            digest = hashlib.sha256(content).hexdigest()
            if file.endswith(".safetensors") and not (path / "SHA256SUMS").exists():
                digest = hashlib.sha256(content[8 : 8 + int.from_bytes(content[:8], "little")]).hexdigest()
            lines += f"{digest}  {len(content)}  {file}\n".encode()
    return hashlib.sha256(lines).hexdigest()


def test_the_digests_of_the_manifests_are_those_of_the_files(finished):
    _, folder = finished
    paths = {"tiny": folder / "tiny" / "model", "base": folder / "base" / "model"}
    for name in ("tiny", "base", "second"):
        told = json.loads((folder / name / "stage.json").read_text())
        for made in told["outputs"].values():
            assert made["sha256"] == recomputed(folder / name / made["path"])
        for key, given in told["inputs"].items():
            path = paths[given["from"]] if key == "model.path" else folder / "tiny" / "texts.jsonl"
            assert given["sha256"] == recomputed(path)
    assert set(told["outputs"]) == {"model"} and told["counts"]["loss_last"] > 0


def test_a_look_at_it_loads_no_torch(finished):
    file, folder = finished
    for option, shown in (("--status", "second"), ("--dry-run", "to run"), ("--until=second", "done")):
        code = "import sys; from r1engine.cli import main; sys.argv = sys.argv[1:]\ntry: main()\nfinally: "
        code += "print('torch' in sys.modules, file=sys.stderr)"
        done = subprocess.run(
            [sys.executable, "-c", code, "r1engine", "pipeline", str(file), option],
            capture_output=True,
            text=True,
            env=os.environ | {"COLUMNS": "200"},
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1] == "False" and shown in done.stdout
    assert not (folder / "other").exists()


def test_the_status_tells_what_is_done_begun_and_changed(copied, capsys, monkeypatch):
    from r1engine.pipeline.status import print_status

    monkeypatch.setenv("COLUMNS", "200")
    file, folder = copied
    (folder / "other" / "checkpoints").mkdir(parents=True)
    print_status(load_pipeline(file, ["stages.second.seed=9"]))
    lines = {line.split()[0]: line.split()[2] for line in capsys.readouterr().out.splitlines()}
    assert lines == {"stage": "state", "tiny": "done", "base": "done", "second": "changed", "other": "begun"}


def test_redo_sets_a_stage_and_what_is_made_from_it_aside(copied):
    file, folder = copied
    made = json.loads((folder / "base" / "stage.json").read_text())
    done = run(file, "--redo", "base", "--until", "second", "stages.base.optimizer.lr=0.02")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in folder.glob("*/stage.json") for path in [path.parent]) == [
        "base", "base.1", "second", "second.1", "tiny",
    ]  # fmt: skip
    assert json.loads((folder / "base.1" / "stage.json").read_text()) == made
    assert json.loads((folder / "base" / "stage.json").read_text())["settings"]["optimizer.lr"] == 0.02
    pipeline = load_pipeline(file, [])
    assert [new.name for _, new in set_aside(pipeline, "base")] == ["second.2", "base.2"]  # the last ones first
    with pytest.raises(ConfigError, match=r"found no stage 'bas', required one of tiny, base, second, other"):
        set_aside(pipeline, "bas")


def test_a_change_tells_what_would_be_made_again(copied):
    file, _ = copied
    with pytest.raises(ConfigError, match=r"--redo base makes it again, and what is made from it \(second\)"):
        check(load_pipeline(file, ["stages.base.sft.epochs=2"]), 1)


def test_a_stage_that_was_renamed_in_the_file_is_named(copied):
    file, folder = copied
    file.write_text(file.read_text().replace("  second:", "  third:"))
    with pytest.raises(ConfigError, match=rf"stage third: {folder}/second, which no stage has for a name, is done"):
        check(load_pipeline(file, []), 1)
    (folder / "second").rename(folder / "second.1")
    assert [state for _, state in check(load_pipeline(file, []), 1)] == ["done", "done", "to run", "to run"]
    (folder / "second.1").rename(folder / "third")
    assert [state for _, state in check(load_pipeline(file, []), 1)] == ["done", "done", "done", "to run"]


def test_two_pipelines_in_one_folder_are_refused(copied):
    file, folder = copied
    with open(folder / ".lock", "w+b") as lock:
        lock.write(b"process 7 on node3")
        lock.flush()
        fcntl.lockf(lock, fcntl.LOCK_EX)
        done = run(file)
    assert done.returncode == 2 and f"run_dir: {folder} is in use by process 7 on node3" in done.stderr


def test_a_run_that_holds_its_folder_keeps_others_out(tmp_path):
    code = f"""
import torch, subprocess, sys
from pathlib import Path
from r1engine.ranks import World
from r1engine.run_lock import held
world = World(0, 1, torch.device("cpu"))
def main(inner):
    with held(Path({str(tmp_path)!r}), world):
        print("held", inner, flush=True)
        if not inner:
            subprocess.run([sys.executable, "-c", open(sys.argv[1]).read(), sys.argv[1], "inner"])
main(len(sys.argv) > 2)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script, script], capture_output=True, text=True)
    assert done.stdout == "held False\n" and "is in use by process" in done.stderr


def test_ranks_that_wait_for_the_first_end_with_it(copied):
    file, folder = copied
    shutil.rmtree(folder / "tiny")
    (folder / "tiny").mkdir()
    (folder / "tiny" / "texts.jsonl").mkdir()  # cannot be written
    done = run(file, "--until", "tiny", ranks=2)
    assert done.returncode in (1, 2)
    assert done.stderr.count(f"stage tiny: {folder}/tiny/texts.jsonl: Is a directory") == 1
    assert "Is a directory" in json.loads((folder / "tiny" / "failed.json").read_text())["error"]
    (folder / "tiny" / "texts.jsonl").rmdir()
    done = run(file, "--until", "tiny", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "tiny" / "stage.json").is_file() and not (folder / "tiny" / "failed.json").exists()
