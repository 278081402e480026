"""Latent attention in the embedded generator: what is kept of a token, and that steps over it change no number."""

import math

import numpy as np
import pytest
import torch
from model_folders import save_model
from paged_generator import local_generator

from r1engine.hf.architecture import read_architecture
from r1engine.hf.folder import weights_of
from r1engine.hf.kv_shape import kv_shape
from r1engine.rollout.local.cache import KVCache, bytes_of
from r1engine.rollout.local.decoder import Decoder
from r1engine.rollout.local.pages import PagedCache

CPU = torch.device("cpu")
SHAPE = {"rows": 3, "limit": 60, "dtype": torch.float32}


@pytest.mark.parametrize("family", ["deepseek", pytest.param("moonlight", marks=pytest.mark.rotating)])
@torch.inference_mode()
def test_steps_over_entries_are_attention_with_keys_and_values(tmp_path, family):
    # `prefill` makes keys and values of every token; transformers does, too.
    reference, arch = save_model(tmp_path, family, num_hidden_layers=2), read_architecture(tmp_path)
    decoder = Decoder(arch, device=CPU, dtype=torch.float32)
    decoder.weights.load(weights_of(tmp_path))
    tokens = torch.randint(2, 90, (3, 30), generator=torch.Generator().manual_seed(0)).tolist()
    prefill, rows = decoder.prefill([found[:n] for found, n in zip(tokens, (18, 7, 1), strict=True)]), np.arange(3)
    caches, positions = (KVCache(arch, **SHAPE), PagedCache(arch, **SHAPE, pages=9, device=CPU)), [18, 7, 1]
    for cache in caches:
        cache.fill(rows, prefill.kv, rows, np.array(positions), [0, 1, 2])
    for _ in range(3):
        sofar = [found[: at + 1] for found, at in zip(tokens, positions, strict=True)]
        theirs = torch.stack([reference(torch.tensor([ids])).logits[0, -1] for ids in sofar])
        for cache in caches:
            assert cache.reserve(np.array(positions))
            found, _ = decoder.step(torch.tensor([ids[-1] for ids in sofar]), torch.tensor(positions), cache)
            for wanted in (decoder.prefill(sofar).logits, theirs):
                torch.testing.assert_close(found.log_softmax(1), wanted.log_softmax(1), rtol=0, atol=1e-5)
        positions = [at + 1 for at in positions]


def test_one_entry_a_token_is_kept_for_all_heads(tmp_path):
    save_model(tmp_path, "deepseek")
    generator, arch = local_generator(tmp_path), read_architecture(tmp_path)
    assert kv_shape(arch) == (1, 1, 16 + 8)  # the latent and the rotated part of the keys
    for cache in (KVCache(arch, **SHAPE), PagedCache(arch, **SHAPE, pages=9, device=CPU)):
        assert {(len(layer), layer.shape[2], layer.shape[4]) for layer in cache.layers} == {kv_shape(arch)}
        assert bytes_of(cache, 5) == generator.bytes_of(5) == 5 * 4 * arch.num_layers * math.prod(kv_shape(arch))
