"""The config file: what it gives, kinds of stages, and the ranks that it fits."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_files import SOURCES, problems
from pydantic import BaseModel

from r1engine.config import (
    KINDS,
    ConfigError,
    Grpo,
    RlConfig,
    SftConfig,
    StageConfig,
    TinyConfig,
    check_world,
    dump,
    load,
    to_yaml,
)
from r1engine.config.label import LabelConfig
from r1engine.config.read import parse
from r1engine.config.source import read_source
from r1engine.config.words import commented_defaults, section_of

# ---- what is accepted ------------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    cfg = RlConfig()
    assert (cfg.optimizer.lr, cfg.grpo.kl_coef, cfg.grpo.clip_eps, cfg.rollout.temperature) == (3e-6, 0.001, 10.0, 1.0)
    assert cfg.grpo.group_size == 16
    completions = cfg.grpo.questions * cfg.grpo.group_size
    assert completions == 8192
    assert completions // cfg.grpo.minibatches == 512  # 32 questions a step
    assert cfg.steps_per_rollout == 16  # one inner epoch
    assert (cfg.steps, cfg.grpo.reference_every) == (10_400, 400)
    assert [cfg.rollout.max_tokens_at(step) for step in (0, 8_199, 8_200)] == [32_768, 32_768, 65_536]


def test_exponent_without_a_point_is_a_number(write):
    # PyYAML, which reads YAML 1.1, makes a text of it.
    assert load(write(SOURCES + "optimizer: {lr: 3e-7}"), []).optimizer.lr == 3e-7


def test_overrides_are_yaml_and_the_last_one_wins(write):
    overrides = [
        "rollout.max_tokens={0: 32, 10: 64}",
        "checkpoint.resume=false",
        "seed=1",
        "seed=2",
        "data.train=a.jsonl",
    ]
    cfg = load(write(SOURCES + "seed: 0\ncheckpoint: {resume: true, keep: 5}"), overrides)
    assert cfg.rollout.max_tokens == {0: 32, 10: 64}
    assert (cfg.checkpoint.resume, cfg.checkpoint.keep, cfg.seed) == (False, 5, 2)
    assert cfg.data.train == Path("a.jsonl")


def test_override_opens_and_unsets_an_optional_section(write):
    judge = "rewards.judge={urls: [http://a], model: m}"
    assert load(write(SOURCES), [judge, "rewards.judge.tries=7"]).rewards.judge.tries == 7
    assert load(write(SOURCES + "rewards: {judge: null}"), [judge]).rewards.judge.urls == ["http://a"]
    assert load(write(SOURCES), [judge, "rewards.judge=null"]).rewards.judge is None


def test_dump_reads_back_equal(write, tmp_path):
    text = f"{SOURCES}optimizer: {{lr: 1e-9}}\nrun_dir: 'a: #b é'\n"
    text += "rollout: {max_tokens: {0: 8, 2: 16}}\nlog: {project: 'true'}"
    cfg = load(write(text), ["grpo.clip_eps_high=11"])
    dump(cfg, tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml", []) == cfg
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_printed_defaults_are_a_config_that_says_nothing_else(write, kind):
    text = commented_defaults(KINDS[kind])
    is_trained = issubclass(KINDS[kind], StageConfig)
    cfg = parse(read_source(write(text), ["model.path=/m", "data.train=/a.jsonl"] if is_trained else []))
    plain = to_yaml(KINDS[kind]())
    if is_trained:
        plain = plain.replace("path: null", "path: /m").replace("train: null", "train: /a.jsonl")
    assert to_yaml(cfg) == plain


def test_printed_defaults_have_words_choices_and_the_papers_value():
    text = commented_defaults(RlConfig)
    assert 'kl_coef: 0.001  # v2: "KL coefficient to 0.001"; 0 needs no reference model.' in text
    assert "experts: 'megatron'  # Who computes the layers with experts" in text
    assert "one of 'megatron', 'fused', 'fused_fp8'" in text
    assert "# Versions of the weights that a token may be behind when it is trained on." in text
    assert "lr: 5e-05" in commented_defaults(SftConfig)  # a stage's own default, not the section's


def undocumented(model: type[BaseModel], path: str) -> list[str]:
    """Keys without a help text; a section has its class's."""
    found = []
    for name, field in model.model_fields.items():
        section = section_of(field)
        found += undocumented(section, f"{path}.{name}") if section is not None else []
        if not (field.description or (section is not None and section.__doc__)):
            found.append(f"{path}.{name}")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_has_a_help_text(kind):
    assert undocumented(KINDS[kind], kind) == []


# ---- kinds of stages -------------------------------------------------------------------------------------------


def test_the_key_stage_chooses_the_class(write):
    assert type(load(write(SOURCES), [])) is RlConfig
    assert type(load(write(SOURCES + "stage: sft"), [])) is SftConfig
    assert type(parse(read_source(write("stage: tiny"), []))) is TinyConfig


def test_an_unknown_stage_is_refused(write):
    assert problems(write(SOURCES + "stage: dpo")) == [
        f"run.yaml:3: stage: found 'dpo', required one of {', '.join(KINDS)}"
    ]
    assert problems(write(SOURCES + "stage: [rl]"))[0].startswith("run.yaml:3: stage: found ['rl'], required one of")


