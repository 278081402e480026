"""The pipeline file: stages in order, references upwards, and what is said of what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1engine.config import ConfigError, RlConfig, SftConfig, TinyConfig
from r1engine.config.pipeline import Pipeline, load_pipeline
from r1engine.pipeline import manifest

ROOT = Path(__file__).resolve().parents[2]
GOOD = """
run_dir: runs/p
seed: 5
stages:
  tiny: {stage: tiny, heads: 2}
  base: {stage: sft, model: {path: tiny}, data: {train: tiny/texts.jsonl}}
  zero: {stage: rl, seed: 7, model: {path: base}, data: {train: tiny/train.jsonl, heldout: /data/heldout.jsonl}}
"""


@pytest.fixture
def write(tmp_path):
    def to_file(text: str) -> Path:
        path = tmp_path / "p.yaml"
        path.write_text(text)
        return path

    return to_file


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path, list(overrides))
    return [line.replace(f"{path}", "p.yaml") for line in caught.value.problems]


def named(pipeline: Pipeline) -> dict[str, RlConfig | SftConfig | TinyConfig]:
    return {stage.name: stage.cfg for stage in pipeline.stages}


def test_a_stage_takes_what_an_earlier_one_made(write):
    pipeline = load_pipeline(write(GOOD), [])
    stages = named(pipeline)
    assert list(stages) == ["tiny", "base", "zero"]
    assert [type(cfg) for cfg in stages.values()] == [TinyConfig, SftConfig, RlConfig]
    assert {name: cfg.run_dir for name, cfg in stages.items()} == {name: Path("runs/p") / name for name in stages}
    assert [cfg.seed for cfg in stages.values()] == [5, 5, 7]
    assert stages["base"].model.path == Path("runs/p/tiny/model")
    assert stages["zero"].model.path == Path("runs/p/base/model")
    assert stages["zero"].data.train == Path("runs/p/tiny/train.jsonl")
    assert stages["zero"].data.heldout == Path("/data/heldout.jsonl")
    assert pipeline.stages[2].needs == {"model.path": "base", "data.train": "tiny"}


def test_overrides_reach_a_stage(write):
    pipeline = load_pipeline(write(GOOD), ["stages.zero.grpo.group_size=4", "seed=1", "run_dir=/r"])
    assert named(pipeline)["zero"].grpo.group_size == 4
    assert named(pipeline)["tiny"].seed == 1
    assert named(pipeline)["base"].model.path == Path("/r/tiny/model")


def test_a_stage_may_start_from_a_file(write, tmp_path):
    (tmp_path / "rl.yaml").write_text("run_dir: alone\nsteps: 32\ngrpo: {questions: 8, minibatches: 1}\n")
    text = GOOD.replace("stage: rl,", f"config: {tmp_path / 'rl.yaml'}, grpo: {{group_size: 4}},")
    cfg = named(load_pipeline(write(text), ["stages.zero.steps=64"]))["zero"]
    assert (cfg.grpo.questions, cfg.grpo.group_size, cfg.grpo.minibatches, cfg.steps) == (8, 4, 1, 64)
    assert cfg.run_dir == Path("runs/p/zero")
    (tmp_path / "rl.yaml").write_text("grpo:\n  klcoef: 8\n")
    assert problems(write(text)) == [
        f"stage zero: {tmp_path / 'rl.yaml'}:2: unknown key grpo.klcoef; did you mean 'kl_coef'?"
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stage: sft", "stage: dpo", "stage base: p.yaml:6: stage: found 'dpo', required one of rl, sft"),
        ("path: tiny}", "path: zero}", "required one above 'base': stages run in the order of the file"),
        ("path: tiny}", "path: base}", "stage base: p.yaml:6: model.path: found stage 'base', required one above"),
        ("heads: 2", "grpo: {}", "stage tiny: p.yaml:5: unknown key grpo; it belongs to stage: rl"),
        ("seed: 7", "run_dir: x", "p.yaml:7: stages.zero.run_dir: a stage's folder is run_dir/zero"),
        ("heads: 2", "config: /no.yaml", "/no.yaml: found no such file, required a YAML config file"),
        ("heads: 2", "config: [1]", "p.yaml:5: stages.tiny.config: found [1], required a path"),
        ("  tiny: {", "  ../tiny: {", "p.yaml:5: stages: found the name '../tiny', required"),
        ("model: {path: tiny}, ", "", "stage base: model.path: found null, required a Hugging Face folder"),
        ("seed: 5", "sed: 5", "p.yaml:3: unknown key sed; did you mean 'seed'?"),
        ("run_dir: runs/p", "", "run_dir: found nothing, required a path"),
    ],
)
def test_a_wrong_file_is_refused_with_stage_and_line(write, old, new, message):
    assert message in problems(write(GOOD.replace(old, new)))[0]


def test_stages_must_be_there(write):
    assert problems(write("run_dir: r\nstages: {}")) == ["p.yaml:2: stages: found none, required at least one"]
    assert "stages: found 3, required" in problems(write("run_dir: r\nstages: 3"))[0]
    assert "stages: found {a: 3}" in problems(write("run_dir: r\nstages: {a: 3}"))[0]


def test_the_shipped_demos_can_be_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("demo", "demo_moe"):
        assert list(named(load_pipeline(Path(f"configs/{name}.yaml"), []))) == ["tiny", "base", "r1_zero"]


def test_references_reach_into_lists_and_name_only_what_a_stage_makes(write):
    text = GOOD.replace("heldout: /data/heldout.jsonl", "heldout: tin/heldout.jsonl")
    assert (
        "data.heldout: found 'tin/heldout.jsonl', required a path or a stage above; did you mean 'tiny'?"
        in (problems(write(text))[0])
    )
    text = GOOD.replace("train: tiny/train.jsonl", "train: base")
    assert "data.train: 'base' (stage: sft) gives model, required data" in problems(write(text))[0]


def test_a_pattern_of_files_is_an_input_by_content(write, tmp_path):
    (tmp_path / "model").mkdir()
    values = f"model: {{path: {tmp_path}/model}}, data: {{train: '{tmp_path}/part_*.jsonl'}}"
    stage = load_pipeline(write(f"run_dir: {tmp_path}\nstages: {{base: {{stage: sft, {values}}}}}"), []).stages[0]
    with pytest.raises(
        ConfigError, match=r"stage base: data.train: found no .*part_\*.jsonl, required a file or a folder"
    ):
        manifest.inputs(stage)
    found = []
    for number in range(2):
        (tmp_path / f"part_{number}.jsonl").write_text("{}")
        found.append(manifest.inputs(stage)["data.train"]["sha256"])
    assert found[0] != found[1]


def test_a_stage_may_start_from_several_files(write, tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 32\ngrpo: {questions: 8, minibatches: 1}\n")
    (tmp_path / "b.yaml").write_text("grpo: {questions: 4}\n")
    text = GOOD.replace("stage: rl,", f"config: [{tmp_path / 'a.yaml'}, {tmp_path / 'b.yaml'}],")
    cfg = named(load_pipeline(write(text), []))["zero"]
    assert (cfg.steps, cfg.grpo.questions, cfg.grpo.minibatches) == (32, 4, 1)


def test_the_stages_that_are_made_from_one_are_known(write):
    pipeline = load_pipeline(write(GOOD), [])
    assert [stage.name for stage in pipeline.after("tiny")] == ["base", "zero"]
    assert [stage.name for stage in pipeline.until("base").stages] == ["tiny", "base"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "[{path: tiny/a.jsonl, share: 2}]",
            "data.more.0.share: found 2, required a number > 0 and <= 1",
        ),
        ("[{paht: a.jsonl, share: 0.5}]", "unknown key data.more.0.paht; did you mean 'path'?"),
        ("[{path: a.jsonl, share: 0.6}, {path: b.jsonl, share: 0.6}]", "data.more: found shares of 1.2 in all"),
        ("[{path: a.txt, share: 0.6}]", "data.more.0.path: found a.txt, required a .jsonl"),
    ],
)
def test_wrong_shares_are_named(write, more, message):
    found = problems(write(GOOD.replace("heldout: /data/heldout.jsonl", f"more: {more}")))
    assert any(message in line for line in found), found


@pytest.mark.parametrize("name", ["tiny_r1", "r1"])
def test_the_paper_as_a_pipeline_resolves(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    stages = named(load_pipeline(Path(f"configs/{name}.yaml"), []))
    assert [stage for stage in stages if stage in ("r1_zero", "dev1", "dev2", "dev3", "r1")] == [
        "r1_zero", "dev1", "dev2", "dev3", "r1",
    ]  # fmt: skip
    assert stages["r1"].rollout.temperature == 0.7
