"""One token per row from logits, with randomness that depends on nothing but (seed, step, prompt, sample, position)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from r1kernels import cpu_lib

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the increment of splitmix64


def stream_keys(fields: Sequence[Sequence[int]]) -> list[np.uint64]:
    """64 bits that differ for different `fields` (order matters): the address of a stream of uniforms, of each row."""
    columns = np.array([[field % 2**64 for field in row] for row in fields], np.uint64).T
    keys = np.zeros(len(fields), np.uint64)
    for column in columns:
        keys = _mix(keys + _GOLDEN + column)
    return [*keys]


def uniforms(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Entry `positions[i]` of stream `keys[i]`: splitmix64 read at that counter.

    Args:
        keys:      [N] uint64, from `stream_keys`.
        positions: [N] int64, 0, 1, 2 ... along each stream.

    Returns:
        [N] float64 in (0, 1), on a grid of 2^-52.
    """
    bits = _mix(keys + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _mix(bits: np.ndarray) -> np.ndarray:
    """The output function of splitmix64, a bijection of 64 bits. Arrays wrap around silently, scalars would warn."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def sample(
    logits: torch.Tensor, uniform: torch.Tensor, *, temperature: float, top_p: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token a row by inverting the distribution function, in vocabulary order.

    top_k applies first, then top_p to what it left, renormalized. Tokens tied with the last one kept are kept too.
    The reported log-probability is of softmax(logits / temperature) over the whole vocabulary, as SGLang reports
    it: top_p and top_k change which token is drawn, not its log-probability.

    Args:
        logits:      [N, V] float32; overwritten.
        uniform:     [N] float64 in (0, 1).
        temperature: > 0.
        top_p:       keep the likeliest tokens that together reach this probability; 1 keeps all.
        top_k:       keep this many likeliest tokens; 0 keeps all.

    Returns:
        tokens [N] int64 and logp [N] float32 (nats).
    """
    if top_p == 1.0 and top_k == 0 and cpu_lib.takes(logits):
        drawn, logp = uniform.new_empty(len(logits), dtype=torch.int64), logits.new_empty(len(logits))
        cpu_lib.call("r1_cpu_sample", logits, uniform, drawn, logp, *logits.shape, 1.0 / temperature)
        return drawn, logp
    if temperature != 1.0:
        logits = logits.div_(temperature)
    probs = torch.softmax(logits, dim=-1)
    kept = _likeliest(probs, top_p, top_k)
    # float64: with a vocabulary of 150,000 the steps of a float32 sum are coarser than the rare tokens.
    cdf = torch.cumsum(kept, dim=-1, dtype=torch.float64)
    # right=True finds the first cdf > target: a token of probability 0 does not raise the cdf and is never drawn.
    target = uniform.unsqueeze(1) * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, target, right=True).clamp_(max=logits.shape[1] - 1)
    return tokens.squeeze(1), probs.gather(1, tokens).squeeze(1).log_()


def _likeliest(probs: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """`probs` with the tokens outside top_k and top_p set to 0, not renormalized."""
    if 0 < top_k < probs.shape[1]:
        threshold = probs.topk(top_k, dim=-1).values[:, -1:]
        probs = probs.masked_fill(probs < threshold, 0.0)
    if top_p < 1.0:
        ordered = probs.sort(dim=-1, descending=True).values
        sums = ordered.cumsum(dim=-1, dtype=torch.float64)
        # A token is needed while the likelier ones do not yet reach top_p; the first always is.
        needed = sums - ordered < top_p * sums[:, -1:]
        needed[:, 0] = True
        threshold = ordered.masked_fill(~needed, 2.0).amin(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs < threshold, 0.0)
    return probs
