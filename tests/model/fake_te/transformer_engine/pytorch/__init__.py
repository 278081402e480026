"""FAKE, see the package."""

import torch

from transformer_engine.pytorch import distributed, fp8, module, ops, router, tensor
from transformer_engine.pytorch.fp8 import fp8_autocast, fp8_model_init
from transformer_engine.pytorch.module.linear import Linear


class LayerNormLinear(torch.nn.Module):
    """A base class of Megatron's; never built here."""


class DotProductAttention(LayerNormLinear):
    pass


class GroupedLinear(LayerNormLinear):
    pass


__all__ = [
    "distributed", "fp8", "module", "ops", "router", "tensor", "fp8_autocast", "fp8_model_init",
    "Linear", "LayerNormLinear", "DotProductAttention", "GroupedLinear",
]  # fmt: skip
