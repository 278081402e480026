"""Rotary position embedding: the angle of each pair of dimensions, stretched for long contexts by one of two rules."""

from __future__ import annotations

import math

import torch

from r1engine.hf.architecture import Architecture, Llama3Scaling, YarnScaling


def rotary_frequencies(arch: Architecture) -> torch.Tensor:
    """Angle per token of each rotated pair: theta^(-2i / rope_dim), then stretched as `rope_scaling` says.

    Returns:
        [rope_dim / 2] float32 (radians per token), on the CPU.
    """
    size, theta, scaling = arch.rope_dim, arch.rope_theta, arch.rope_scaling
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
