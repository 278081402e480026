"""The head of a reward model: one number of each hidden state, in place of the output matrix."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig


class ScoreHead(torch.nn.Module):
    """A weight [1, D] in the model's type; products and scores are float32."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=device))
        # Each tensor-parallel rank sees its part of the tokens: Megatron sums the gradients of what has this mark.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark


def scores(hidden: torch.Tensor, weight: torch.Tensor, is_parallel: bool) -> torch.Tensor:
    """[H] float32 of hidden states [H (/ tp), 1, D], under a weight [1, D]; `is_parallel` over the sequence or not."""
    score = (hidden.squeeze(1).float() @ weight.float().t()).squeeze(1)
    if not is_parallel:
        return score
    # All ranks compute the same loss: each keeps its part of the gradient.
    return gather_from_sequence_parallel_region(score, tensor_parallel_output_grad=False)


def initial_score(hidden_size: int, seed: int) -> torch.Tensor:
    """[1, hidden_size] float32, normal with standard deviation 1 / sqrt(hidden_size + 1), the same on every rank.

    As Learning to summarize from human feedback (arXiv 2009.01325, appendix B.1) sets up its reward models.
    """
    random = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden_size, generator=random) * (hidden_size + 1) ** -0.5