def test_a_key_of_another_stage_says_whose_it_is(write):
    assert problems(write(SOURCES + "stage: sft\ngrpo: {clip_eps: 1}")) == [
        "run.yaml:4: unknown key grpo; it belongs to stage: rl"
    ]
    assert problems(write(SOURCES + "sft: {epochs: 3}")) == ["run.yaml:3: unknown key sft; it belongs to stage: sft"]
    assert problems(write(SOURCES), "data.max_tokens=3") == [
        "override 'data.max_tokens=3': unknown key data.max_tokens; it belongs to "
        "stage: sft or reward_model or process_reward"
    ]


def test_another_kind_of_stage_than_a_command_takes_is_refused(write):
    with pytest.raises(ConfigError, match=r"run.yaml:3: stage: found sft, required rl here"):
        load(write(SOURCES + "stage: sft"), [], RlConfig)
    assert load(write("model: {path: m}\nquestions: q.jsonl"), [], LabelConfig).stage == "label"
    with pytest.raises(ConfigError, match="stage: found tiny, required rl, sft, reward_model, process_reward here"):
        load(write("stage: tiny"), [])


def test_a_pipeline_is_no_stage(write):
    with pytest.raises(ConfigError, match=r"found a pipeline \(key `stages`\), required one stage; run it with"):
        load(write("run_dir: a\nstages: {}"), [])


def test_supervised_defaults_are_the_papers():
    cfg = SftConfig()
    assert (cfg.sft.epochs, cfg.sft.batch_size, cfg.data.max_tokens) == (2, 128, 32_768)
    ends = [cfg.optimizer.lr_at(step, 1001) for step in (0, 1000)]
    assert ends == pytest.approx([5e-5, 5e-6], rel=1e-3)


def test_a_text_longer_than_a_row_is_refused(write):
    assert problems(write(SOURCES + "stage: sft"), "data.max_tokens=65", "max_row_tokens=64") == [
        "max_row_tokens: found 64, required >= 65 = data.max_tokens 65 (a sequence is never split)"
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("heads: 3\nhidden_size: 96", "heads: found 3, required a multiple of kv_heads = 2"),
        (
            "hidden_size: 100",
            "hidden_size: found 100, required a multiple of 8 (heads 4, each of even size for the rotary embedding)",
        ),
    ],
)
def test_sizes_of_the_tiny_model_must_divide(write, setting, message):
    with pytest.raises(ConfigError) as caught:
        parse(read_source(write(f"stage: tiny\n{setting}"), []))
    assert caught.value.problems == [message]


# ---- paths and sizes -------------------------------------------------------------------------------------------


def test_home_folder_is_expanded(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert load(write(SOURCES + "run_dir: ~/runs"), []).run_dir == Path("/home/someone/runs")


def test_row_holds_the_longest_sequence_the_run_reaches():
    limits = {"max_tokens": {0: 30, 32: 60}}
    assert RlConfig(steps=32, rollout=limits, data={"max_prompt_tokens": 5}).row_tokens == 35
    assert RlConfig(steps=48, rollout=limits, data={"max_prompt_tokens": 5}).row_tokens == 65


# ---- the world -------------------------------------------------------------------------------------------------


def test_world_gives_the_data_parallel_size():
    assert check_world(RlConfig(parallel={"tensor": 2, "pipeline": 2}), 16) == 4
    assert check_world(RlConfig(parallel={"data": 4}), 4) == 4
    assert check_world(RlConfig(parallel={"tensor": 2, "context": 4}), 16) == 2


def test_world_that_does_not_fit_is_refused_with_all_numbers():
    with pytest.raises(ConfigError, match="tensor 2 x pipeline 2 = 4 does not divide the world size 6"):
        check_world(RlConfig(parallel={"tensor": 2, "pipeline": 2}), 6)
    with pytest.raises(ConfigError, match=r"parallel.data: found 3, required 4 = world size 8 / \(tensor 2 x pipe"):
        check_world(RlConfig(parallel={"tensor": 2, "data": 3}), 8)
    with pytest.raises(ConfigError, match="tensor 2 x pipeline 1 x context 3 = 6 does not divide the world size 8"):
        check_world(RlConfig(parallel={"tensor": 2, "context": 3}), 8)


@pytest.mark.parametrize(
    ("grpo", "steps", "step", "expected"),
    [
        (
            {},
            1_700,
            1_696,
            (4, 4, 128),
        ),  # v2's second stage: 106 rollouts of 16 steps and one of 4, 32 questions a step
        ({}, 1_700, 1_680, (16, 16, 512)),
        ({"questions": 4, "minibatches": 8, "inner_epochs": 2}, 21, 16, (5, 3, 2)),  # 3 mini-batches, one of them once
        ({"questions": 4, "minibatches": 1}, 3, 2, (1, 1, 4)),
    ],
)
def test_the_last_rollout_is_as_large_as_its_steps_need(grpo, steps, step, expected):
    cfg = RlConfig(steps=steps, grpo=Grpo(**grpo))
    assert (cfg.updates_at(step), cfg.minibatches_at(step), cfg.questions_at(step)) == expected


def test_batch_must_divide_over_the_ranks():
    cfg = RlConfig(steps=8, grpo=Grpo(questions=6, group_size=4, minibatches=8))
    assert check_world(cfg, 3) == 3
    with pytest.raises(ConfigError) as caught:
        check_world(cfg, 4)
    assert caught.value.problems == [
        "grpo.questions: found 6, required a multiple of the 4 data-parallel ranks",
        "grpo.minibatches: found 3 completions per mini-batch, required a multiple of the 4 data-parallel ranks",
    ]
