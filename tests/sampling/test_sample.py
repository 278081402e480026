"""Samples: whole or absent, the same after a kill, graded as they are drawn; targets, rounds, a judge that is away."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from model_server import ModelServer, says, shown_texts
from ranks import forked

from r1engine.batch import Completion, Prompt
from r1engine.config import ConfigError, EvaluateConfig, SampleConfig, TinyConfig
from r1engine.config.pipeline import load_pipeline
from r1engine.data.question import Question
from r1engine.demo.tiny import write_world
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.observe.failure import RunFailed
from r1engine.pipeline.driver import check
from r1engine.pipeline.manifest import digest
from r1engine.ranks import World
from r1engine.rewards import Score
from r1engine.rollout.draft import completions
from r1engine.sampling import drawing, evaluate
from r1engine.sampling.sample import sample

ROOT = Path(__file__).resolve().parents[2]
KILLED = ROOT / "tests" / "killed.py"
ALONE = World(0, 1, torch.device("cpu"))
FILE = """
stages:
  tiny: {stage: tiny, hidden_size: 32, layers: 1, intermediate_size: 64, texts: 96, heldout: 6}
  drawn:
    stage: sample
    threads: 1
    model: {path: tiny}
    questions: tiny/heldout.jsonl
    template: r1_zero
    samples: 2
    chunk_questions: 2
    rollout: {max_tokens: 12}
    rewards: {workers: 1}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """A pipeline's file, and its folder; it ran undisturbed."""
    file = tmp_path_factory.mktemp("samples") / "p.yaml"
    file.write_text(f"run_dir: {file.parent / 'run'}\n{FILE}")
    done = forked(1, KILLED, 0, 0, "pipeline", file)
    assert done.returncode == 0, done.stderr[-3000:]
    return file, file.parent / "run"


@pytest.fixture(scope="module")
def model(finished) -> Path:
    return finished[1] / "tiny" / "model"


def chunks(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "samples").iterdir())}


def rows(folder: Path) -> list[dict]:
    return [row for file in sorted((folder / "samples").iterdir()) for row in pq.read_table(file).to_pylist()]


def test_every_answer_is_there_with_what_later_stages_need(finished):
    _, folder = finished
    found = rows(folder / "drawn")
    assert [row["id"] for row in found] == [f"{q}/{k}" for q in range(6) for k in range(2)]
    asked = [json.loads(line) for line in (folder / "tiny" / "heldout.jsonl").read_text().splitlines()]
    for row in found:
        assert row["question"] == asked[row["question_id"]]["question"] and row["question"] in row["prompt"]
        assert row["answer"] == asked[row["question_id"]]["answer"] and row["reward"] == row["domain"] == "math"
        assert row["language"] == "en" and row["num_tokens"] <= 12 and row["logp_mean"] < 0
        assert row["verdict"] == "wrong" and row["reason"] and "format" in dict(row["components"])
    counts = json.loads((folder / "drawn" / "counts.json").read_text())
    assert counts["domains"]["math"]["drawn"] == 12
    for name, content in chunks(folder / "drawn").items():
        assert counts["files"][name]["sha256"] == hashlib.sha256(content).hexdigest()
    told = json.loads((folder / "drawn" / "stage.json").read_text())["counts"]
    assert told["drawn"] == 12 and told["tokens"] == sum(row["num_tokens"] for row in found)


