"""Mixtures of experts on real SGLang servers: digests, the experts that were chosen, trainers of several ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import real
import torch
from model_folders import save_model
from ranks import torchrun
from safetensors.torch import load_file, save_file

from r1engine.batch import Prompt
from r1engine.data.question import Question
from r1engine.hf.architecture import read_architecture
from r1engine.rollout import generate
from r1engine.rollout.local.decoder import Decoder

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

# A server on CPUs pads intermediate sizes to multiples of 32, which every real one is.
SIZES = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 128}
SIZES["max_position_embeddings"] = 512
# SGLang reads these from every DeepSeek config, and knows no mlp_only_layers of Qwen3-MoE.
FAMILIES = {
    "deepseek": {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "qwen3-moe": {"mlp_only_layers": []},
}


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, tmp_path_factory):
    """(folder that the server was started from, its URL, that of the receiver beside it)."""
    folder, run_dir = tmp_path_factory.mktemp(request.param), tmp_path_factory.mktemp("run")
    save_model(folder, request.param, **SIZES, **FAMILIES[request.param])
    server = real.serve(folder, run_dir)
    try:
        server.wait_ready(real.START_SECONDS)
        with real.receivers(folder, run_dir) as (receiver,):
            yield folder, server.client.url, receiver
    finally:
        server.stop()


def other_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Other weights than the server was started with."""
    torch.manual_seed(5)
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in tensors.items()}


def test_experts_arrive_and_what_was_chosen_comes_back(served, tmp_path):
    folder, url, _ = served
    engine = real.generator(folder, [url], tmp_path, stall_seconds=60.0)
    weights = other_weights(folder)
    engine.load_weights(iter(weights.items()))  # verified: every digest, w13 and w2 of the experts included
    expected = real.expected(engine, weights)
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    damaged = real.expected(engine, weights | {name: weights[name] + 1e-3})
    engine._refresher.verify_server(engine.endpoints[0].client, expected, 1)
    with pytest.raises(RuntimeError, match=r"1 tensors are wrong: model\.layers\.2\.mlp\.experts\.w13_weight: differs"):
        engine._refresher.verify_server(engine.endpoints[0].client, damaged, 1)
    arch = read_architecture(folder)
    decoder = Decoder(arch, device=torch.device("cpu"), dtype=torch.float32)
    decoder.weights.load(weights.items())
    for c in generate(engine, real.prompts(3), num_samples=2, step=0, max_tokens=24):
        tokens = c.prompt.tokens + c.tokens
        with torch.inference_mode():
            chosen = decoder.prefill([tokens[:-1]]).experts[0]
        assert c.experts.shape == chosen.shape == (len(tokens) - 1, arch.moe.num_layers, arch.moe.top_k)
        assert torch.equal(c.experts.long().sort(-1).values, chosen.sort(-1).values)


def test_the_experts_of_a_long_sample_arrive(tmp_path):
    # 4 layers of 8 experts a token: the last part of 3,600 tokens is a line of 614 KB.
    sizes = SIZES | {"num_experts": 16, "num_experts_per_tok": 8, "max_position_embeddings": 4096}
    folder = tmp_path / "model"
    save_model(folder, "qwen3-moe", **sizes, **FAMILIES["qwen3-moe"])
    server = real.serve(folder, tmp_path)
    try:
        server.wait_ready(real.START_SECONDS)
        engine = real.generator(folder, [server.client.url], tmp_path, stall_seconds=120.0)
        engine.load_weights(iter(load_file(folder / "model.safetensors").items()))
        prompt = Prompt(0, torch.arange(3500).remainder(120).add(4).tolist(), "", Question(""))
        (drawn,) = generate(engine, [prompt], num_samples=1, step=0, max_tokens=100)
    finally:
        server.stop()
    arch = read_architecture(folder)
    assert drawn.experts.shape == (len(prompt.tokens) + len(drawn.tokens) - 1, arch.moe.num_layers, 8)


@pytest.mark.parametrize(
    ("layout", "route"),
    [("tensor", "tensor"), ("expert", "disk"), ("tensor,expert", "distributed"), ("pipeline", "distributed")]
    + [(layout, "receivers") for layout in ("tensor", "expert", "tensor,expert", "pipeline")],
)
def test_each_rank_of_a_trainer_sends_its_share_and_all_is_verified(served, tmp_path, monkeypatch, layout, route):
    folder, url, receiver = served
    monkeypatch.setenv(real.KEY_VARIABLE, real.KEY)
    trained = tmp_path / "trained"
    shutil.copytree(folder, trained)
    save_file(other_weights(folder), trained / "model.safetensors", {"format": "pt"})
    done = torchrun(2, Path(__file__).with_name("two_ranks.py"), trained, url, layout, route, tmp_path, receiver)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["canary"] < 1e-4 and result["logp_diff"] < 1e-4 and result["samples"] == 12
    # Of the bytes that the servers got. The stages of a pipeline are uneven where the first layer is dense.
    assert result["share"] < (0.6 if layout == "pipeline" and read_architecture(folder).mla else 0.55)
