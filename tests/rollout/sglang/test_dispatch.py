"""Samples over several servers of which some fail. The servers are stand-ins (fake_server.py)."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_server import FakeServer

from r1engine.batch import Prompt
from r1engine.data.question import Question
from r1engine.hf.architecture import Architecture
from r1engine.rollout.draft import Draft, new_drafts
from r1engine.rollout.sglang.client import Client, ServerError
from r1engine.rollout.sglang.dispatch import MOST_ATTEMPTS, Dispatcher, Endpoint

STALL_SECONDS = 1.0


@pytest.fixture
def servers():
    running: list[FakeServer] = []

    def start(*faults: Callable[[int, int], str | None]) -> list[FakeServer]:
        running.extend(FakeServer(fault) for fault in faults)
        return running

    yield start
    for server in running:
        server.close()


def healthy(number: int, sent: int) -> None:
    return None


def always(what: str, after: int = 0) -> Callable[[int, int], str | None]:
    return lambda number, sent: what if sent >= after else None


def route(servers: list[FakeServer], groups: int = 4, size: int = 3, max_tokens: int = 12):
    endpoints = [Endpoint(Client(s.url, stall_seconds=STALL_SECONDS), version=1) for s in servers]
    router = Dispatcher(endpoints, vocab_size=60, stall_seconds=STALL_SECONDS)
    prompts = [Prompt(group, [3, 4, 5 + group], "", Question("")) for group in range(groups)]
    drafts = new_drafts(prompts, num_samples=size, step=0, max_tokens=max_tokens)
    incidents = router.run(drafts, {"temperature": 1.0}, version=1)
    return drafts, endpoints, incidents


def test_a_draft_is_handed_over_as_it_ends_while_others_are_still_drawn(servers):
    is_handed_over = threading.Event()
    late, early = servers(lambda number, sent: sent == 11 and is_handed_over.wait(60) and None, healthy)
    router = Dispatcher(
        [Endpoint(Client(s.url, stall_seconds=60), version=1) for s in (late, early)], vocab_size=60, stall_seconds=60
    )
    prompts = [Prompt(group, [3, 4, 5 + group], "", Question("")) for group in range(2)]
    drafts = new_drafts(prompts, num_samples=1, step=0, max_tokens=12)
    ended: list[tuple[int, list[str]]] = []

    def on_ended(draft: Draft) -> None:
        ended.append((draft.prompt.id, [one.finish for one in drafts]))
        is_handed_over.set()

    router.run(drafts, {}, version=1, on_ended=on_ended)
    assert ended == [(1, ["", "length"]), (0, ["length", "length"])]
    assert [len(server.requests) for server in (late, early)] == [1, 1]


def is_whole(draft: Draft) -> bool:
    """Every token follows from the one before, and none is lost or doubled."""
    expected, last = [], draft.prompt.tokens[-1]
    for _ in range(draft.max_tokens):
        last = (last + 1) % 50 + 2
        expected.append(last)
    same_logp = draft.logp == [-token / 100 for token in expected]
    return draft.tokens == expected and same_logp and draft.finish == "length"


def test_the_samples_of_a_prompt_go_to_one_server_and_the_groups_are_spread(servers):
    a, b = servers(healthy, healthy)
    drafts, _, incidents = route([a, b], groups=4)
    assert all(map(is_whole, drafts)) and not incidents
    prompts = [{tuple(body["input_ids"]) for body in server.requests} for server in (a, b)]
    assert not prompts[0] & prompts[1] and len(prompts[0]) == len(prompts[1]) == 2


@pytest.mark.parametrize(
    ("what", "after"), [("status 500", 0), ("cut", 5), ("hang", 5), ("hang", 0), ("bad token", 5), ("endless", 5)]
)
def test_what_a_failing_server_drew_goes_on_elsewhere(servers, what, after):
    bad, good = servers(always(what, after), healthy)
    drafts, endpoints, incidents = route([bad, good])
    assert all(map(is_whole, drafts))
    assert not endpoints[0].is_usable and incidents
    if what in ("cut", "hang") and after:
        # Started again from nothing, long completions would fail more often than short ones.
        # (A sample may have been cut by the bad server more than once.)
        lengths = {len(body["input_ids"]) for body in good.requests}
        assert lengths <= {3, 3 + after, 3 + 2 * after} and len(lengths) > 1


def part(tokens: str = "[5]", logprobs: str = "[[-0.5, 5, null]]", rest: str = '"finish_reason": null') -> str:
    """What a server sends of one token, as it is written."""
    meta = f'"output_token_logprobs": {logprobs}, "weight_version": "1", {rest}'
    return f'data: {{"output_ids": {tokens}, "meta_info": {{{meta}}}}}'


NO_ANSWERS = [
    "data:",
    "data: {nonsense",
    "data: \udcff",  # the byte 0xff
    "data: []",
    "data: 5",
    "data: null",
    "data: " + "[" * 100_000,
    'data: {"output_ids": [5], "meta_info": []}',
    'data: {"output_ids": [5]}',
    'data: {"error": {"message": "no"}}',
    part(tokens='["5"]'),
    part(tokens="[5.0]"),
    part(tokens="[true]"),
    part(tokens="[null]"),
    part(tokens="5"),
    part(tokens="[5, 5]"),
    part(logprobs="[[]]"),
    part(logprobs="[[null]]"),
    part(logprobs="[5]"),
    part(logprobs="[{}]"),
    part(logprobs="[[1e400]]"),
    part(rest='"finish_reason": "length"'),
    part(rest='"finish_reason": {"type": "tired"}'),
    part(rest='"finish_reason": {"type": "abort", "message": "no"}'),
    part(rest='"weight_versions": [5]'),
    part(rest='"weight_versions": "1"'),
]


@pytest.mark.parametrize("answer", NO_ANSWERS, ids=lambda answer: answer[:80])
def test_no_answer_of_a_server_ends_the_run(servers, answer):
    bad, good = servers(always(answer), healthy)
    drafts, endpoints, incidents = route([bad, good], groups=2)
    assert all(map(is_whole, drafts)) and not endpoints[0].is_usable
    assert incidents[0].startswith(f"{bad.url} left out: 3 failures in a row, the last: {bad.url}")


def test_a_server_that_speaks_no_http_is_left_out(servers):
    (good,) = servers(healthy)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def shout() -> None:
            with contextlib.suppress(OSError):  # closed at the end of the test
                while True:
                    connection, _ = listener.accept()
                    connection.sendall(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**20)
                    connection.close()

        threading.Thread(target=shout, daemon=True).start()
        endpoints = [Endpoint(Client(u, stall_seconds=STALL_SECONDS), version=1) for u in (url, good.url)]
        drafts = new_drafts([Prompt(0, [3], "", Question(""))], num_samples=3, step=0, max_tokens=12)
        Dispatcher(endpoints, vocab_size=60, stall_seconds=STALL_SECONDS).run(drafts, {}, version=1)
        with pytest.raises(ServerError, match="no answer"):
            endpoints[0].client.get("/health")
    assert all(map(is_whole, drafts)) and not endpoints[0].is_usable


# ---- experts ---------------------------------------------------------------------------------------------------


def model(layers: int, dense: int, top_k: int) -> Architecture:
    """Of a mixture of experts: what a dispatcher asks of it."""
    moe = SimpleNamespace(layers=tuple(i >= dense for i in range(layers)), top_k=top_k, num_experts=256)
    return SimpleNamespace(num_layers=layers, moe=moe)


def draw_experts(server: FakeServer, arch: Architecture, prompt: list[int], *, size: int, max_tokens: int):
    endpoint = Endpoint(Client(server.url, stall_seconds=30.0), version=1)
    router = Dispatcher([endpoint], vocab_size=60, stall_seconds=30.0, replays=arch)
    drafts = new_drafts([Prompt(0, prompt, "", Question(""))], num_samples=size, step=0, max_tokens=max_tokens)
    return drafts, router.run(drafts, {}, version=1), endpoint


# DeepSeek-V3 either side of 512 KiB a line, and as long as the paper's completions: a line of 85 MB.
@pytest.mark.parametrize(("prompt", "drawn"), [(3, 180), (3, 200), (32_600, 168)])
def test_the_experts_of_a_sample_come_through_whatever_their_size(prompt, drawn):
    shape = (prompt + drawn - 1, 61, 8)
    chosen = np.random.default_rng(0).integers(0, 256, shape, dtype="<i4")
    server = FakeServer(experts=lambda num_tokens: base64.b64encode(chosen[: num_tokens - 1]).decode())
    try:
        arch = model(61, 3, 8)
        (draft,), incidents, endpoint = draw_experts(server, arch, [5] * prompt, size=1, max_tokens=drawn)
    finally:
        server.close()
    assert not incidents and endpoint.is_usable and is_whole(draft)
    assert draft.experts.dtype == torch.int16 and np.array_equal(draft.experts.numpy(), chosen[:, 3:])


def test_the_experts_of_many_samples_at_once_are_held_one_at_a_time():
    # 16 lines of 8 MB; what is kept of each is a layer of 61. All at once they take 122 MB, one at a time 66.
    num_tokens = 3_300
    text = base64.b64encode(np.zeros((num_tokens - 1, 61, 8), "<i4")).decode()
    server = FakeServer(experts=lambda _: text)
    tracemalloc.start()
    try:
        drafts, incidents, _ = draw_experts(server, model(61, 60, 8), [5] * (num_tokens - 2), size=16, max_tokens=2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        server.close()
    assert not incidents and all(draft.experts.shape == (num_tokens - 1, 1, 8) for draft in drafts)
    assert peak < 95 * 2**20


@pytest.mark.parametrize("text", ["", "no base64!", base64.b64encode(b"\0" * 4).decode(), "//////8/" * 10])
def test_experts_that_are_no_answer_are_the_server_s_fault(text):
    server = FakeServer(experts=lambda _: text)
    try:
        drafts, incidents, endpoint = draw_experts(server, model(4, 1, 2), [5], size=3, max_tokens=6)
    finally:
        server.close()
    # The tokens are whole, and their experts the trainer's to choose; that is told.
    assert all(map(is_whole, drafts)) and all(draft.experts is None for draft in drafts)
    assert sum("the experts of a sample are lost (" in i and "routed_experts" in i for i in incidents) == 3
    assert not endpoint.is_usable and incidents[-2].startswith(f"{server.url} left out: 3 failures in a row")


def test_a_server_that_fails_once_stays_in_use(servers):
    (server,) = servers(lambda number, sent: "cut" if number == 0 and sent == 4 else None)
    drafts, endpoints, _ = route([server])
    assert all(map(is_whole, drafts)) and endpoints[0].is_usable


def test_tokens_of_other_weights_are_thrown_away(servers):
    old, new = servers(always("old weights"), healthy)
    drafts, endpoints, _ = route([old, new])
    assert all(map(is_whole, drafts))
    assert endpoints[0].problem == "drew from weights ['0'], required 1"
    assert {len(body["input_ids"]) for body in new.requests} == {3}


def test_without_a_server_the_run_stops_and_says_why(servers):
    (bad,) = servers(always("hang"))
    with pytest.raises(RuntimeError, match=r"no server holds weights 1 \(http://.*: sent nothing for \d s"):
        route([bad])


def test_a_sample_that_waits_behind_others_is_no_failure(servers):
    # One at a time, each takes half of stall_seconds: the last one hears nothing for four times stall_seconds.
    server = FakeServer(always("slow"), slots=1)
    try:
        drafts, endpoints, incidents = route([server], groups=3, size=3, max_tokens=5)
        assert all(map(is_whole, drafts)) and endpoints[0].is_usable and not incidents
        assert len(server.requests) == 9
    finally:
        server.close()


def test_a_sample_that_always_fails_stops_the_run(servers, monkeypatch):
    monkeypatch.setattr("r1engine.rollout.sglang.dispatch.STRIKES", MOST_ATTEMPTS + 1)  # the server stays in use
    (server,) = servers(always("cut"))
    with pytest.raises(RuntimeError, match=f"a sample failed {MOST_ATTEMPTS} times, the last time: http://"):
        route([server], groups=1, size=1)


def test_an_interrupted_run_keeps_what_came_and_the_next_goes_on_with_its_own_weights(servers):
    (server,) = servers(lambda number, sent: "hang" if number < 4 and sent == 5 else None)
    endpoint = Endpoint(Client(server.url, stall_seconds=60.0), version=1)
    router = Dispatcher([endpoint], vocab_size=60, stall_seconds=60.0)
    drafts = new_drafts([Prompt(0, [3, 4, 5], "", Question(""))], num_samples=4, step=0, max_tokens=12)
    count = []
    router.run(drafts, {}, version=1, on_tokens=count.append, should_stop=lambda: sum(count) == 20)
    assert [draft.versions for draft in drafts] == [[(1, 5)]] * 4
    assert not any(draft.finish for draft in drafts)
    assert sorted(server.aborted) == sorted(body["rid"] for body in server.requests)
    server.version, endpoint.version = "2", 2
    router.run(drafts, {}, version=2)
    assert all(map(is_whole, drafts))
    assert [draft.versions for draft in drafts] == [[(1, 5), (2, 7)]] * 4


def test_a_stop_token_whose_stream_was_cut_is_an_end(servers):
    (server,) = servers(lambda number, sent: "cut" if number == 0 and sent == 4 else None)
    router = Dispatcher([Endpoint(Client(server.url, stall_seconds=9.0), version=1)], vocab_size=60, stall_seconds=9.0)
    (draft,) = drafts = new_drafts([Prompt(0, [3], "", Question(""))], num_samples=1, step=0, max_tokens=12)
    router.run(drafts, {"stop_token_ids": [15]}, version=1)  # 6, 9, 12, 15
    assert draft.tokens == [6, 9, 12, 15] and draft.finish == "stop"
