"""Rotary position embedding: the angle of each pair of dimensions, stretched for long contexts by one of two rules."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's stretch of the long rotary wavelengths; wavelengths and context are in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN as DeepSeek-V3 uses it: wavelengths stretched by how often they turn within the original context."""

    factor: float
    original_context: int  # tokens
    beta_fast: float  # pairs that turn more often than this within the original context keep their frequency
    beta_slow: float  # pairs that turn less often are divided by `factor`
    mscale: float
    mscale_all_dim: float

    @property
    def magnitude(self) -> float:
        """Factor on the rotated part of queries and keys."""
        return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        """Factor on the attention scores."""
        return _mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def frequencies(size: int, theta: float, scaling: Llama3Scaling | YarnScaling | None) -> torch.Tensor:
    """Angle per token of each rotated pair: theta^(-2i / size), then stretched as `scaling` says.

    Args:
        size:    dimensions that are rotated.
        theta:   base of the frequencies.
        scaling: None keeps them.

    Returns:
        [size / 2] float32 (radians per token), on the CPU.
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    unscaled = 1.0 / theta**exponents
    if scaling is None:
        return unscaled
    # kept = 1: short wavelengths keep their frequency; 0: long ones are divided by factor; a ramp between the two.
    if isinstance(scaling, Llama3Scaling):
        wavelengths = 2 * math.pi / unscaled
        kept = scaling.original_context / wavelengths - scaling.low_freq_factor
        kept = (kept / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
    else:
        first = max(math.floor(_pair_that_turns(scaling.beta_fast, size, theta, scaling)), 0)
        last = min(math.ceil(_pair_that_turns(scaling.beta_slow, size, theta, scaling)), size - 1)
        pairs = torch.arange(size // 2, dtype=torch.float32, device="cpu")
        kept = 1.0 - ((pairs - first) / max(last - first, 0.001)).clamp(0.0, 1.0)
    return kept * unscaled + (1.0 - kept) * unscaled / scaling.factor


def _pair_that_turns(times: float, size: int, theta: float, scaling: YarnScaling) -> float:
    """Index of the pair that makes this many full turns within the original context."""
    return size * math.log(scaling.original_context / (times * 2 * math.pi)) / (2 * math.log(theta))
