"""Rotary position embedding: the angle of each pair of dimensions, stretched for long contexts by three rules."""

from __future__ import annotations

import math

import torch

from r1engine.hf.architecture import Architecture, DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling


def rotary_frequencies(arch: Architecture) -> torch.Tensor:
    """Angle per token of each rotated pair: theta^(-2i / rope_dim), then stretched as `rope_scaling` says.

    Returns:
        [rope_dim / 2] float32 (radians per token), on the CPU.
    """
    size, theta, scaling = arch.rope_dim, arch.rope_theta, arch.rope_scaling
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    unscaled = 1.0 / theta**exponents
    if scaling is None or isinstance(scaling, DynamicScaling):
        return unscaled
    if isinstance(scaling, LinearScaling):
        return unscaled / scaling.factor
    # kept = 1: short wavelengths keep their frequency; 0: long ones are divided by factor; a ramp between the two.
    if isinstance(scaling, Llama3Scaling):
        wavelengths = 2 * math.pi / unscaled
        kept = scaling.original_context / wavelengths - scaling.low_freq_factor
        kept = (kept / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
    else:
        first = _pair_that_turns(scaling.beta_fast, size, theta, scaling)
        last = _pair_that_turns(scaling.beta_slow, size, theta, scaling)
        if scaling.is_rounded:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        pairs = torch.arange(size // 2, dtype=torch.float32, device="cpu")
        kept = 1.0 - ((pairs - first) / max(last - first, 0.001)).clamp(0.0, 1.0)
    return kept * unscaled + (1.0 - kept) * unscaled / scaling.factor


def _pair_that_turns(times: float, size: int, theta: float, scaling: YarnScaling) -> float:
    """Index of the pair that makes this many full turns within the original context."""
    return size * math.log(scaling.original_context / (times * 2 * math.pi)) / (2 * math.log(theta))
