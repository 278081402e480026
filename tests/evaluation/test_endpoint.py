"""Evaluations of a server: what is asked, what its reply is, and what happens when it does not answer as it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_server import ChatServer

from r1engine.config import ConfigError
from r1engine.config.evaluation import Suite
from r1engine.evaluation import endpoint
from r1engine.evaluation.evaluate import evaluate
from r1engine.evaluation.store import Store


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(endpoint, "PAUSE_SECONDS", 0.01)
    servers = []

    def start(reply, **settings) -> ChatServer:
        servers.append(ChatServer(reply, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def suite(tmp_path: Path, questions: int = 4, samples: int = 2, **settings) -> Suite:
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(questions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"kind": "questions", "file": path, "samples": samples}
    told = {"tries": 2, "parallel": 4, "stall_seconds": 0.3} | settings.pop("endpoint", {})
    return Suite.model_validate(
        {"out": tmp_path / "out", "endpoint": told, "rewards": {"workers": 1}, "benchmarks": {"sums": asked}} | settings
    )


def run(server: ChatServer, wanted: Suite) -> dict:
    return evaluate(server.url, wanted, note=lambda text: None)["sums"]


def lines(tmp_path: Path) -> list:
    return list(Store(tmp_path / "out").replies("sums").values())


def right(number: int, body: dict) -> list:
    return ["I count.</think> ", f"\\boxed{{{int(body['messages'][-1]['content'].split()[0]) + 1}}}"]


def test_each_reply_is_asked_alone_with_its_seed_and_the_papers_sampling(serve, tmp_path):
    server = serve(right)
    found = run(server, suite(tmp_path))
    assert found["score"]["mean"] == 1.0 and found["tokens"] == 2.0 and found["truncated"] == 0.0
    assert len(server.seen) == 8 and len({body["seed"] for body in server.seen}) == 8
    body = server.seen[0]
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["n"]) == (0.6, 0.95, 32_768, 1)
    assert [message["role"] for message in body["messages"]] == ["user"]


THINKS = {"choices": [{"delta": {"reasoning_content": "is it \\boxed{9}? "}}]}
NULL = {"choices": [{"delta": {"content": None}}]}
BLANK = {"choices": [{"delta": {"content": ""}}]}


@pytest.mark.parametrize(
    ("parts", "finish", "text", "verdict"),
    [
        ([THINKS, "\\boxed{1}"], "stop", "<think>\nis it \\boxed{9}? \n</think>\n\n\\boxed{1}", "right"),
        ([THINKS, NULL], "length", "<think>\nis it \\boxed{9}? ", "wrong"),
        ([THINKS, BLANK], "length", "<think>\nis it \\boxed{9}? ", "wrong"),  # the thoughts took all of the limit
        (["a draft</think>\\boxed{1}"], "stop", "a draft</think>\\boxed{1}", "right"),
        ([NULL], "stop", "", "undecided"),
    ],
)
def test_thoughts_that_the_server_takes_apart_stand_in_their_tags(parts, finish, text, verdict, serve, tmp_path):
    found = run(serve(lambda number, body: parts, finish=finish), suite(tmp_path, 1, 1))
    assert [line.text for line in lines(tmp_path)] == [text]
    grade = next(iter(Store(tmp_path / "out").grades("sums").values()))
    assert found["truncated"] == (finish == "length")
    assert grade.verdict == verdict and found["undecided"]["count"] == (verdict == "undecided")
    if verdict == "undecided":  # no reply of 0
        assert grade.reason == "the server's reply is empty" and found["score"] is None


@pytest.mark.parametrize("fault", ["cut", "hang", "half", "status 500", "endless"])
def test_a_reply_that_fails_once_is_asked_again(fault, serve, tmp_path):
    bad = [fault] if fault.startswith("status") else ["a start ", fault]
    server = serve(lambda number, body: bad if number == 1 else right(number, body))
    found = run(server, suite(tmp_path, max_tokens=8))
    assert found["score"]["mean"] == 1.0 and len(server.seen) == 9


def test_a_server_that_is_gone_leaves_what_it_gave_and_the_next_command_draws_the_rest(serve, tmp_path):
    server = serve(lambda number, body: right(number, body) if number < 3 else ["status 500"])
    wanted = suite(tmp_path, endpoint={"parallel": 1})
    with pytest.raises(RuntimeError, match=r"no answer after 2 tries .HTTP 500 .*; 3 of 8 replies are stored, and the"):
        run(server, wanted)
    asked = len(server.seen)
    server.reply = right
    assert run(server, wanted)["score"]["mean"] == 1.0 and len(server.seen) == asked + 5


def test_a_limit_and_then_the_whole_set_grade_each_reply_by_its_own_question(serve, tmp_path):
    server, wanted = serve(right), suite(tmp_path)
    first = wanted.benchmarks["sums"].model_copy(update={"questions": 2, "samples": 1})
    assert run(server, wanted.model_copy(update={"benchmarks": {"sums": first}}))["score"]["mean"] == 1.0
    file = wanted.benchmarks["sums"].file
    found = run(server, wanted)
    assert (found["score"]["mean"], found["replies"], len(server.seen)) == (1.0, 8, 8)
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))  # another file, and told so
    with pytest.raises(ConfigError, match=r"begun with benchmarks\.sums\.file "):
        run(server, wanted)


def test_a_request_that_is_refused_is_missing_at_the_end_and_the_others_are_there(serve, tmp_path):
    server = serve(lambda number, body: ["status 400"] if number == 2 else right(number, body))
    with pytest.raises(RuntimeError, match=r"1 failed: HTTP 400 .*; 7 of 8 replies are stored"):
        run(server, suite(tmp_path))
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["benchmarks"]["sums"]["missing"] == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_the_evaluation_before_every_request_is_refused(status, serve, tmp_path):
    server = serve(lambda number, body: [f"status {status}"])
    with pytest.raises(RuntimeError, match=f"no answer .HTTP {status} .*; 0 of 40 replies are stored"):
        run(server, suite(tmp_path, 20))
    assert len(server.seen) <= 6  # three, and those that were under way


ODD = [
    {"choices": [{"delta": {"content": ["a part"]}}]},
    {"choices": [{"delta": "text"}]},
    {"choices": {"0": "text"}},
    {"choices": 3},
]


@pytest.mark.parametrize("part", ODD)
def test_a_reply_of_another_form_is_asked_again_and_named(part, serve, tmp_path):
    server = serve(lambda number, body: [part] if number == 1 else right(number, body))
    assert run(server, suite(tmp_path))["score"]["mean"] == 1.0 and len(server.seen) == 9
    server.reply = lambda number, body: [part]
    with pytest.raises(RuntimeError, match=r"the server sent .*, required choices with content"):
        run(server, suite(tmp_path, out=tmp_path / "other"))


def test_a_count_of_tokens_that_is_none_is_left_out(serve, tmp_path):
    usage = {"usage": {"completion_tokens": "many", "prompt_tokens": None}, "choices": []}
    server = serve(lambda number, body: [*right(number, body), usage])
    assert run(server, suite(tmp_path))["tokens"] is None


def test_a_model_that_changes_in_the_middle_ends_the_evaluation(serve, tmp_path):
    changed = {"model": "another", "choices": [{"delta": {"content": "\\boxed{1}"}}]}
    server = serve(lambda number, body: [changed] if number == 3 else right(number, body))
    with pytest.raises(RuntimeError, match="model has changed: replies are of another and m, required one"):
        run(server, suite(tmp_path, endpoint={"parallel": 1}))
    assert len(lines(tmp_path)) == 3


def test_a_server_of_another_model_does_not_go_on_with_a_folder(serve, tmp_path):
    server = serve(right)
    run(server, suite(tmp_path))
    server.model = "another"
    with pytest.raises(ConfigError, match="was begun with endpoint served m, this is another"):
        run(server, suite(tmp_path, samples=3))


def test_nobody_there(tmp_path):
    with pytest.raises(RuntimeError, match=r"http://127\.0\.0\.1:9/v1: .*refused"):
        evaluate("http://127.0.0.1:9/v1", suite(tmp_path), note=lambda text: None)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_address_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluate: found http://a:port/v1, required http://host:port or https"):
        evaluate("http://a:port/v1", suite(tmp_path), note=lambda text: None)


def test_a_key_that_is_not_set_is_named(serve, tmp_path):
    with pytest.raises(ConfigError, match="the environment variable NO_SUCH_KEY is not set"):
        run(serve(right), suite(tmp_path, endpoint={"key_variable": "NO_SUCH_KEY"}))


def test_the_model_that_grades_itself_is_told(serve, tmp_path):
    server = serve(right)
    told = []
    wanted = suite(tmp_path, rewards={"workers": 1, "judge": {"urls": [server.url], "model": "default"}})
    evaluate(server.url, wanted, note=told.append)
    assert "warning: the model grades itself" in told
