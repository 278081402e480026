"""Reward functions of the user: what they are told, what counts as a value, and what a bad one costs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import runpy
from pathlib import Path

import pytest
from reward_records import record
from typer.testing import CliRunner

from r1engine.batch import Completion, Prompt
from r1engine.cli import app
from r1engine.config import ConfigError, Grpo, Rewards, RlConfig, load_rewards
from r1engine.data.question import Question
from r1engine.grpo import total_rewards
from r1engine.observe.starts import read_starts, record_start
from r1engine.rewards import Score, Scorer, ScorerSettings
from r1engine.rewards.from_config import make_scorer
from r1engine.rewards.functions import FunctionSettings, fields_of, inside
from r1engine.stages.rl_metrics import rollout_metrics, silent_functions

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own_reward.py"

# Does what the completion says.
OWN = """
import os, sys, json, time
import beside

def act(completion, columns):
    if completion == "text":
        return "5"
    if completion == "nan":
        return float("nan")
    if completion == "raise":
        raise KeyError("x")
    if completion == "hang":
        time.sleep(1000)
    if completion == "kill":
        os._exit(9)
    if completion == "print":
        sys.stdout.write("x" * 5_000_000); os.write(1, b"y" * 5_000_000)
        return 0.25
    if completion == "break":
        json.dumps = None
        os.chdir("/"); sys.path.clear()
        return 0.125
    if completion == "variable":
        return float(os.environ.get("OWN_VARIABLE", -1))
    if completion == "column":
        return columns["level"]
    return beside.VALUE if completion == "beside" else None

def first_two(records):
    return [1.0, 0.0]

def everything(**fields):
    return float(sorted(fields) == sorted(fields["columns"]["expected"]))

def strange(completion, reference, weight=2): ...

def optional(completion, unheard_of=3):
    return unheard_of

def of_trl(completions, **kwargs): ...

async def waits(completion): ...
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "beside.py").write_text("VALUE = 0.5\n")
    (folder / "mine.py").write_text(OWN)
    return folder / "mine.py"


def scorer_of(path: Path, *names: str, deadline: float = 60.0, **settings) -> Scorer:
    functions = FunctionSettings({n: f"{path}:{n}" for n in names}, deadline_seconds=deadline, **settings)
    return Scorer(ScorerSettings(workers=1, deadline_seconds=60, functions=functions))


@pytest.fixture(scope="module")
def acting(own):
    os.environ["OWN_VARIABLE"] = "7"
    with scorer_of(own, "act", deadline=3.0, variables=("OWN_VARIABLE",)) as scorer:
        yield scorer
    del os.environ["OWN_VARIABLE"]


@pytest.mark.parametrize(
    ("completion", "value", "why"),
    [
        ("beside", 0.5, ""),
        ("none", None, "it returned None"),
        ("text", None, "it returned a str ('5'), required a number or None"),
        ("nan", None, "it returned nan"),
        ("raise", None, "KeyError: 'x'"),
        ("hang", None, "no result within 3 s"),
        ("kill", None, "the worker exited with status 9"),
        ("print", 0.25, ""),
        ("variable", 7.0, ""),
        ("column", 3.0, ""),
        ("break", 0.125, ""),  # the last: this worker is of no use any more
    ],
)
def test_only_a_finite_number_is_a_value(acting, completion, value, why):
    found = acting.score([record("functions", completion, columns={"level": 3})])[0]
    assert found.components.get("act") == value and found.unknown == ({} if why == "" else {"act": why})
    wanted = "undecided" if value is None else "right" if value >= 0.5 else "wrong"
    assert found.verdict == wanted and why in found.reason


def test_a_function_breaks_nobody_else(acting):
    # json.dumps and the working directory are gone in the worker of `act`; the rule for mathematics has its own.
    broken, whole = acting.score([record("functions", "break"), record("math", "\\boxed{1+x}", "x+1")])
    assert broken.unknown | whole.unknown  # the broken worker says so, or has been replaced
    assert whole.components["accuracy"] == 1.0 and whole.verdict == "right"


def test_a_missing_value_is_undecided_only_where_it_has_a_weight(acting):
    (score,) = acting.score([record("math", "raise", "5")])
    assert score.verdict == "wrong" and score.reason.endswith("; act: KeyError: 'x'")
    assert score.is_undecided({"act": 0.5}) and not score.is_undecided({"act": 0.0, "accuracy": 1.0})


def test_completions_of_a_question_come_together_and_a_list_of_another_length_gives_none(own):
    with scorer_of(own, "first_two") as scorer:
        twice = [record("functions", text, question="a") for text in "xy"]
        once = [record("functions", "z", question="b")]
        found = scorer.score([*twice, *once])
    assert [score.components.get("first_two") for score in found] == [1.0, 0.0, None]
    assert found[2].unknown == {"first_two": "ValueError: it returned 2 values, required 1: one a record"}


def test_any_keyword_gets_all_fields_and_optional_ones_keep_their_defaults(own):
    with scorer_of(own, "everything", "optional") as scorer:
        (score,) = scorer.score([record("functions", "x", columns={"expected": list(inside.FIELDS)})])
    assert score.components == {"format": 0.0, "everything": 1.0, "optional": 3.0}


