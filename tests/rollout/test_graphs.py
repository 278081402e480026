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
from r1engine.rollout.local.memory import rows_that_fit

PROMPTS = [[2, 3, 4], [5, 6], [7, 8, 9, 10], [11, 12], [13]]
LIMIT = 300


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
    decoder._is_compiled = False  # the steps of a GPU
    caches = [KVCache(arch, rows=5, limit=LIMIT, device=decoder.device, dtype=decoder.dtype) for _ in range(2)]
    prefill = decoder.prefill(PROMPTS)
    for cache in caches:
        cache.reserve(LIMIT)
        cache.fill(torch.arange(5), prefill.kv, torch.arange(5), torch.tensor(prefill.lengths))
    steps = graphs.Steps(decoder, caches[0], 5, LIMIT)
    random, positions = np.random.default_rng(1), np.array(prefill.lengths)
    for step in range(3 * graphs.WORTH):
        live = 5 if step < graphs.WORTH + 4 else 3  # 5 rows, recorded; then 3 of 4 rows, recorded too
        tokens = random.integers(2, 90, live)
        inputs = np.stack([tokens, positions[:live]])
        length = int(positions[:live].max()) + 1
        found = steps.step(inputs, length)
        wanted = decoder.step(*torch.from_numpy(inputs), caches[1], length=length)
        torch.testing.assert_close(found[0], wanted[0])
        assert (found[1] is None) == (wanted[1] is None) and (found[1] is None or torch.equal(found[1], wanted[1]))
        positions[:live] += 1
    assert list(steps._graphs) == [graphs.Shape(5, 256), graphs.Shape(4, 256)]


def test_shapes_are_few():
    decoder = SimpleNamespace(device=torch.device("cpu"))
    steps = graphs.Steps(decoder, None, 48, 33_000)
    shapes = {steps.shape(rows, length) for rows in range(1, 49) for length in range(1, 33_000, 7)}
    assert len(shapes) == 7 * 13  # 1, 2, 4 .. 32, 48 rows; 256 columns to all, each half as many again
    assert all(steps.shape(rows, length) >= (rows, length) for rows in (1, 33, 48) for length in (1, 256, 257, 33_000))


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe", "deepseek"])
def test_the_host_waits_once_a_draw_and_never_in_a_graph(fake_gpu_library, family):
    (seen,) = on_ranks(1, runs.draw, fake_gpu_library, family)
    assert seen.lengths == list(range(20, 27))
    assert seen.graphs == 1
    here = "r1engine/rollout/local/decode_batch.py:"
    prefills = seen.waits.pop(f"{here}_admit", 0)  # the experts of a batch of prompts
    assert seen.waits == {f"{here}_fetch": seen.draws}
    assert prefills <= 4
    if family != "qwen3":
        assert seen.launches["r1_moe_plan"] == seen.launches["r1_moe_combine"] > 0


def test_as_many_rows_as_fit_and_no_fewer_than_one(caplog):
    # Qwen2.5-7B in bfloat16: 57,344 bytes a token, so that 64 sequences of 32,768 tokens take 120 GB.
    qwen = SimpleNamespace(
        num_layers=28,
        num_kv_heads=4,
        num_heads=28,
        head_dim=128,
        hidden_size=3584,
        intermediate_size=18944,
        vocab_size=152064,
        moe=None,
    )
    wanted = {"slots": 64, "longest": 32768, "prefill": 8192, "size": 2}
    assert rows_that_fit(qwen, **wanted, free=150 * 10**9) == 64
    assert not caplog.records
    rows = rows_that_fit(qwen, **wanted, free=60 * 10**9)
    assert rows == 27  # of 54 GB: 1.87 for prompts, 1.884 a row
    assert "27 sequences of 32768 tokens at once in place of 64" in caplog.text
    with pytest.raises(RuntimeError, match=r"32768 tokens takes 1\.75 GiB .* required are .*rollout\.engine=sglang"):
        rows_that_fit(qwen, **wanted, free=3 * 10**9)