@pytest.mark.parametrize("at", [-11, pytest.param(-13, marks=pytest.mark.rotating)])
def test_a_killed_one_draws_the_missing_chunks_only_and_the_same(finished, tmp_path, at):
    file, folder = finished
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    assert forked(1, KILLED, int(signal.SIGKILL), at, "pipeline", file, f"run_dir={tmp_path}").returncode != 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "drawn" / "samples").glob("chunk*")}
    assert len(before) == -at - 11  # the chunk that was drawn last is not there
    (tmp_path / "drawn" / "samples" / ".chunk_00001.parquet").write_bytes(b"half of it")
    done = forked(1, KILLED, 0, 0, "pipeline", file, f"run_dir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    (tmp_path / "drawn" / "samples" / ".chunk_00001.parquet").unlink(missing_ok=True)
    assert chunks(tmp_path / "drawn") == chunks(folder / "drawn")
    assert all((tmp_path / "drawn" / "samples" / name).stat().st_mtime_ns == time for name, time in before.items())
    assert [state for _, state in check(load_pipeline(file, [f"run_dir={tmp_path}"]), 1)] == ["done", "done"]


def test_a_damaged_chunk_is_named_and_drawn_again_once_it_is_deleted(finished, tmp_path):
    file, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "drawn" / "stage.json").unlink()
    chunk = tmp_path / "run" / "drawn" / "samples" / "chunk_00001.parquet"
    content = bytearray(chunk.read_bytes())
    content[40] ^= 1
    chunk.write_bytes(content)
    done = forked(1, KILLED, 0, 0, "pipeline", file, f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert f"{chunk}: SHA-256 differs from counts.json; delete it and run again: only this chunk" in done.stderr
    chunk.unlink()
    alone = ("sample", tmp_path / "run" / "drawn" / "config.yaml", f"run_dir={tmp_path / 'run' / 'drawn'}")
    done = forked(1, KILLED, 0, 0, *alone)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 of 3 chunks are there; going on" in done.stdout and chunks(chunk.parents[1]) == chunks(folder / "drawn")
    done = forked(1, KILLED, 0, 0, *alone, "samples=3")
    assert done.returncode == 2 and "its samples were drawn with another samples (2, now 3)" in done.stderr


def test_ranks_share_a_chunk(finished, tmp_path):
    file, folder = finished
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    done = forked(2, KILLED, 0, 0, "pipeline", file, f"run_dir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    both = [[(row["id"], row["completion"]) for row in rows(path / "drawn")] for path in (folder, tmp_path)]
    assert both[0] == both[1]


# ---- what a model that can do something would draw -----------------------------------------------------------------


class Scripted:
    """A generator whose answer number n to question q is right where n >= q % 4."""

    weight_version = 1

    def __init__(self, folder: Path) -> None:
        self.tokenizer, self.drawn = load_tokenizer(folder), []

    def load_weights(self, weights):
        assert {name for name, _ in weights} > {"model.norm.weight"}

    def awake(self):
        return nullcontext()

    def draw(self, drafts, sampling, *, on_tokens=None, should_stop=None):
        for draft in drafts:
            self.drawn.append((draft.prompt.id, draft.sample))
            is_right = draft.sample >= draft.prompt.id % 4
            answer = draft.prompt.question.answer if is_right else "1"
            tokens = [*self.tokenizer.encode(f"<think>so</think><answer>{answer}</answer>").ids, 1]
            draft.add(tokens, [-1.0] * len(tokens), 1)
            draft.finish = "stop"
            on_tokens(len(tokens))

    def completions(self, drafts):
        return completions(drafts, self.tokenizer)

    def close(self):
        pass


@pytest.fixture
def scripted(model, monkeypatch) -> Scripted:
    generator = Scripted(model)
    monkeypatch.setattr(drawing, "make_generator", lambda *_: generator)
    return generator


def drawn(model: Path, run_dir: Path, questions: list[dict], **more) -> tuple[dict, list[dict]]:
    path = run_dir.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    values = {"model": {"path": model}, "questions": path, "template": "none", "chunk_questions": 2} | more
    rewards = {"workers": 1} | more.get("rewards", {})
    cfg = SampleConfig(run_dir=run_dir, rollout={"max_tokens": 32}, **values | {"rewards": rewards})
    digests = {key: digest(path) for key, path in cfg.inputs().items()}
    return sample(cfg, ALONE, digests), rows(run_dir)


def test_a_domain_that_has_its_number_gets_no_more_questions(model, scripted, tmp_path):
    questions = [{"question": f"{i}+{i}", "answer": str(2 * i), "domain": "ab"[i // 2 % 2]} for i in range(20, 32)]
    told, _ = drawn(model, tmp_path / "run", questions, samples=3, target_right={"a": 7})
    # Of domain a: questions 0, 1 (3 + 2 right), 4, 5 (3 + 2); then it has 10 >= 7. Domain b has no target.
    assert told["domains"]["a"]["kept"] == 10 and told["domains"]["a"]["drawn"] == 12
    assert told["domains"]["b"]["drawn"] == 18
    assert sorted({question for question, _ in scripted.drawn}) == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]


def test_a_question_with_enough_right_answers_gets_no_more(model, scripted, tmp_path):
    questions = [{"question": f"{i}+{i}", "answer": str(2 * i)} for i in range(20, 24)]
    told, found = drawn(model, tmp_path / "run", questions, samples=4, early_stop=1)
    assert [sum(row["question_id"] == q for row in found) for q in range(4)] == [1, 2, 3, 4]
    assert told["right"] == 4 and told["wrong"] == 6
    assert {row["verdict"] for row in found if row["sample"] == row["question_id"]} == {"right"}


def test_a_judge_that_is_away_stops_it_and_later_it_goes_on(model, scripted, tmp_path):
    def judge(_, body):
        first, second = shown_texts(body)
        return says("SAME" if first == second else "DIFFERENT")

    server = ModelServer(judge)
    url, port = f"{server.url}/v1", server.server_port
    server.stop()
    questions = [{"question": f"{i}+{i}", "answer": str(2 * i)} for i in range(20, 22)]
    questions += [{"question": f"Add {i} to {i}.", "answer": str(2 * i), "reward": "judge"} for i in range(20, 22)]
    more = {"samples": 2, "rewards": {"judge": {"urls": [url], "model": "j", "tries": 1, "timeout_seconds": 5.0}}}
    with pytest.raises(RunFailed, match=r"the judge is away \(.*refused.*\); 1 chunks are kept, and the same command"):
        drawn(model, tmp_path / "run", questions, **more)
    assert [row["verdict"] for row in rows(tmp_path / "run")] == ["right", "right", "wrong", "right"]
    server = ModelServer(judge, port)
    try:
        told, found = drawn(model, tmp_path / "run", questions, **more)
    finally:
        server.stop()
    assert [row["verdict"] for row in found[4:]] == ["wrong", "wrong", "wrong", "wrong"]  # 2 and 3 begin right later
    assert told["domains"]["general"]["drawn"] == 4 and len(scripted.drawn) == 4 + 4 + 4


def test_a_text_may_stand_around_the_question(model, scripted, tmp_path):
    (tmp_path / "few_shot.txt").write_text("What is 1+1? <think>1+1=2</think> 2\n{question}")
    question = {"question": "What is 20+20?", "answer": "40"}
    _, found = drawn(model, tmp_path / "run", [question], samples=1, prompt=tmp_path / "few_shot.txt")
    assert found[0]["prompt"] == "What is 1+1? <think>1+1=2</think> 2\nWhat is 20+20?"
    assert found[0]["question"] == "What is 20+20?"
    (tmp_path / "few_shot.txt").write_text("no place for it")
    with pytest.raises(ValueError, match=r"found 0 times \{question\}, required once"):
        drawn(model, tmp_path / "other", [question], prompt=tmp_path / "few_shot.txt")


def test_reward_functions_see_the_other_columns(model, scripted, tmp_path):
    (tmp_path / "own.py").write_text("def level(columns):\n    return columns['level']\n")
    rewards = {"functions": {"level": f"{tmp_path}/own.py:level"}}
    _, found = drawn(model, tmp_path / "run", [{"question": "20+20", "answer": "40", "level": 7}], rewards=rewards)
    assert {dict(row["components"])["level"] for row in found} == {7.0}


def test_thoughts_that_the_prompt_opens_have_a_language():
    question = Question("What is 2+2?", "4", language="en")
    found = []
    for opened, text in (("", "<think>"), ("<think>\n", "")):
        prompt = Prompt(0, [1], f"What is 2+2? {opened}", question)
        completion = Completion(prompt, 0, [1], [0.0], f"{text}I add the two numbers.</think> 4", False)
        found.append(evaluate._row((completion, Score("right", {}, "")), EvaluateConfig()))
    assert [row["language"] for row in found] == [1.0, 1.0]


def test_answers_with_any_end_of_line_are_read_again(tmp_path):
    rows = [{"completion": f"a{end}b"} for end in ("\u2028", "\x85", "\x0c", "\r", "\n")]
    evaluate._write(tmp_path / "answers" / "a.jsonl", {"seed": 0}, rows)
    found: dict = {}
    assert evaluate._take_earlier(found, "a", tmp_path / "answers" / "a.jsonl", {"seed": 0}) and found == {"a": rows}
    assert not evaluate._take_earlier(found, "b", tmp_path / "answers" / "a.jsonl", {"seed": 1}) and "b" not in found


def test_a_full_disk_leaves_a_chunk_absent(model, scripted, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            drawn(model, tmp_path / "run", [{"question": "20+20", "answer": "40"}])
    assert list((tmp_path / "run" / "samples").iterdir()) == []


def test_wrong_settings_are_refused(tmp_path):
    write_world(TinyConfig(run_dir=tmp_path, hidden_size=32, layers=1, intermediate_size=64, texts=8, heldout=4))
    with pytest.raises(ValueError, match=r"early_stop: found 5, required <= samples = 4"):
        SampleConfig(early_stop=5)
    with pytest.raises(ValueError, match=r"max_staleness or oversample"):
        SampleConfig(rollout={"max_staleness": 1})
    (tmp_path / "p.yaml").write_text(
        f"run_dir: {tmp_path}\nstages:\n  drawn: {{stage: sample, model: {{path: {tmp_path}/model}}}}\n"
    )
    with pytest.raises(ConfigError, match=r"stage drawn: questions: found null, required a .jsonl or .parquet file"):
        load_pipeline(tmp_path / "p.yaml", [])
