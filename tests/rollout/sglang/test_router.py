"""Samples over several servers of which some fail. The servers are stand-ins (fake_server.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_server import FakeServer

from r1engine.rollout.sglang.client import Client
from r1engine.rollout.sglang.router import MOST_ATTEMPTS, Endpoint, Job, Router

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
    endpoints = [Endpoint(Client(s.url, stall_seconds=STALL_SECONDS), version="1") for s in servers]
    router = Router(endpoints, vocab_size=60, stall_seconds=STALL_SECONDS)
    jobs = [Job(group, [3, 4, 5 + group], max_tokens) for group in range(groups) for _ in range(size)]
    incidents = router.run(jobs, {"temperature": 1.0}, version="1")
    return jobs, endpoints, incidents


def is_whole(job: Job) -> bool:
    """Every token follows from the one before, and none is lost or doubled."""
    expected, last = [], job.prompt[-1]
    for _ in range(job.max_tokens):
        last = (last + 1) % 50 + 2
        expected.append(last)
    same_logp = job.drawn.logp == [-token / 100 for token in expected]
    return job.drawn.tokens == expected and same_logp and job.drawn.finish == "length"


def test_the_samples_of_a_prompt_go_to_one_server_and_the_groups_are_spread(servers):
    a, b = servers(healthy, healthy)
    jobs, _, incidents = route([a, b], groups=4)
    assert all(map(is_whole, jobs)) and not incidents
    prompts = [{tuple(body["input_ids"]) for body in server.requests} for server in (a, b)]
    assert not prompts[0] & prompts[1] and len(prompts[0]) == len(prompts[1]) == 2


@pytest.mark.parametrize(
    ("what", "after"), [("status 500", 0), ("cut", 5), ("garbage", 5), ("hang", 5), ("hang", 0), ("bad token", 5)]
)
def test_what_a_failing_server_drew_goes_on_elsewhere(servers, what, after):
    bad, good = servers(always(what, after), healthy)
    jobs, endpoints, incidents = route([bad, good])
    assert all(map(is_whole, jobs))
    assert not endpoints[0].is_usable and incidents
    if what in ("cut", "hang") and after:
        # Started again from nothing, long completions would fail more often than short ones.
        assert {len(body["input_ids"]) for body in good.requests} == {3, 3 + after}


def test_a_server_that_fails_once_stays_in_use(servers):
    (server,) = servers(lambda number, sent: "cut" if number == 0 and sent == 4 else None)
    jobs, endpoints, _ = route([server])
    assert all(map(is_whole, jobs)) and endpoints[0].is_usable


def test_tokens_of_other_weights_are_thrown_away(servers):
    old, new = servers(always("old weights"), healthy)
    jobs, endpoints, _ = route([old, new])
    assert all(map(is_whole, jobs))
    assert endpoints[0].problem == "drew from weights ['0'], required 1"
    assert {len(body["input_ids"]) for body in new.requests} == {3}


def test_without_a_server_the_run_stops_and_says_why(servers):
    (bad,) = servers(always("hang"))
    with pytest.raises(RuntimeError, match=r"no server holds weights 1 \(http://.*: sent nothing for \d s"):
        route([bad])


def test_a_sample_that_always_fails_stops_the_run(servers):
    # Each server fails now and then, never often enough in a row to be left out.
    (server,) = servers(lambda number, sent: "cut" if number % 2 == 0 else None)
    endpoints = [Endpoint(Client(server.url, stall_seconds=STALL_SECONDS), version="1")]
    router = Router(endpoints, vocab_size=60, stall_seconds=STALL_SECONDS)
    job = Job(0, [3], 5, attempts=MOST_ATTEMPTS - 1)
    with pytest.raises(RuntimeError, match=f"a sample failed {MOST_ATTEMPTS} times, the last time: http://"):
        router.run([job], {}, version="1")
