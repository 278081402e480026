"""Samples over several servers of which some fail. The servers are stand-ins (fake_server.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_server import FakeServer

from r1engine.batch import Prompt
from r1engine.rollout.draft import Draft, new_drafts
from r1engine.rollout.sglang.client import Client
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
    prompts = [Prompt(group, [3, 4, 5 + group], "", "", "") for group in range(groups)]
    drafts = new_drafts(prompts, num_samples=size, step=0, max_tokens=max_tokens)
    incidents = router.run(drafts, {"temperature": 1.0}, version=1)
    return drafts, endpoints, incidents


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
    ("what", "after"), [("status 500", 0), ("cut", 5), ("garbage", 5), ("hang", 5), ("hang", 0), ("bad token", 5)]
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
    drafts = new_drafts([Prompt(0, [3, 4, 5], "", "", "")], num_samples=4, step=0, max_tokens=12)
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
    (draft,) = drafts = new_drafts([Prompt(0, [3], "", "", "")], num_samples=1, step=0, max_tokens=12)
    router.run(drafts, {"stop_token_ids": [15]}, version=1)  # 6, 9, 12, 15
    assert draft.tokens == [6, 9, 12, 15] and draft.finish == "stop"
