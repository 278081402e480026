"""The generative judge against a real HTTP server on this machine; the server is a fake of SGLang's edge."""

import json
import threading
from collections.abc import Callable
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from r1engine.rewards.endpoint import Endpoint, EndpointError
from r1engine.rewards.generative import CANARIES, GenerativeJudge, Pair
from r1engine.rewards.preference import RewardModel


class Server(ThreadingHTTPServer):
    """Answers each POST with what `reply(path, body)` gives: (status, bytes), or None to hang up."""

    daemon_threads = True

    def __init__(self, reply: Callable[[str, dict], tuple[int, bytes] | None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.seen = reply, []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(f"http://127.0.0.1:{self.server_port}/v1", timeout_seconds=5.0, pause_seconds=0.0)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        answer = self.server.reply(self.path, body)
        if answer is not None:
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def says(word: Any) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"content": word}}]}).encode()


def texts(body: dict) -> list[str]:
    """The two texts that a request shows, in their order."""
    lines = body["messages"][1]["content"].split("\n")
    return [lines[1], lines[4]]


def fair(_: str, body: dict) -> tuple[int, bytes]:
    """An honest judge of fractions."""
    values = [Fraction(text) if text[:1].isdigit() else text for text in texts(body)]
    return says("SAME" if values[0] == values[1] else "DIFFERENT")


def judge_of(server: Server) -> GenerativeJudge:
    return GenerativeJudge(server.endpoint, "judge-model")


def test_verdicts_need_both_orders_and_see_nothing_but_the_two_texts(serve):
    server = serve(fair)
    verdicts = judge_of(server).judge([Pair("1/2", "0.5"), Pair("3", "4")])
    assert [verdict for verdict, _ in verdicts] == ["right", "wrong"]
    shown = [texts(body) for path, body, _ in server.seen if path == "/v1/chat/completions"]
    assert ["0.5", "1/2"] in shown and ["1/2", "0.5"] in shown
    assert len(shown) == 2 * (2 + 2)  # both orders of two pairs and two canaries
    assert {body["temperature"] for _, body, _ in server.seen} == {0}


def test_judge_that_prefers_a_place_is_undecided(serve):
    server = serve(lambda path, body: says("SAME" if texts(body)[0] == "1" else "DIFFERENT"))
    assert judge_of(server).judge([Pair("1", "2")]) == [("undecided", "the judge changes its mind with the order")]


def test_judge_that_takes_a_canary_loses_its_batch_and_no_other(serve):
    def gullible(path, body):
        return says("SAME") if CANARIES[0] in texts(body) else fair(path, body)

    judge = GenerativeJudge(serve(gullible).endpoint, "m", batch_size=2, canaries=1)
    verdicts = judge.judge([Pair("1", "1"), Pair("1", "2"), Pair("1", "1")])
    told = "the judge says right to the canary 'Thought process:' (the judge says the same)"
    assert verdicts == [("undecided", told)] * 2 + [("right", "the judge says the same")]


@pytest.mark.parametrize("answer", [":", "", "  \n", "x" * 2001])
def test_answers_without_content_are_wrong_unasked(serve, answer):
    server = serve(fair)
    assert judge_of(server).judge([Pair(answer, "5")])[0][0] == "wrong"
    assert judge_of(server).judge([Pair("5", "y" * 2001), Pair("5", "?")])[0][0] == "undecided"
    assert server.seen == []


def test_long_thought_before_the_word_is_read_past(serve):
    server = serve(lambda path, body: says("<think>SAME? No.</think>\n\n**Different**."))
    assert judge_of(server).judge([Pair("1", "2")])[0][0] == "wrong"


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (says("I cannot tell."), "the judge replied 'I cannot tell.', required SAME or DIFFERENT"),
        (says("SAME or DIFFERENT"), "the judge replied"),
        (says(None), "the judge replied 'None'"),
        ((200, b'{"error": "overloaded"}'), "the reply has no choices"),
        ((200, b"<html>"), "the reply is no JSON"),
        ((200, b"\xff\xfe"), "the reply is no JSON"),
        ((500, b"out of memory"), "HTTP 500 out of memory"),
        ((404, b"no such model"), "HTTP 404 no such model"),
        (None, "no reply from http://127.0.0.1"),
    ],
)
def test_nonsense_and_failures_are_undecided_with_the_reason(serve, reply, reason):
    server = serve(lambda path, body: reply)
    verdict, found = GenerativeJudge(server.endpoint, "m", canaries=0).judge([Pair("1", "2")])[0]
    assert verdict == "undecided" and reason in found


def test_failures_that_may_pass_are_tried_again(serve):
    def failing_first(path, body):
        return fair(path, body) if len(server.seen) > 2 else (503, b"busy")

    server = serve(failing_first)
    assert GenerativeJudge(server.endpoint, "m", canaries=0, parallel=1).judge([Pair("1", "1")])[0][0] == "right"
    assert len(server.seen) == 4


def test_endpoint_that_is_down_is_undecided_and_refused_by_the_check(serve):
    server = serve(fair)
    judge = judge_of(server)
    judge.check()
    server.shutdown()
    server.server_close()
    verdict, reason = judge.judge([Pair("1", "1")])[0]
    assert verdict == "undecided" and "Connection refused" in reason
    with pytest.raises(RuntimeError, match=r"judge judge-model at http.*: found undecided .*required right"):
        judge.check()


def test_half_a_surrogate_pair_reaches_the_judge_escaped(serve):
    server = serve(lambda path, body: says("DIFFERENT"))
    assert judge_of(server).judge([Pair("1\ud800", "1")])[0][0] == "wrong"


def test_key_comes_from_the_environment(serve, monkeypatch):
    server = serve(fair)
    with pytest.raises(ValueError, match="the environment variable R1ENGINE_TEST_KEY is not set"):
        Endpoint(server.endpoint.url, key_variable="R1ENGINE_TEST_KEY")
    monkeypatch.setenv("R1ENGINE_TEST_KEY", "abc")
    endpoint = Endpoint(server.endpoint.url, key_variable="R1ENGINE_TEST_KEY")
    GenerativeJudge(endpoint, "m").judge([Pair("1", "1")])
    assert {key for _, _, key in server.seen} == {"Bearer abc"} and "abc" not in repr(endpoint)


def test_url_without_a_scheme_is_refused():
    with pytest.raises(ValueError, match=r"found url '10\.0\.0\.7:30000', required http://"):
        Endpoint("10.0.0.7:30000")


def test_reward_model_scores_in_batches_and_keeps_order(serve):
    def score(path, body):
        return 200, json.dumps([{"embedding": [float(text)]} for text in body["text"]]).encode()

    server = serve(score)
    model = RewardModel(server.endpoint, "rm", render=lambda prompt, text: prompt + text, batch_size=2)
    assert model([("1", "0"), ("2", "0"), ("3", "0")]) == [10.0, 20.0, 30.0]
    assert [path for path, _, _ in server.seen] == ["/v1/classify"] * 2


def test_reward_model_that_fails_gives_no_score(serve):
    server = serve(lambda path, body: (200, b'[{"embedding": []}]'))
    assert RewardModel(server.endpoint, "rm", render=lambda p, t: t)([("p", "t")]) == [None]


def test_hanging_server_is_given_up_after_the_timeout(serve):
    waiting = threading.Event()
    server = serve(lambda path, body: waiting.wait(20) and None)
    endpoint = Endpoint(server.endpoint.url, timeout_seconds=0.1, tries=2, pause_seconds=0.0)
    with pytest.raises(EndpointError, match="timed out"):
        endpoint.post("/x", {})
    waiting.set()
