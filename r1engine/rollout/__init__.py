"""Generators: what samples completions from the present policy."""

from __future__ import annotations

from collections.abc import Callable

import torch

from r1engine.config import RlConfig
from r1engine.ranks import World
from r1engine.rollout.draft import Sampling
from r1engine.rollout.generator import BrokenOff, Generator, Logprobs, generate

__all__ = ["BrokenOff", "Generator", "Logprobs", "Sampling", "generate", "make_generator"]


def make_generator(cfg: RlConfig, world: World, dtype: torch.dtype, note: Callable[[str], None]) -> Generator:
    """The generator that `cfg.rollout.engine` names; its weights come by `load_weights`. Collective.

    Args:
        cfg:   of the run.
        world: its ranks.
        dtype: of the weights.
        note:  shows a line to the user.

    Raises:
        ValueError: the model is not one that it computes, or its servers are not usable.
        RuntimeError: a server does not start.
    """
    if cfg.rollout.engine == "local":
        from r1engine.rollout.local.generator import LocalGenerator

        return LocalGenerator(
            cfg.model.folder, seed=cfg.seed, slots=cfg.rollout.slots, device=world.device, dtype=dtype
        )
    from r1engine.rollout.sglang.generator import SglangGenerator

    return SglangGenerator(cfg, world, dtype=dtype, note=note)
