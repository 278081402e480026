"""Rewards "judge" and "preference" through the scorer and the command; the servers are fakes, see model_server.py."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import CancelledError

import pytest
from model_server import ModelServer, fair_judge, rates
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.config import Rewards
from r1engine.data.question import Question
from r1engine.rewards import Record, Scorer, ScorerSettings
from r1engine.rewards.from_config import make_scorer
from r1engine.rewards.servers.gather import Gatherer


@pytest.fixture
def servers():
    """A judge of fractions, and a reward model that counts letters; its template is {prompt}|{response}."""
    made = ModelServer(fair_judge), ModelServer(rates(lambda text: float(len(text.partition("|")[2]))))
    yield made
    for server in made:
        server.stop()


@pytest.fixture
def scorer(servers):
    judge, model = servers
    rated = {"urls": [model.url], "model": "rm", "template": "{prompt}|{response}", "tries": 1}
    rewards = Rewards(
        workers=1,
        language=1.0,
        judge={"urls": [judge.url + "/v1"], "model": "m", "tries": 1},
        helpfulness_model=rated,
        harmlessness_model=rated,
    )
    with make_scorer(rewards) as made:
        yield made


def record(reward: str, answer: str, think: str = "We add the numbers.") -> Record:
    text = f"<think>{think}</think><answer>{answer}</answer>"
    return Record(Question("What is half of one?", "0.5", reward), text, "?")


def test_judge_sees_the_final_answer_and_its_verdict_is_the_accuracy(scorer, servers):
    scores = scorer.score([record("judge", "1/2"), record("judge", "2"), record("judge", " "), record("math", "1/2")])
    assert [s.verdict for s in scores] == ["right", "wrong", "wrong", "right"]
    assert [s.components["accuracy"] for s in scores] == [1, 0, 0, 1]
    assert all(s.components["language"] == 1 and s.seconds > 0 for s in scores)
    assert "We add" not in json.dumps([body for _, body, _ in servers[0].seen])


def test_preference_is_rated_where_asked_for(scorer, servers):
    score = scorer.score([record("preference", "Four", "Hm")])[0]
    text = "<think>Hm</think><answer>Four</answer>"
    assert score.verdict == "right"
    assert {k: v for k, v in score.components.items() if k != "language"} == {
        "format": 1,
        "helpfulness": 4,
        "harmlessness": len(text),
    }
    servers[1].seen.clear()
    score = scorer.score([record("preference", "Four")], are_rated=False)[0]
    assert servers[1].seen == [] and "helpfulness" not in score.components


def test_one_missing_score_makes_a_record_undecided_and_names_the_model(scorer, servers):
    fine = servers[1].reply
    servers[1].reply = lambda path, body: (503, b"busy") if "|Four" in body["text"][0] else fine(path, body)
    score = scorer.score([record("preference", "Four")])[0]
    assert score.verdict == "undecided" and score.reason.startswith("helpfulness: no reply from http://127.0.0.1")
    assert "helpfulness" not in score.components and "accuracy" not in score.components


def test_judge_that_goes_away_makes_its_records_undecided_and_no_other(scorer, servers):
    scorer.check_servers()
    servers[0].stop()
    scores = scorer.score([record("judge", "1/2"), record("math", "1/2")])
    assert [s.verdict for s in scores] == ["undecided", "right"]
    assert "Connection refused" in scores[0].reason and "accuracy" not in scores[0].components
    with pytest.raises(RuntimeError, match="judge m at http"):
        scorer.check_servers()


def test_works_from_asyncio(scorer):
    async def main():
        return await asyncio.gather(*(scorer.run(record("judge", a)) for a in ("1/2", "2/4", "3")))

    assert [s.verdict for s in asyncio.run(main())] == ["right", "right", "wrong"]


def test_records_without_their_server_are_refused():
    with Scorer(ScorerSettings(workers=1)) as scorer:
        with pytest.raises(ValueError, match="found a record of reward 'judge', required a judge"):
            scorer.score([record("judge", "5")])
        with pytest.raises(ValueError, match="found a record of reward 'preference', required a reward model"):
            scorer.score([record("preference", "5")])


def test_command_scores_with_a_judge(servers, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"reward": "judge", "completion": f"\\boxed{{{answer}}}", "answer": "0.5"} for answer in ("1/2", "2")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = f"judge={{urls: ['{servers[0].url}/v1'], model: m, tries: 1}}"
    done = CliRunner().invoke(app, ["reward", str(source), "--out", str(out), judge, "workers=1"])
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["verdict"] for line in out.read_text().splitlines()] == ["right", "wrong"]
    servers[0].stop()
    done = CliRunner().invoke(app, ["reward", str(source), "--out", str(out), judge, "workers=1"])
    assert done.exit_code == 2 and "error: judge m at http://127.0.0.1" in done.output


@pytest.mark.parametrize(
    ("setting", "answer", "reference", "verdict"),
    [
        ("percent_may_be_missing", "10\\%", "10", "right"),
        ("interval_may_be_inequality", "(3,\\infty)", "x>3", "right"),
    ],
)
def test_command_takes_the_policies_of_the_math_rule(tmp_path, setting, answer, reference, verdict):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"reward": "math", "completion": f"\\boxed{{{answer}}}", "answer": reference}))
    for settings, expected in (([], "undecided"), ([f"{setting}=true"], verdict)):
        arguments = ["reward", str(source), "--out", str(out), "workers=1", "deadline_seconds=60", *settings]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        assert json.loads(out.read_text())["verdict"] == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("intervalmay=true", "unknown key intervalmay"),
        ("deadline_seconds=0", "deadline_seconds: found 0, required a number > 0"),
        ("judge={urls: [localhost], model: m}", "rewards.judge.urls: found localhost, required http://host:port"),
        ("workers", "override 'workers': required the form key.sub=value"),
    ],
)
def test_command_refuses_bad_settings(tmp_path, setting, message):
    done = CliRunner().invoke(app, ["reward", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "o"), setting])
    assert done.exit_code == 2 and message in done.output


def test_gatherer_makes_batches_keeps_order_and_tells_errors():
    sizes = []

    def double(items):
        sizes.append(len(items))
        return [2 * item for item in items]

    gatherer = Gatherer(double, most=4)
    futures = [gatherer.submit(n) for n in range(10)]
    assert [future.result(60) for future in futures] == [2 * n for n in range(10)]
    assert max(sizes) <= 4 and len(sizes) < 10
    with pytest.raises(TypeError):
        gatherer.submit(None).result(60)
    assert gatherer.submit(1).result(60) == 2
    gatherer.close()
    with pytest.raises(RuntimeError, match="submit after close"):
        gatherer.submit(1)


def test_closing_a_gatherer_cancels_what_waits():
    begun, go = threading.Event(), threading.Event()

    def wait(items):
        begun.set()
        go.wait(60)
        return items

    gatherer = Gatherer(wait, most=1)
    first, second = gatherer.submit(1), gatherer.submit(2)
    begun.wait(60)
    gatherer.close()
    with pytest.raises(CancelledError):
        second.result(60)
    go.set()
    assert first.result(60) == 1
