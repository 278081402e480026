"""Evaluations of a folder from beginning to end: what they draw, that they go on, and what they refuse."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import ranks
import torch
from model_folders import save_model
from tokenizers import Tokenizer, pre_tokenizers

from r1engine.config import ConfigError, Data, Model, RlConfig, Rollout
from r1engine.config.evaluation import Suite, load_suite
from r1engine.data.chat import make_format
from r1engine.evaluation.entries import load_entries
from r1engine.evaluation.evaluate import evaluate, table_rows
from r1engine.evaluation.in_training import RunningSampler
from r1engine.evaluation.store import Store
from r1engine.hf.folder import weights_of
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.rollout.local.generator import LocalGenerator

TRIALS = int(os.environ.get("R1_FAULT_TRIALS", "1"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, "qwen2", eos_token_id=1)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [{"question": f"w{n // 50 + 2} w{n % 50 + 2}", "answer": "w3", "reward": "exact"} for n in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def suite(out: Path, questions: Path, **changes: object) -> Suite:
    asked = {"kind": "questions", "file": questions, "samples": 4} | dict(changes.pop("mine", {}))
    settings = {
        "out": out,
        "max_tokens": 12,
        "template": "none",
        "rewards": {"workers": 1},
        "benchmarks": {"mine": asked},
    }
    return Suite.model_validate(settings | changes)


def run(model: Path, wanted: Suite) -> dict:
    return evaluate(model, wanted, note=lambda text: None)


def texts(out: Path, name: str = "mine") -> dict:
    return {key: line.text for key, line in Store(out).replies(name).items()}


@pytest.fixture(scope="module")
def unbroken(model, questions, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    run(model, suite(out, questions))
    return out


def test_every_question_has_k_different_replies_and_a_row_with_its_interval(model, questions, unbroken):
    found = texts(unbroken)
    assert len(found) == 800 and len({q for q, _ in found}) == 200
    assert len(set(found.values())) > 700  # of a random model; four samples of a question are not one text
    summary = json.loads((unbroken / "summary.json").read_text())["benchmarks"]["mine"]
    assert (summary["replies"], summary["missing"], summary["undecided"]["count"]) == (800, 0, 0)
    row = table_rows({"mine": summary})[0]
    assert row["mean"] == 0.0 and row["low"] == 0.0 and row["high"] == pytest.approx(3.8416 / 203.8416, rel=1e-3)


def killed_after(model: Path, wanted: Suite, lines: int) -> None:
    """SIGKILL when the evaluation, in a process of its own, has stored so many replies."""
    process = ranks._forks.Process(target=run, args=(model, wanted))
    process.start()
    folder = wanted.out / "samples"
    while process.is_alive():
        if sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl")) >= lines:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.002)  # the process is watched, not waited for
    process.join()


@pytest.mark.parametrize("trial", range(TRIALS))
def test_killed_at_a_random_moment_it_draws_exactly_what_is_missing(trial, model, questions, unbroken, tmp_path):
    wanted, rng = suite(tmp_path / "out", questions), random.Random(trial)
    moments = sorted(rng.sample(range(1, 790), 2))  # the second kill comes while resuming
    for moment in moments:
        killed_after(model, wanted, moment)
    left = sum(path.read_bytes().count(b"\n") for path in (wanted.out / "samples").glob("*.jsonl"))
    assert 0 < left < 800
    if trial % 2 == 0:  # a line that the machine did not finish
        with next((wanted.out / "samples").glob("*.jsonl")).open("ab") as file:
            file.write(b'{"q": "cut off')
    run(model, wanted)
    lines = b"".join(path.read_bytes() for path in (wanted.out / "samples").glob("*.jsonl")).splitlines()
    keys = [(row["q"], row["s"]) for row in map(json.loads, lines)]
    assert len(keys) == len(set(keys)) == 800
    assert texts(wanted.out) == texts(unbroken)
    grades = (wanted.out / "grades" / "mine.jsonl").read_text()
    assert grades == (unbroken / "grades" / "mine.jsonl").read_text()


def on_rank(model: Path, wanted: Suite) -> dict:
    return run(model, wanted)


def test_two_ranks_draw_what_one_draws(model, questions, unbroken, tmp_path):
    wanted = suite(tmp_path / "out", questions)
    first, second = ranks.on_ranks(2, on_rank, model, wanted)
    assert first == second == json.loads((unbroken / "summary.json").read_text())["benchmarks"]
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 2
    assert texts(wanted.out) == texts(unbroken)


def test_another_seed_draws_other_replies_and_the_one_nobody_set_is_written_down(model, questions, unbroken, tmp_path):
    run(model, suite(tmp_path / "out", questions, mine={"questions": 3}, seed=1))
    found, of_seed_0 = texts(tmp_path / "out"), texts(unbroken)
    assert len(found) == 12 and sum(text == of_seed_0[key] for key, text in found.items()) <= 1
    assert [Store(out).manifest["same"]["seed"] for out in (unbroken, tmp_path / "out")] == [0, 1]


def test_a_run_draws_benchmarks_as_an_evaluation_does_and_hands_replies_over_as_they_end(model, questions, unbroken):
    """At the temperature of evaluations, not of rollouts."""
    cfg = RlConfig(model=Model(path=model), rollout=Rollout(temperature=1.0, top_p=0.5))
    form = make_format(model, load_tokenizer(model), Data(template="none"))
    cpu = torch.device("cpu")
    generator = LocalGenerator(model, seed=cfg.seed, slots=4, device=cpu, dtype=torch.float32)
    generator.load_weights(weights_of(model))
    asked = suite(unbroken, questions, mine={"questions": 5}).benchmarks
    (entry,) = load_entries(asked, has_judge=False)
    found, there = dict[tuple[str, int], str](), list[int]()  # replies that were there at each decode step
    with generator.awake():
        sampler = RunningSampler(generator, cfg, form, max_tokens=12)
        sampler.draw(
            list(entry.asks(0)),
            lambda ask, line: found.update({ask.key: line.text}),
            lambda count: there.append(len(found)),
        )
    assert there == sorted(there) and there[0] == 0 and len({*there}) >= 5  # five times the four slots
    assert len(found) == 20 and found == {key: text for key, text in texts(unbroken).items() if key in found}


def test_limits_other_benchmarks_and_more_samples_change_no_reply(model, questions, unbroken, tmp_path):
    out = tmp_path / "out"
    run(model, suite(out, questions, mine={"questions": 3, "samples": 2}))
    assert len(texts(out)) == 6
    both = {"kind": "questions", "file": questions, "samples": 1, "questions": 5}
    wanted = suite(out, questions, mine={"questions": 5, "samples": 4})
    wanted = wanted.model_copy(
        update={"benchmarks": wanted.benchmarks | {"other": suite(out, questions, mine=both).benchmarks["mine"]}}
    )
    summaries = run(model, wanted)
    assert (
        texts(out) == {key: text for key, text in texts(unbroken).items() if key in texts(out)}
        and len(texts(out)) == 20
    )
    assert summaries["mine"]["samples"] == 4 and summaries["mine"]["replies"] == 20
    firsts = {q: text for (q, s), text in texts(out).items() if s == 0}
    assert firsts != {q: text for (q, _), text in texts(out, "other").items()}  # streams of its own


def test_other_settings_are_refused_by_name_and_nothing_is_written(model, questions, tmp_path):
    out = tmp_path / "out"
    small = {"questions": 2, "samples": 1}
    run(model, suite(out, questions, mine=small))
    before = {path: path.read_bytes() for path in out.rglob("*.json*")}
    with pytest.raises(ConfigError, match=r"out was begun with temperature 0\.6, this is 0\.7: choose another out"):
        run(model, suite(out, questions, mine=small, temperature=0.7))
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "w2", "answer": "1"}\n')
    with pytest.raises(ConfigError, match=r"begun with benchmarks\.mine\.file "):
        run(model, suite(out, other, mine=small))
    assert {path: path.read_bytes() for path in out.rglob("*.json*")} == before
    evaluate(model, suite(out, questions, mine=small, temperature=0.7), note=lambda text: None, is_fresh=True)
    assert Store(out).manifest["same"]["temperature"] == 0.7


def test_a_reply_ends_where_the_context_does_and_a_prompt_that_fills_it_is_cut_before_its_first_token(model, tmp_path):
    positions = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    path = tmp_path / "long.jsonl"
    rows = [{"question": " ".join(["w5"] * n), "answer": "1"} for n in (positions - 3, positions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told: list[str] = []
    found = evaluate(model, suite(tmp_path / "out", path, mine={"samples": 2}, max_tokens=32_768), note=told.append)
    assert f"warning: the model's context has {positions} tokens: replies end there, not at 32,768" in told
    lines = Store(tmp_path / "out").replies("mine").values()
    assert sorted({line.tokens for line in lines if line.prompt_tokens == positions}) == [0]
    assert all(line.tokens <= 3 for line in lines)
    assert found["mine"]["truncated"] >= 0.5 and found["mine"]["score"]["mean"] == 0.0


def test_the_first_prompt_is_shown_as_the_model_gets_it_and_a_private_one_without_its_text(model, questions, tmp_path):
    told: list[str] = []
    for number, private in enumerate((False, True)):
        mine = {"questions": 1, "samples": 1, "private": private}
        evaluate(model, suite(tmp_path / f"{number}", questions, mine=mine), note=told.append)
    ids = [Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id("w2")] * 2
    prompts = [line for line in told if "first prompt" in line]
    head = f"mine: first prompt, 2 tokens ({ids[0]}, {ids[1]}, ...)"
    assert prompts == [f"{head}, ends in 'w2 w2'", head]


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        ({"kind": "aime24"}, r"benchmarks\.mine: found no such benchmark, required one of "),
        ({"file": Path("data/gone.csv")}, r"benchmarks\.mine\.file: found no file data/gone\.csv; it is not shipped"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_drawn(mine, message, model, questions, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(model, suite(tmp_path / "out", questions, mine=mine))
    assert not (tmp_path / "out").exists()


def test_targets_that_are_none(model, questions, tmp_path):
    with pytest.raises(ConfigError, match=r"found no config\.json in .*, required a Hugging Face folder, a run"):
        run(tmp_path, suite(tmp_path / "out", questions))
    (tmp_path / "config.yaml").write_text(f"model: {{path: {model}}}\ndata: {{train: {questions}}}\n")
    with pytest.raises(ConfigError, match=r"has no model/ yet, required one .no checkpoint."):
        run(tmp_path, suite(tmp_path / "out", questions))
    with pytest.raises(ConfigError, match=r"template: .*has no chat template"):
        run(model, suite(tmp_path / "out", questions, template=None))


def test_a_row_with_a_null_answer_is_named(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "w3", "answer": "1"}\n{"question": "w4", "answer": null}\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: .*answer"):
        run(model, suite(tmp_path / "out", path))


def test_a_suite_names_its_wrong_keys(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text("benchmarks:\n  mine: {file: x.jsonl, sample: 3}\ntemperatur: 1.0\n")
    with pytest.raises(ConfigError, match=r"yaml:3: unknown key temperatur; did you mean 'temperature'") as caught:
        load_suite(path, [])
    assert "yaml:2: unknown key benchmarks.mine.sample; did you mean 'samples'?" in str(caught.value)
    path.write_text("benchmarks:\n  mine: {file: x.jsonl, first_day: soon, samples: 0}\n")
    with pytest.raises(ConfigError, match=r"mine\.first_day: found 'soon', required a day as 2024-08-01") as caught:
        load_suite(path, [])
    assert "yaml:2: benchmarks.mine.samples: found 0, required a whole number >= 1" in str(caught.value)
    path.write_text("benchmarks:\n  'a/b': {file: x.jsonl}\n")
    with pytest.raises(ConfigError, match=r"found the name 'a/b', required letters, digits"):
        load_suite(path, [])
