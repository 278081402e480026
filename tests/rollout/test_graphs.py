"""Decode steps that a GPU repeats as CUDA graphs, and the memory that drawing takes there. A stand-in repeats them on a
CPU by the function itself, on the same places; a fake GPU shows where the host waits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_gpu import runs
from ranks import on_ranks

from r1engine.hf.architecture import read_architecture
from r1engine.hf.folder import weights_of
from r1engine.rollout.local import graphs
from r1engine.rollout.local.cache import KVCache
from r1engine.rollout.local.decoder import Decoder
from r1engine.rollout.local.pages import PagedCache

PROMPTS = [[2, 3, 4], [5, 6], [7, 8, 9, 10], [11, 12], [13]]
LIMIT = 300
# Keys and values that are made of them are the widest of a layer.
LATENTS = {"num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
LATENTS |= {"qk_nope_head_dim": 128, "v_head_dim": 128, "moe_intermediate_size": 128}


def repeated(function, pool):
    """As a graph is: its results have one place, which each repetition overwrites."""
    places = function()

    def repeat():
        for place, values in zip(places, function(), strict=True):
            if place is not None:
                place.copy_(values)
        return places

    return repeat


@pytest.mark.parametrize("family", ["qwen3", "deepseek"])
@torch.inference_mode()
def test_recorded_steps_are_those_of_the_decoder(folders, monkeypatch, family):
    monkeypatch.setattr(graphs, "recorded", repeated)
    arch = read_architecture(folders[family][0])
    decoder = Decoder(arch, device=torch.device("cpu"), dtype=torch.float32)
    decoder.weights.load(weights_of(folders[family][0]))
    decoder._is_compiled = False
    shape = {"rows": 5, "limit": LIMIT, "dtype": decoder.dtype}
    cache, plain = PagedCache(arch, **shape, pages=30, device=decoder.device), KVCache(arch, **shape)
    prefill, numbers = decoder.prefill(PROMPTS), np.arange(5)
    for each in (cache, plain):
        each.fill(numbers, prefill.kv, numbers, np.array(prefill.lengths), list(range(5)))
    steps = graphs.Steps(decoder, cache, 5)
    random, positions = np.random.default_rng(1), np.array(prefill.lengths)
    for step in range(3 * graphs.WORTH):
        live = 5 if step < graphs.WORTH + 4 else 3  # 5 rows, recorded; then 3 of 4 rows, recorded too
        tokens = random.integers(2, 90, live)
        inputs = np.stack([tokens, positions[:live]])
        assert cache.reserve(positions[:live]) and plain.reserve(positions[:live])
        found = steps.step(inputs)
        wanted = decoder.step(*torch.from_numpy(inputs), plain)
        torch.testing.assert_close(found[0], wanted[0])
        assert (found[1] is None) == (wanted[1] is None) and (found[1] is None or torch.equal(found[1], wanted[1]))
        positions[:live] += 1
    assert list(steps._graphs) == [5, 4]


def test_numbers_of_rows_are_few():
    decoder = SimpleNamespace(device=torch.device("cpu"))
    steps = graphs.Steps(decoder, None, 48)
    assert {steps.rows(rows) for rows in range(1, 49)} == {1, 2, 4, 8, 16, 32, 48}
    assert all(steps.rows(rows) >= rows for rows in range(1, 49))


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe", "deepseek"])
def test_the_host_waits_once_a_draw_and_never_in_a_graph(fake_gpu_library, family):
    (seen,) = on_ranks(1, runs.draw, fake_gpu_library, family)
    assert seen.lengths == list(range(20, 27))
    assert seen.graphs == 1
    here = "r1engine/rollout/local/decode_batch.py:"
    prefills = seen.waits.pop(f"{here}_begin", 0)  # the experts of a batch of prompts
    assert seen.waits == {f"{here}_fetch": seen.draws}
    assert prefills <= 4
    if family != "qwen3":
        assert seen.launches["r1_moe_plan"] == seen.launches["r1_moe_combine"] > 0


@pytest.mark.rotating
def test_what_has_no_page_waits_on_the_host(fake_gpu_library):
    (seen,) = on_ranks(1, runs.draw, fake_gpu_library, "qwen3", 30, 7)  # sequences of three pages, in four rows
    assert seen.lengths == list(range(30, 37))
    layers = runs.SIZES["num_hidden_layers"]
    moved = seen.waits.pop("r1engine/rollout/local/pages.py:set_aside")
    assert moved >= layers and moved % layers == 0
    assert seen.waits == {"r1engine/rollout/local/decode_batch.py:_fetch": seen.draws - moved // layers}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        pytest.param("qwen3", {}, marks=pytest.mark.rotating),
        ("qwen3-moe", {"hidden_size": 384, "moe_intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 8}),
        pytest.param("deepseek", runs.WIDE, marks=pytest.mark.rotating),
        pytest.param(
            "moonlight", {"hidden_size": 256, "intermediate_size": 256, **LATENTS}, marks=pytest.mark.rotating
        ),
    ],
)
def test_prompts_take_no_more_than_is_reckoned(fake_gpu_library, family, sizes):
    ((most, reckoned),) = on_ranks(1, runs.prefill, fake_gpu_library, family, sizes)
    assert 0.5 * reckoned < most <= reckoned
