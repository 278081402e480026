"""The compiled decoder: a token's numbers have the same bits, whether it is in a prompt, goes on or is decoded."""

import random

import numpy as np
import pytest
import torch
from model_folders import save_model

from r1engine.hf.architecture import read_architecture
from r1engine.hf.folder import weights_of
from r1engine.rollout.local import compiled
from r1engine.rollout.local.cache import KVCache
from r1engine.rollout.local.decoder import Decoder
from r1kernels import cpu_lib

pytestmark = pytest.mark.skipif(cpu_lib.library_path() is None, reason="_cpu.so is not built: no C++ compiler")
CPU = torch.device("cpu")
TOKENS = [random.Random(0).randrange(2, 96) for _ in range(100)]


@pytest.fixture(params=[("qwen2", 1), ("qwen3", 2), ("llama", 3)], ids=lambda param: param[0])
def decoder(request, tmp_path):
    name, threads = request.param
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    save_model(tmp_path, name)
    made = Decoder(read_architecture(tmp_path), device=CPU, dtype=torch.float32)
    made.weights.load(weights_of(tmp_path))
    yield made
    torch.set_num_threads(before)


def test_tokens_that_go_on_are_those_of_the_whole(decoder):
    whole = decoder.extend([[TOKENS]], [[]])
    kv, other = whole.kv[0], [3, 4, 5]
    begun = decoder.extend([[TOKENS[:37]], [other]], [[], []])
    assert torch.equal(begun.hidden[:37], whole.hidden[:37])
    # Beside others that go on from the same prefix, and from another.
    tokens = [[TOKENS[60:61], other, TOKENS[60:90]], [other[::-1], TOKENS[37:]]]
    found = decoder.extend(tokens, [[begun.kv[0], kv[:, :, :, 37:60]], [begun.kv[0]]])
    one, _, some, _, rest = found.hidden.split([1, 3, 30, 3, 63])
    assert torch.equal(one, whole.hidden[60:61]) and torch.equal(some, whole.hidden[60:90])
    assert torch.equal(rest, whole.hidden[37:]) and torch.equal(found.kv[4], kv[:, :, :, 37:])


def test_a_prompt_and_decode_steps_are_the_whole(decoder):
    expected = compiled.linear(decoder.extend([[TOKENS]], [[]]).hidden, decoder.weights.head)
    lengths = [1, 20, 65]
    found = decoder.prefill([TOKENS[:length] for length in lengths])
    assert torch.equal(found.logits, expected[[length - 1 for length in lengths]])
    assert torch.equal(decoder.prefill([TOKENS[:20]]).logits, found.logits[1:2])
    cache, rows = KVCache(decoder.arch, rows=3, limit=100, dtype=torch.float32), np.arange(3)
    cache.fill(rows, found.kv, rows, np.array(lengths), [*"abc"])
    for step in range(30):
        at = torch.tensor(lengths) + step
        cache.reserve(at.numpy())
        assert torch.equal(decoder.step(torch.tensor(TOKENS)[at], at, cache)[0], expected[at])
