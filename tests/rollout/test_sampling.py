"""One token from logits and a uniform, and where the uniforms come from."""

from itertools import product

import numpy as np
import torch

from r1engine.rollout.local.sampling import sample, stream_keys, uniforms


def test_sampling_by_hand():
    # softmax(log p / 1) = p = 0.1 0.2 0.3 0.4, cdf 0.1 0.3 0.6 1.0
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    uniform = torch.tensor([0.05, 0.15, 0.35, 0.65, 0.999], dtype=torch.float64)
    tokens, logp = sample(p.log().repeat(5, 1), uniform, temperature=1.0, top_p=1.0, top_k=0)
    assert tokens.tolist() == [0, 1, 2, 3, 3]
    torch.testing.assert_close(logp, p.log()[tokens])
    # temperature 0.5 squares: 1 4 9 16 of 30, cdf 0.033 0.167 0.467 1.0
    tokens, logp = sample(p.log().repeat(5, 1), uniform, temperature=0.5, top_p=1.0, top_k=0)
    assert tokens.tolist() == [1, 1, 2, 3, 3]
    torch.testing.assert_close(logp.exp(), torch.tensor([4.0, 4.0, 9.0, 16.0, 16.0]) / 30)
    # top_k 2 keeps 0.3 0.4, cdf 3/7 1; the log-probability stays that of the whole vocabulary
    tokens, logp = sample(p.log().repeat(5, 1), uniform, temperature=1.0, top_p=1.0, top_k=2)
    assert tokens.tolist() == [2, 2, 2, 3, 3]
    torch.testing.assert_close(logp, p.log()[tokens])
    # top_p 0.75: 0.4 + 0.3 do not reach it, so 0.2 stays too; cdf 2/9 5/9 1
    tokens, _ = sample(p.log().repeat(5, 1), uniform, temperature=1.0, top_p=0.75, top_k=0)
    assert tokens.tolist() == [1, 1, 2, 3, 3]
    # top_k 3 first leaves 2/9 3/9 4/9; of these 0.75 is reached by 4/9 + 3/9
    tokens, _ = sample(p.log().repeat(5, 1), uniform, temperature=1.0, top_p=0.75, top_k=3)
    assert tokens.tolist() == [2, 2, 2, 3, 3]
    # a top_p below the likeliest token keeps that one
    tokens, _ = sample(p.log().repeat(5, 1), uniform, temperature=1.0, top_p=1e-9, top_k=0)
    assert tokens.tolist() == [3] * 5


def test_uniforms_are_splitmix64():
    # Vigna's splitmix64 seeded with 0 gives e220a8397b1dcdaf, then 6e789e6aa1b965f4.
    drawn = uniforms(np.zeros(2, np.uint64), np.array([0, 1]))
    assert drawn.tolist() == [((0xE220A8397B1DCDAF >> 12) + 0.5) / 2**52, ((0x6E789E6AA1B965F4 >> 12) + 0.5) / 2**52]


def test_uniforms_of_neighbouring_streams_are_uniform():
    keys = np.array(stream_keys([*product([0], range(4), range(20), range(8))]))
    drawn = np.stack([uniforms(keys, np.full(len(keys), position)) for position in range(64)])
    counts = np.histogram(drawn, bins=64, range=(0, 1))[0]
    expected = drawn.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 4 * (2 * 63) ** 0.5  # chi-square, mean + 4 deviations
    neighbours = np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 4 / drawn.size**0.5
