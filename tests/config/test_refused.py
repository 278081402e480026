"""What is said of a config file that is refused: the file, its keys, its values, their combinations."""

from __future__ import annotations

import pytest
from config_files import SOURCES, problems
from pydantic import ValidationError

from r1engine.config import (
    ConfigError,
    RlConfig,
    check_files,
    load,
)
from r1engine.config.data_files import REQUIRED

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
        ("data: {more: 3}", "data.more: found 3, required a list, each a mapping with path, share"),
        ("data: {more: [3]}", "data.more.0: found 3, required a mapping with path, share"),
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
