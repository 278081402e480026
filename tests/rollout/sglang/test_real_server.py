"""Against real SGLang servers on CPUs: `make test-sglang`."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import real
import torch
from model_folders import save_model
from real import changed, difference, logp_of, prompts

from r1engine.config import RlConfig
from r1engine.data.stream import MixedStream, PromptStream
from r1engine.ranks import World
from r1engine.rollout import generate
from r1engine.rollout.draft import Sampling, new_drafts
from r1engine.rollout.rollouts import Rollouts
from r1engine.rollout.sglang.buckets import buckets, flatten, payload
from r1engine.rollout.sglang.client import Client, ServerError
from r1engine.rollout.sglang.generator import SglangGenerator

pytestmark = pytest.mark.sglang

SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, save_model(folder, "qwen2", **SIZES)


@pytest.fixture(scope="module")
def servers(model, tmp_path_factory):
    """Two servers of the model; the tests may kill the second."""
    run_dir = tmp_path_factory.mktemp("run")
    started = [real.serve(model[0], run_dir, f"server{i}") for i in range(2)]
    try:
        for server in started:
            server.wait_ready(real.START_SECONDS)
        yield started
    finally:
        for server in started:
            server.stop()


def generator(model, servers, tmp_path, **settings) -> SglangGenerator:
    return real.generator(model[0], [server.client.url for server in servers], tmp_path, **settings)


def oracle(module: torch.nn.Module):
    """Log-probabilities of packed rows by transformers, a sequence at a time."""

    @torch.no_grad()
    def logprobs(rows):
        found = []
        for row in rows:
            logp = torch.zeros(len(row.tokens))
            for start, end in zip(row.cu_seqlens[:-1].tolist(), row.cu_seqlens[1:].tolist(), strict=True):
                tokens = row.tokens[start:end]
                scores = module(tokens[None]).logits[0, :-1].log_softmax(-1)
                logp[start + 1 : end] = scores.gather(1, tokens[1:, None])[:, 0]
            found.append(logp)
        return found

    return logprobs


def test_a_real_server_answers_nobody_without_the_key(servers):
    url = servers[0].client.url
    for key in ("", "another"):
        for path in ("/server_info", "/model_info", "/v1/models"):
            with pytest.raises(ServerError, match="HTTP 401"):
                Client(url, stall_seconds=60, key=key).get(path)
        for path in ("/generate", "/flush_cache", "/update_weights_from_disk", "/release_memory_occupation"):
            with pytest.raises(ServerError, match="HTTP 401"):
                Client(url, stall_seconds=60, key=key).post(path)
    words = Path(f"/proc/{servers[0].process.pid}/cmdline").read_bytes()
    assert real.KEY.encode() not in words
    assert servers[0].client.get("/server_info")["skip_tokenizer_init"]


def body_of(bucket) -> dict:
    """Of a call that our refresh knows nothing of."""
    text = payload(bucket, flatten(bucket))
    return {"serialized_named_tensors": [text], "load_format": "flattened_bucket", "flush_cache": False}


def flush_when_idle(client) -> None:
    """SGLang refuses to flush while it works."""
    end = time.monotonic() + 20.0
    while True:
        try:
            client.post("/flush_cache", {})
            return
        except ServerError:
            assert time.monotonic() < end, "the server still works on what nobody waits for"


@pytest.mark.parametrize("route", ["tensor", "distributed", "disk"])
def test_after_a_refresh_the_servers_are_the_policy(model, servers, tmp_path, route):
    engine = generator(model, servers[:1], tmp_path, route=route)
    module = model[1]
    weights = changed(module, seed=len(route))
    engine.load_weights(iter(weights.items()))
    assert engine.check_canaries(oracle(module), row_multiple=1) < 1e-4
    completions = generate(engine, prompts(4), num_samples=4, step=0, max_tokens=24)
    assert difference(module, completions) < 1e-4
    assert {c.versions for c in completions} == {((1, len(c.tokens)),) for c in completions}
    greedy = generate(engine, prompts(2), num_samples=1, step=0, max_tokens=12, sampling=Sampling(top_k=1))
    for c in greedy:
        tokens = torch.tensor([c.prompt.tokens])
        expected = module.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, tokens.shape[1] :]
        assert c.tokens == expected.tolist()
    engine._refresher.close()


def test_the_disk_route_sends_what_changed(model, servers, tmp_path):
    engine = generator(model, servers[:1], tmp_path, route="disk")
    weights = changed(model[1], seed=31)
    engine.load_weights(iter(weights.items()))
    everything = engine.report.num_bytes
    with torch.no_grad():
        model[1].model.layers[1].mlp.up_proj.weight.mul_(1.5)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = model[1].state_dict()[name].clone()
    engine.load_weights(iter(weights.items()))  # all digests are compared, also of what was not sent
    assert engine.report.num_bytes == 4 * weights[name].numel() < everything / 10
    assert difference(model[1], generate(engine, prompts(2), num_samples=2, step=0, max_tokens=12)) < 1e-4


def test_a_damaged_and_a_missing_tensor_are_named(model, servers, tmp_path):
    engine = generator(model, servers[:1], tmp_path)
    weights = changed(model[1], seed=11)
    engine.load_weights(iter(weights.items()))
    client = servers[0].client
    name = "model.layers.2.self_attn.k_proj.weight"
    damaged = weights[name].clone()
    damaged[3, 5] += 1e-6
    (bucket,) = buckets(iter([(name, damaged)]), 2**20)
    client.post("/begin_weight_update", {"selector": "all"})
    body = {
        "serialized_named_tensors": [payload(bucket, flatten(bucket))],
        "load_format": "flattened_bucket",
        "flush_cache": False,
    }
    client.post("/update_weights_from_tensor", body)
    client.post("/end_weight_update", {})
    expected = real.expected(engine, weights)
    with pytest.raises(
        RuntimeError, match=r"1 tensors are wrong: model\.layers\.2\.self_attn\.qkv_proj\.weight: differs"
    ):
        engine._refresher.verify_server(client, expected, 1)
    later = dict(weights) | {"model.layers.1.mlp.down_proj.weight": weights["model.layers.1.mlp.down_proj.weight"] + 1}
    expected = real.expected(engine, later)  # as if this tensor had never been sent
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: differs"):
        engine._refresher.verify_server(client, expected, 1)


def test_a_stale_cache_is_caught_by_the_fixed_prompts(model, servers, tmp_path):
    engine = generator(model, servers[:1], tmp_path)
    module = model[1]
    engine.load_weights(iter(changed(module, seed=12).items()))
    engine.check_canaries(oracle(module), row_multiple=1)  # fills the cache with the prompts
    client = servers[0].client
    client.post("/begin_weight_update", {"selector": "all"})
    for bucket in buckets(iter(changed(module, seed=13).items()), 2**20):
        body = {
            "serialized_named_tensors": [payload(bucket, flatten(bucket))],
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        client.post("/update_weights_from_tensor", body | {"weight_version": "1"})
    client.post("/end_weight_update", {})
    with pytest.raises(RuntimeError, match="a stale cache, or a model that is computed otherwise"):
        engine.check_canaries(oracle(module), row_multiple=1)
    client.post("/flush_cache", {})
    engine.check_canaries(oracle(module), row_multiple=1)


def test_an_interrupted_sample_goes_on_with_the_new_weights(model, servers, tmp_path):
    engine = generator(model, servers[:1], tmp_path, stall_seconds=60.0)
    module = model[1]
    engine.load_weights(iter(changed(module, seed=21).items()))
    old = copy.deepcopy(module)
    drafts = new_drafts(prompts(2), num_samples=4, step=0, max_tokens=400)
    count: list[int] = []
    engine.draw(drafts, Sampling(), on_tokens=count.append, should_stop=lambda: sum(count) >= 64)
    assert any(draft.tokens and not draft.finish for draft in drafts)
    flush_when_idle(servers[0].client)  # the server was told to abort them
    engine.load_weights(iter(changed(module, seed=22).items()))
    engine.draw(drafts, Sampling())
    crossed = [draft for draft in drafts if len(draft.versions) == 2]
    assert crossed and all(draft.finish for draft in drafts)
    for draft in crossed:
        (first, before), (second, after) = draft.versions
        assert (first, second) == (1, 2) and before + after == len(draft.tokens) == len(draft.logp)
        found = torch.tensor(draft.logp)
        assert (found - logp_of(old, draft))[:before].abs().max() < 1e-4
        assert (found - logp_of(module, draft))[before:].abs().max() < 1e-4


def test_the_next_rollout_is_drawn_while_the_trainer_works(model, servers, tmp_path):
    engine = generator(model, servers[:1], tmp_path, stall_seconds=60.0)
    engine.load_weights(iter(changed(model[1], seed=41).items()))
    cfg = RlConfig(
        steps=3,
        rollout={"max_staleness": 1, "max_tokens": 400},
        grpo={"questions": 4, "group_size": 2, "minibatches": 1},
    )
    ahead = Rollouts(
        engine, MixedStream(PromptStream(prompts(20), seed=0, digest="")), cfg, World(0, 1, torch.device("cpu"))
    )
    old = copy.deepcopy(model[1])
    first = ahead.take(0)
    end = time.monotonic() + 60.0
    with ahead.drawing():  # stands for the updates: tokens come before they are over
        while not any(draft.tokens for question in ahead.questions for draft in question.drafts):
            assert time.monotonic() < end, "nothing is drawn while the trainer works"
            threading.Event().wait(0.05)
    assert ahead.metrics(first)["tokens_ahead"] > 0
    engine.load_weights(iter(changed(model[1], seed=42).items()))
    second = ahead.take(1)
    assert {c.prompt.id for c in first} & {c.prompt.id for c in second} == set()
    assert any(len(c.versions) == 2 for c in second) and ahead.metrics(second)["staleness/max"] == 1
    for c in second:
        num_old = sum(number for version, number in c.versions if version == 1)
        by_old, by_new, found = logp_of(old, c), logp_of(model[1], c), torch.tensor(c.logp)
        assert (found - torch.cat([by_old[:num_old], by_new[num_old:]])).abs().max() < 1e-4


def test_a_server_that_is_stopped_or_killed_in_the_middle_loses_nothing(model, servers, tmp_path):
    engine = generator(model, servers, tmp_path, stall_seconds=5.0)
    module = model[1]
    engine.load_weights(iter(changed(module, seed=14).items()))
    victim = servers[1].process.pid
    for what in (signal.SIGSTOP, signal.SIGKILL):
        hit = threading.Event()

        def strike(count: int, what: int = what, hit: threading.Event = hit) -> None:
            if not hit.is_set():  # at the first tokens that arrive
                hit.set()
                os.killpg(victim, what)

        completions = generate(engine, prompts(8), num_samples=12, step=0, max_tokens=64, on_tokens=strike)
        assert [c.prompt.id for c in completions] == [i for i in range(8) for _ in range(12)]
        assert all(c.truncated or c.tokens[-1] == 1 for c in completions)
        assert difference(module, completions) < 1e-4
        assert not engine.endpoints[1].is_usable
        if what == signal.SIGSTOP:  # it comes back, is taken in again and gets the next weights
            os.killpg(victim, signal.SIGCONT)
            engine.load_weights(iter(changed(module, seed=15).items()))
            assert engine.endpoints[1].is_usable
    engine.load_weights(iter(changed(module, seed=16).items()))  # the survivor goes on
    assert difference(module, generate(engine, prompts(2), num_samples=2, step=1, max_tokens=8)) < 1e-4