def test_fields_are_those_of_the_completion():
    told = fields_of(record("math", "We add.</think><answer>\\boxed{5}</answer>", "4", prompt="2+2 <think>"))
    assert (told["thoughts"], told["final_answer"], told["answer"]) == ("We add.", "5", "4")
    assert told["question"] == "2+2 <think>" and tuple(told) == inside.FIELDS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", r"mine.py: found no function 'gone', only act, first_two, everything, strange, optional"),
        ("strange", r"mine.py:strange: found the parameter reference, required some of question, answer, "),
        ("of_trl", r"mine.py:of_trl: found the parameter completions, required some of question, answer, "),
        ("waits", r"mine.py:waits: found an async function, required a plain one"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_it_is(own, name, message):
    with scorer_of(own, name) as scorer, pytest.raises(ValueError, match=rf"rewards.functions.{name}: .*{message}"):
        scorer.check_functions()


def test_a_file_that_ends_the_program_is_named(tmp_path):
    (tmp_path / "ends.py").write_text("import sys; sys.exit('not today')")
    with scorer_of(tmp_path / "ends.py", "f") as scorer, pytest.raises(ValueError, match=r"functions.f: .*not today"):
        scorer.check_functions()
    with pytest.raises(ValueError, match=r"rewards.functions.f: found no file .*gone.py, required PATH.py:FUNCTION"):
        scorer_of(tmp_path / "gone.py", "f")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["functions={accuracy: a.py:f}"], "functions.accuracy: found a name of the engine's own"),
        (["functions={f: a.txt:f}"], "functions.f: found 'a.txt:f', required PATH.py:FUNCTION"),
        (["functions={F-1: a.py:f}"], "found the name 'F-1', required small letters"),
        (["function_weights={g: 1.0}"], r"function_weights.g: found no such function in rewards.functions, only \[\]"),
        (["functions={f: a.py:f}", "function_weights={f: {5: 1.0}}"], r"found the steps \[5\], required 0"),
        (["functions={f: 5}"], "functions"),
    ],
)
def test_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_rewards(settings)


def test_weights_are_one_unless_they_are_given():
    rewards = Rewards(functions={"f": "a.py:f", "g": "a.py:g"}, function_weights={"g": {0: 0.0, 4: 0.5}})
    assert rewards.weights_at(3)["f"] == 1.0 and rewards.weights_at(3)["g"] == 0.0
    assert rewards.weights_at(4)["g"] == 0.5


def test_example_is_tried_offline(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    completions = ["<answer>5</answer>", "<answer>7</answer>", "<answer>x</answer>", "5 - 1 = 4, or 9"]
    lines = [json.dumps({"question": "2+3?", "answer": 5, "completion": text}) for text in completions]
    source.write_text("\n".join(lines))
    arguments = ["reward", str(source), "--out", str(out), "--function", f"{EXAMPLE}:close"]
    done = CliRunner().invoke(app, [*arguments, "--function", f"{EXAMPLE}:rare", "rewards.workers=1"])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["components"].get("close") for row in rows] == [1.0, pytest.approx(1 / 3), None, 0.2]
    assert [row["components"]["rare"] for row in rows] == [1.0] * 4
    assert [row["verdict"] for row in rows] == ["right", "wrong", "undecided", "wrong"]
    assert runpy.run_path(str(EXAMPLE))["close"](None, "none", "5") == 0.0
    assert rows[2]["unknown"] == {"close": "it returned None"} and math.isclose(rows[0]["score"], 1.0)


def test_scorer_of_a_configuration_calls_them():
    rewards = load_rewards([f"functions.close={EXAMPLE}:close", "workers=1"])
    with make_scorer(rewards) as scorer:
        (score,) = scorer.score([record("math", "<think>a</think><answer>6</answer>", "5")])
    assert score.components == {"format": 1.0, "accuracy": 0.0, "close": 0.5}


def test_a_start_records_the_source_and_the_next_tells_that_it_changed(tmp_path):
    (tmp_path / "own.py").write_text("def f(completion): return 1.0\n")
    cfg = RlConfig(run_dir=tmp_path, rewards=Rewards(functions={"f": f"{tmp_path}/own.py:f"}))
    assert record_start(cfg, step=0, ranks=1) == []
    assert record_start(cfg, step=2, ranks=1) == []
    (tmp_path / "own.py").write_text("def f(completion): return 2.0\n")
    assert record_start(cfg, step=4, ranks=1) == ["the source of rewards.functions.f"]
    digests = [start["functions"]["f"] for start in read_starts(tmp_path)]
    assert digests[0] == digests[1] != digests[2] == hashlib.sha256((tmp_path / "own.py").read_bytes()).hexdigest()


def test_the_total_is_unknown_without_a_value_that_has_a_weight():
    prompt = Prompt(0, [1], "p", Question("q"))
    texts = [Completion(prompt, i, [1], [0.0], "t", truncated=False) for i in range(2)]
    scores = [
        Score("right", {"accuracy": 1.0, "f": 0.5}, ""),
        Score("right", {"accuracy": 1.0}, "", unknown={"f": "?"}),
    ]
    graded = list(zip(texts, scores, strict=True))
    assert total_rewards(graded, Grpo(), {"accuracy": 1.0, "f": 0.5, "overlong": 0.0}) == [1.25, None]
    assert total_rewards(graded, Grpo(), {"accuracy": 1.0, "f": 0.0, "overlong": 0.0}) == [1.0, 1.0]
    metrics = rollout_metrics(graded, [1.25, None], {"f": 0.5})
    assert (metrics["reward/undecided"], metrics["reward/f"], metrics["reward/mean"]) == (0.5, 0.5, 1.25)
    assert silent_functions(graded) == []
    assert silent_functions(graded[1:]) == ["rewards.functions.f gave no value for any of 1 completions: ?"]
