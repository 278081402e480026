"""Against real SGLang servers on CPUs: `make test-sglang`."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from model_folders import save_model

from r1engine.batch import Prompt
from r1engine.config import Config, Data, Model, Rollout, Sglang
from r1engine.model.precision import export_folder
from r1engine.rollout.sglang import launch
from r1engine.rollout.sglang.buckets import buckets, payload
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
    python = os.environ.get("R1_SGLANG_PYTHON")
    assert python, "R1_SGLANG_PYTHON: required the Python of the environment that `make sglang-cpu` makes"
    settings = Sglang(python=Path(python), cpu_tokens=4096, stream_interval=4)
    cfg = Config(
        run_dir=tmp_path_factory.mktemp("run"),
        model=Model(path=model[0]),
        rollout=Rollout(engine="sglang", sglang=settings),
    )
    started = [
        launch.start(cfg, name=f"server{i}", host="127.0.0.1", port=None, devices=None, dtype="float32")
        for i in range(2)
    ]
    for server in started:
        server.wait_ready(600.0)
    yield started
    for server in started:
        server.stop()


def generator(model, servers, tmp_path, **changes) -> SglangGenerator:
    urls = [server.client.url for server in servers]
    settings = Sglang(mode="remote", urls=urls, bucket_mib=1, **({"stall_seconds": 15.0} | changes))
    cfg = Config(
        run_dir=tmp_path,
        model=Model(path=model[0]),
        data=Data(max_prompt_tokens=32),
        rollout=Rollout(engine="sglang", sglang=settings, max_tokens=64),
    )
    return SglangGenerator(
        cfg,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
        write_folder=lambda weights, target: export_folder(weights, target, source=model[0]),
        note=print,
    )


def changed(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Other weights for the model, set in `module` as well."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return {name: p.detach().clone() for name, p in module.named_parameters()}


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


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, [5 + i, 6, 7, 8 + i], "", "", "") for i in range(count)]


@torch.no_grad()
def difference(module: torch.nn.Module, completions) -> float:
    """Largest |logp - transformers' logp| of any sampled token."""
    worst = 0.0
    for c in completions:
        tokens = torch.tensor([c.prompt.tokens + c.tokens])
        logp = module(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        worst = max(worst, float((logp[-len(c.tokens) :] - torch.tensor(c.logp)).abs().max()))
    return worst


@pytest.mark.parametrize("route", ["tensor", "distributed", "disk"])
def test_after_a_refresh_the_servers_are_the_policy(model, servers, tmp_path, route):
    engine = generator(model, servers[:1], tmp_path, route=route)
    module = model[1]
    weights = changed(module, seed=len(route))
    engine.load_weights(iter(weights.items()))
    assert engine.check_canaries(oracle(module), row_multiple=1) < 1e-4
    completions = engine.generate(prompts(4), num_samples=4, step=0, max_tokens=24)
    assert difference(module, completions) < 1e-4
    assert {c.versions for c in completions} == {((1, len(c.tokens)),) for c in completions}
    greedy = engine.generate(prompts(2), num_samples=1, step=0, max_tokens=12, top_k=1)
    for c in greedy:
        tokens = torch.tensor([c.prompt.tokens])
        expected = module.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, tokens.shape[1] :]
        assert c.tokens == expected.tolist()
    engine._refresher.close()


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
    body = {"serialized_named_tensors": [payload(bucket)], "load_format": "flattened_bucket", "flush_cache": False}
    client.post("/update_weights_from_tensor", body)
    client.post("/end_weight_update", {})
    expected = engine._refresher.expect(iter(weights.items()))
    with pytest.raises(
        RuntimeError, match=r"1 tensors are wrong: model\.layers\.2\.self_attn\.qkv_proj\.weight: differs"
    ):
        engine._refresher.verify_server(client, expected, 1)
    later = dict(weights) | {"model.layers.1.mlp.down_proj.weight": weights["model.layers.1.mlp.down_proj.weight"] + 1}
    expected = engine._refresher.expect(iter(later.items()))  # as if this tensor had never been sent
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
        body = {"serialized_named_tensors": [payload(bucket)], "load_format": "flattened_bucket", "flush_cache": False}
        client.post("/update_weights_from_tensor", body | {"weight_version": "1"})
    client.post("/end_weight_update", {})
    with pytest.raises(RuntimeError, match="a stale cache, or a model that is computed otherwise"):
        engine.check_canaries(oracle(module), row_multiple=1)
    client.post("/flush_cache", {})
    engine.check_canaries(oracle(module), row_multiple=1)


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

        completions = engine.generate(prompts(8), num_samples=4, step=0, max_tokens=48, on_tokens=strike)
        assert [c.prompt.id for c in completions] == [i for i in range(8) for _ in range(4)]
        assert all(c.truncated or c.tokens[-1] == 1 for c in completions)
        assert difference(module, completions) < 1e-4
        assert not engine.endpoints[1].is_usable
        if what == signal.SIGSTOP:  # it comes back, is taken in again and gets the next weights
            os.killpg(victim, signal.SIGCONT)
            engine.load_weights(iter(changed(module, seed=15).items()))
            assert engine.endpoints[1].is_usable
    engine.load_weights(iter(changed(module, seed=16).items()))  # the survivor goes on
    assert difference(module, engine.generate(prompts(2), num_samples=2, step=1, max_tokens=8)) < 1e-4
