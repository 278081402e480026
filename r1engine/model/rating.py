"""A reward model that borrows the policy's modules: its weights wait in host memory and are lent for a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from r1engine.hf.architecture import read_architecture
from r1engine.hf.folder import Folder
from r1engine.hf.score_folder import check_reward_model
from r1engine.hf.tensors import SCORE
from r1engine.model.state.offload import lent_weights
from r1engine.model.state.sharded_weights import ShardedWeights


@torch.no_grad()
def read_reward_model(weights: ShardedWeights, folder: Path) -> dict[str, torch.Tensor]:
    """This rank's part of a reward model, in host memory, under the names of the policy's weights.

    Args:
        weights: of the policy, a language model.
        folder:  of the reward model.

    Raises:
        ValueError: it is no reward model, or of another architecture than the policy.
    """
    check_reward_model(folder, weights.model)
    found = read_architecture(folder)
    return weights.read(Folder(folder, found), found)


@contextlib.contextmanager
def lent_reward_model(
    own: Mapping[str, torch.Tensor], chunks: list[Any], weights: Mapping[str, torch.Tensor], device: torch.device
) -> Iterator[None]:
    """Inside, the modules of the policy are the reward model, and the last stage returns scores.

    Args:
        own:     weights of the policy on this rank.
        chunks:  its layers there.
        weights: of `read_reward_model`.
        device:  where the policy is.
    """
    on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in weights.items()}
    last = chunks[-1].module
    last.lent_score = on_device.pop(SCORE, None)  # there on the last stage
    try:
        with lent_weights({name: own[name] for name in on_device}, on_device):
            yield
    finally:
        last.lent_score = None
