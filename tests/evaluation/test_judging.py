"""A judge with three grades against a real HTTP server on this machine: what it means, and when it is not believed."""

from __future__ import annotations

import pytest
from model_server import ModelServer, says

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.evaluation.benchmark import Judged, Reply
from r1engine.evaluation.benchmarks import benchmark_of
from r1engine.evaluation.judging import ask_judge
from r1engine.evaluation.short_answers import CANARIES, three_grades
from r1engine.rewards.servers.endpoint import ModelServers
from r1engine.rewards.servers.judge import GenerativeJudge


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("A", "A"),
        ("**B**", "B"),
        (" c. ", "C"),
        ("CORRECT", "A"),  # its first capital letter is a C
        ("INCORRECT", "B"),
        ("NOT_ATTEMPTED", "C"),
        ("Not attempted.", "C"),
        ("A: CORRECT", "A"),
        ("This is a B", "B"),
        ("As a judge, I considered A first. The final grade is B.", "B"),
        ("<think>Is it A?</think>\n\nGrade: **C**", "C"),
        ("\u3010\u6b63\u786e\u3011", "A"),
        ("A fully correct answer would be GRADE: C, but this earns GRADE: Z", None),
        ("As I said", None),
        ("A or B", None),
        ("A: INCORRECT", None),
        ("", None),
        ("<think>A", None),
    ],
)
def test_the_grade_that_a_judge_means(reply, grade):
    assert three_grades(reply) == grade


@pytest.fixture
def serve():
    servers = []

    def start(reply) -> tuple[GenerativeJudge, ModelServer]:
        servers.append(ModelServer(reply))
        endpoint = ModelServers(f"{servers[-1].url}/v1", timeout_seconds=5.0, pause_seconds=0.0)
        return GenerativeJudge(endpoint, "judge-model", parallel=4, batch_size=2, canaries=2), servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def asked(tmp_path) -> list[Judged]:
    """Whether 0 to 4 are the number after 1: of five replies, one is right."""
    path = tmp_path / "s.jsonl"
    path.write_text('{"problem": "What is 1 + 1?", "answer": "two"}\n')
    bench = benchmark_of("simpleqa", "")
    (item,) = bench.load(BenchmarkSettings(file=path))
    return [bench.grade(item, 0, Reply(word, "stop")) for word in ("zero", "one", "two", "three", "four")]


def shown(body: dict) -> str:
    return body["messages"][0]["content"].rpartition("Predicted answer: ")[2].split("\n")[0]


def test_a_fair_judge_is_believed(serve, asked):
    judge, server = serve(lambda path, body: says("A" if shown(body) == "two" else "B"))
    marks = ask_judge(judge, asked)
    assert [mark.verdict for mark in marks] == ["wrong", "wrong", "right", "wrong", "wrong"]
    answers = [shown(body) for _, body, _ in server.seen]
    assert sum(answer in CANARIES for answer in answers) == 6  # two of each batch of two
    assert {body["temperature"] for _, body, _ in server.seen} == {0}


def test_a_judge_that_always_says_yes_decides_nothing(serve, asked):
    marks = ask_judge(serve(lambda path, body: says("A"))[0], asked)
    assert {mark.verdict for mark in marks} == {"undecided"} and {mark.score for mark in marks} == {None}
    assert {mark.reason for mark in marks} == {"the judge takes an answer that cannot be right"}
    assert [mark.parts for mark in marks] == [{}] * 5


def test_only_the_batch_of_a_canary_that_is_taken_is_lost(serve, asked):
    fooled = iter([True] + [False] * 50)

    def reply(path, body):
        if shown(body) in CANARIES:
            return says("A" if next(fooled) else "C")
        return says("A" if shown(body) == "two" else "B")

    verdicts = [mark.verdict for mark in ask_judge(serve(reply)[0], asked)]
    assert verdicts == ["undecided", "undecided", "right", "wrong", "wrong"]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (says("I cannot tell"), "the judge replied 'I cannot tell', required A, B or C"),
        (says(None), "the reply has no choices[0].message.content"),
        ((200, b'{"choices": [{"mess'), "the reply is no JSON"),
        ((500, b"out of memory"), "HTTP 500 out of memory"),
        (None, "no reply from http://127.0.0.1"),
    ],
)
def test_no_opinion_is_undecided_and_never_not_attempted(serve, asked, reply, reason):
    (mark,) = ask_judge(serve(lambda path, body: reply)[0], asked[:1])
    assert (mark.verdict, mark.score, mark.parts) == ("undecided", None, {}) and reason in mark.reason


def test_nonsense_is_asked_about_once_more(serve, asked):
    replies = iter(["hm", "B"] * 20)
    judge, server = serve(lambda path, body: says(next(replies)))
    (mark,) = ask_judge(GenerativeJudge(judge.endpoint, "m", parallel=1, canaries=0), asked[:1])
    assert mark.verdict == "wrong" and len(server.seen) == 2
