"""A pipeline that runs: what is done is not run again, what has changed stops it, a killed one goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from ranks import forked

from r1engine.config import ConfigError
from r1engine.config.pipeline import load_pipeline
from r1engine.pipeline.driver import check, is_done

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "tests" / "killed.py"
FILE = """
stages:
  tiny: {stage: tiny, hidden_size: 32, layers: 1, intermediate_size: 64, texts: 96, heldout: 4}
  base:
    stage: sft
    threads: 1
    model: {path: tiny}
    data: {train: tiny/texts.jsonl, template: r1_zero, max_tokens: 64}
    sft: {epochs: 1, batch_size: 24}
    max_row_tokens: 512
    checkpoint: {every: 2}
    log: {tensorboard: false}
  zero:
    threads: 1
    steps: 2
    model: {path: base}
    data:
      train: tiny/train.jsonl
      more: [{path: tiny/heldout.jsonl, share: 0.5, from_step: 1}]
      max_prompt_tokens: 32
    rollout: {max_tokens: 16}
    grpo: {questions: 2, group_size: 4, minibatches: 1, kl_coef: 0.0, reference_every: 0}
    rewards: {workers: 1}
    log: {tensorboard: false}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "p.yaml"
    path.write_text(f"run_dir: {path.parent / 'run'}\n{FILE}")
    return path


def run(file: Path, *more: str, ranks: int = 1, kill: int = 0, at: int = 0) -> subprocess.CompletedProcess:
    return forked(ranks, DRIVER, kill, at, "pipeline", file, *more)


@pytest.fixture(scope="module")
def finished(file) -> Path:
    """The folder of a pipeline that ran to its end."""
    done = run(file)
    assert done.returncode == 0, done.stderr[-3000:]
    return file.parent / "run"


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(f): (f.stat().st_mtime_ns, f.read_bytes()) for f in sorted(folder.rglob("*")) if f.is_file()}


def test_every_stage_has_its_folder_and_its_manifest(finished):
    manifests = {name: json.loads((finished / name / "stage.json").read_text()) for name in ("tiny", "base", "zero")}
    assert [m["kind"] for m in manifests.values()] == ["tiny", "sft", "rl"]
    given = manifests["base"]["inputs"]["model.path"]
    assert given == {"from": "tiny", "sha256": manifests["tiny"]["outputs"]["model"]["sha256"]}
    assert (
        manifests["zero"]["inputs"]["data.more.0.path"]["sha256"] == manifests["tiny"]["outputs"]["heldout"]["sha256"]
    )
    assert manifests["zero"]["inputs"]["model.path"]["sha256"] == manifests["base"]["outputs"]["model"]["sha256"]
    assert manifests["zero"]["inputs"]["data.train"]["sha256"] == manifests["tiny"]["outputs"]["train"]["sha256"]
    for name in ("base", "zero"):
        assert (finished / name / "model" / "model.safetensors").is_file()
        assert (finished / name / "report.html").is_file()


def test_the_page_of_a_pipeline_leads_to_its_stages(finished):
    page = (finished / "report.html").read_text()
    assert "stages done <b>3 of 3</b>" in page and page.count("<path ") == 5
    assert "<title>tiny: data.train of base</title>" in page and 'href="base/report.html"' in page
    assert 'href="tiny/' not in page  # which has no page


def test_what_is_done_is_not_run_again(file, finished):
    before = contents(finished)
    done = run(file)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(finished) == before
    assert done.stdout.count("done") == 3


def test_a_layout_or_a_log_may_change(file, finished):
    pipeline = load_pipeline(
        file, ["stages.zero.parallel.tensor=1", "stages.base.log.samples=1", "stages.zero.threads=2"]
    )
    assert all(is_done(pipeline, stage) for stage in pipeline.stages)


@pytest.mark.parametrize(
    ("override", "stage", "message"),
    [
        ("stages.base.sft.epochs=2", "base", "sft.epochs: made with 1, found 2"),
        ("stages.zero.grpo.clip_eps=3", "zero", "grpo.clip_eps: made with 10.0, found 3"),
        ("seed=1", "tiny", "seed: made with 0, found 1"),
    ],
)
def test_changed_settings_stop_it_by_name(file, finished, override, stage, message):
    done = run(file, override)
    assert done.returncode == 2
    assert f"stage {stage} is done, but not with what is asked for: {message}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_changed_input_stops_it_by_name(file, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    train = tmp_path / "run" / "tiny" / "train.jsonl"
    train.write_text(train.read_text().replace("What is", "How much is", 1))
    pipeline = load_pipeline(file, [f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"stage zero is done, but not with .*: data.train: made from sha256 "):
        check(pipeline, 1)


def test_a_missing_input_is_named_before_anything_runs(file, tmp_path):
    done = run(file, f"run_dir={tmp_path / 'run'}", "stages.zero.data.heldout=/no/such.jsonl")
    assert done.returncode == 2
    assert "stage zero: data.heldout: found no file /no/such.jsonl" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_manifest_of_another_version_is_refused(file, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "tiny" / "stage.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 9'))
    with pytest.raises(ConfigError, match=r"stage.json: found format 9, required 2"):
        check(load_pipeline(file, [f"run_dir={tmp_path / 'run'}"]), 1)


@pytest.mark.parametrize("at", [pytest.param(at, marks=pytest.mark.turn(n)) for n, at in enumerate((1, 3, 5))])
def test_a_killed_pipeline_goes_on_and_makes_the_same_model(file, finished, tmp_path, at):
    # Updates 1 to 4 are those of the supervised stage, which checkpoints after the second; 5 and 6 of the last stage.
    folder = f"run_dir={tmp_path / 'run'}"
    assert run(file, folder, kill=signal.SIGKILL, at=at).returncode != 0
    assert (tmp_path / "run" / "base" / "stage.json").exists() == (at > 4)
    done = run(file, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("resumed from step_00000002" in done.stdout) == (at == 3)
    model = Path("zero") / "model" / "model.safetensors"
    assert (tmp_path / "run" / model).read_bytes() == (finished / model).read_bytes()


def test_several_ranks_run_the_same_pipeline(file, tmp_path):
    done = run(file, f"run_dir={tmp_path / 'run'}", "stages.base.parallel.tensor=2", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("[2/3] base (sft)") == 1
    assert (tmp_path / "run" / "zero" / "stage.json").is_file()


def test_a_layout_that_fits_no_ranks_is_refused_before_anything_runs(file, tmp_path):
    done = run(file, f"run_dir={tmp_path / 'run'}", "stages.zero.parallel.tensor=2")
    assert done.returncode == 2
    assert "tensor 2 x pipeline 1 = 2 does not divide the world size 1" in done.stderr
    assert not (tmp_path / "run").exists()
