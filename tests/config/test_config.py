"""The config file: what is accepted, and what is said of what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from r1engine.config import (
    KINDS,
    ConfigError,
    Grpo,
    RlConfig,
    SftConfig,
    StageConfig,
    TinyConfig,
    check_files,
    check_world,
    dump,
    load,
    to_yaml,
)
from r1engine.config.data_files import REQUIRED
from r1engine.config.read import parse
from r1engine.config.source import read_source
from r1engine.config.words import commented_defaults, section_of

SOURCES = "model: {path: /m}\ndata: {train: /a.jsonl}\n"


@pytest.fixture
def write(tmp_path):
    def to_file(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides))
    return [line.replace(f"{path}", "run.yaml") for line in caught.value.problems]


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


# ---- what is refused: the file ---------------------------------------------------------------------------------


def test_missing_file_and_folder_are_named(tmp_path):
    assert problems(tmp_path / "no.yaml") == ["run.yaml: found no such file, required a YAML config file"]
    assert "found a folder" in problems(tmp_path)[0]


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_empty_file_is_refused(write, text):
    assert problems(write(text)) == ["run.yaml: found an empty file, required a mapping of config keys"]


@pytest.mark.parametrize("text", ["- 1\n- 2", "just text", "3"])
def test_top_level_that_is_no_mapping_is_refused(write, text):
    assert "at the top level, required a mapping of config keys" in problems(write(text))[0]


def test_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as UTF-8" in problems(tmp_path / "run.yaml")[0]


def test_broken_yaml_names_the_line(write):
    assert problems(write("seed: 1\ngrpo: {questions: 3\n"))[0].startswith("run.yaml:3: not valid YAML: ")


def test_duplicate_keys_name_both_lines(write):
    text = "seed: 1\ngrpo:\n  kl_coef: 0.1\n  clip_eps: 1\n  kl_coef: 0.2\nseed: 3\nseed: 4\n"
    assert problems(write(text)) == [
        "run.yaml:5: duplicate key grpo.kl_coef, first on line 3",
        "run.yaml:6: duplicate key seed, first on line 1",
        "run.yaml:7: duplicate key seed, first on line 1",
    ]


def test_anchor_that_contains_itself_is_refused(write):
    assert "an anchor contains itself" in problems(write("grpo: &a\n  x: *a\n"))[0]


def test_yaml_tag_builds_no_python_object(write):
    assert "not valid YAML" in problems(write("run_dir: !!python/object/apply:os.getcwd []"))[0]


# ---- what is refused: keys -------------------------------------------------------------------------------------


def test_unknown_key_gets_a_suggestion(write):
    assert problems(write("seed: 1\ngrpo:\n  klcoef: 0.1\n")) == [
        "run.yaml:3: unknown key grpo.klcoef; did you mean 'kl_coef'?"
    ]


def test_unknown_key_of_another_section_is_found_there(write):
    assert problems(write("group_size: 4")) == ["run.yaml:1: unknown key group_size; did you mean 'grpo.group_size'?"]


def test_unknown_key_like_no_other_lists_the_keys(write):
    assert problems(write("log: {zzzz: 1}")) == [
        "run.yaml:1: unknown key log.zzzz; the keys of log are tensorboard, trackers, project, prometheus_port, "
        "prometheus_host, report_seconds, samples"
    ]


def test_key_that_is_no_text_is_unknown(write):
    assert "unknown key grpo.7" in problems(write("grpo: {7: 1}"))[0]


def test_unknown_override_names_the_override(write):
    assert problems(write(SOURCES), "grpo.klcoef=1") == [
        "override 'grpo.klcoef=1': unknown key grpo.klcoef; did you mean 'kl_coef'?"
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed': required the form key.sub=value"),
        ("=3", "override '=3': required the form key.sub=value"),
        ("grpo..x=3", "override 'grpo..x=3': required the form key.sub=value"),
        ("seed=", "override 'seed=': found no value, required one (key=null unsets)"),
        ("seed.x=3", "override 'seed.x=3': seed is 1, required a mapping"),
    ],
)
def test_malformed_override_is_refused(write, override, message):
    assert problems(write("seed: 1"), override) == [message]


def test_broken_override_value_is_refused(write):
    assert "not valid YAML" in problems(write(SOURCES), "seed={")[0]
    assert "duplicate key 0" in problems(write(SOURCES), "rollout.max_tokens={0: 1, 0: 2}")[0]


# ---- what is refused: values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1.5", "steps: found 1.5, required a whole number >= 1"),
        ("steps: '16'", "steps: found '16', required a whole number >= 1"),
        ("steps: true", "steps: found true, required a whole number >= 1"),
        ("run_dir: 3", "run_dir: found 3, required a path"),
        ("run_dir: null", "run_dir: found null, required a path"),
        ("checkpoint: {resume: 'yes'}", "checkpoint.resume: found 'yes', required true or false"),
        ("rollout: {oversample: 3}", "rollout.oversample: found 3, required a number >= 1 and <= 2"),
        ("rollout: {top_p: 0}", "rollout.top_p: found 0, required a number > 0 and <= 1"),
        ("optimizer: {lr: .inf}", "optimizer.lr: found inf, required a number > 0"),
        ("optimizer: {beta1: 1}", "optimizer.beta1: found 1, required a number >= 0.0 and < 1.0"),
        ("grpo: {group_size: 1}", "grpo.group_size: found 1, required a whole number >= 2"),
        (
            "grpo: {advantage: foo}",
            "grpo.advantage: found 'foo', required one of 'mean_std', 'mean', 'rloo', 'batch_std'",
        ),
        ("grpo: {clip_eps_high: a}", "grpo.clip_eps_high: found 'a', required a number > 0 or null"),
        ("log: 3", "log: found 3, required a mapping (leave the key out to take the defaults)"),
        (
            "rollout: {max_tokens: {0: 0}}",
            "rollout.max_tokens: found {0: 0}, required a whole number >= 1 or "
            "a mapping from a whole number to a whole number >= 1",
        ),
    ],
)
def test_wrong_value_says_what_was_found_and_what_is_required(write, text, message):
    assert problems(write(text)) == [f"run.yaml:1: {message}"]


def test_all_problems_are_listed_at_once(write):
    path = write("steps: 0\ngrpo:\n  klcoef: 1\n  clip_eps: -1\n")
    assert problems(path, "seed=-1") == [
        "override 'seed=-1': seed: found -1, required a whole number >= 0",
        "run.yaml:1: steps: found 0, required a whole number >= 1",
        "run.yaml:4: grpo.clip_eps: found -1, required a number > 0",
        "run.yaml:3: unknown key grpo.klcoef; did you mean 'kl_coef'?",
    ]
    with pytest.raises(ConfigError, match=r"^4 problems in the config:\n  override"):
        load(path, ["seed=-1"])


def test_long_values_are_cut(write):
    assert all(len(line) < 200 for line in problems(write(f"seed: {'x' * 1000}")))


def test_an_override_hides_where_the_file_set_the_key(write):
    assert problems(write("steps: 0"), "steps=-3")[0].startswith("override 'steps=-3': steps: found -3")
    section = problems(write("grpo:\n  questions: 4\n"), "grpo={questions: 0}")
    assert section[0].startswith("override 'grpo={questions: 0}': grpo.questions: found 0")


def test_values_are_read_only():
    with pytest.raises(ValidationError, match="frozen"):
        RlConfig().grpo.kl_coef = 0.1


# ---- what is refused: combinations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["grpo.questions=3", "grpo.group_size=5"],
            "grpo: 3 questions x 5 samples = 15 completions do not split into 16 mini-batches",
        ),
        (["rollout.max_tokens={5: 3}"], "rollout.max_tokens: a schedule needs an entry for step 0"),
        (["rollout.max_tokens={0: 3, -1: 3}"], "rollout.max_tokens: found step -1, required steps >= 0"),
        (["optimizer.warmup_steps=99", "steps=16"], "optimizer.warmup_steps: found 99, required <= steps = 16"),
        (
            ["rewards.accuracy=0", "rewards.format=0"],
            "rewards: all of accuracy, format, language, length, overlong, repetition, helpfulness, harmlessness "
            "weigh 0, required one other than 0",
        ),
        (
            ["max_row_tokens=100", "rollout.max_tokens=90", "data.max_prompt_tokens=11"],
            "max_row_tokens: found 100, required >= 101 = data.max_prompt_tokens 11 + rollout.max_tokens 90 "
            "(a sequence is never split)",
        ),
        (
            ["max_row_tokens=101", "rollout.max_tokens=90", "data.max_prompt_tokens=11", "parallel.context=4"],
            "max_row_tokens: found 101, required >= 104 = data.max_prompt_tokens 11 + rollout.max_tokens 90 "
            "(a sequence is never split; in this layout rows are of a multiple of 8 tokens)",
        ),
        (
            ["rollout.oversample=1.5", "rollout.max_staleness=1"],
            "rollout.oversample: found 1.5 with max_staleness 1, required max_staleness >= 2: what is not finished is "
            "carried over, and dropping it would favour short completions",
        ),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(write, overrides, message):
    assert problems(write(SOURCES), *overrides) == [message]


def test_a_row_may_hold_exactly_the_longest_sequence(write):
    load(write(SOURCES), ["max_row_tokens=101", "rollout.max_tokens=90", "data.max_prompt_tokens=11"])


def test_a_row_of_no_set_size_holds_the_longest_sequence_and_its_padding():
    numbers = {"rollout": {"max_tokens": 90}, "data": {"max_prompt_tokens": 11}}
    rows = {RlConfig(parallel=par, **numbers).row_tokens for par in ({}, {"tensor": 2, "sequence": False})}
    assert rows == {101}
    assert RlConfig(parallel={"context": 4}, **numbers).row_tokens == 104
    assert RlConfig(parallel={"context": 4, "tensor": 2}, **numbers).row_tokens == 112
    assert RlConfig(model={"fp8": True}, **numbers).row_tokens == 128


def test_model_and_data_must_be_named(write):
    assert problems(write("seed: 1")) == [
        "run.yaml: model.path: found null, required a Hugging Face folder",
        "run.yaml: data.train: found null, required a data file",
    ]


def test_data_files_are_of_a_known_kind_and_different(write):
    data = ["model.path=/m", "data.train=/a.csv", "data.heldout=/a.csv"]
    assert problems(write("seed: 1"), *data) == [
        f"run.yaml: data.train: found /a.csv, required {REQUIRED}",
        f"run.yaml: data.heldout: found /a.csv, required {REQUIRED}",
        "run.yaml: data.heldout: found data.train = /a.csv itself, required other rows",
    ]


def test_missing_input_files_are_all_named():
    cfg = RlConfig(model={"path": "/no/model"}, data={"train": "/no/a.jsonl", "heldout": "/no/b.jsonl"})
    with pytest.raises(ConfigError) as caught:
        check_files(cfg)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["model.path", "data.train", "data.heldout"]


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
