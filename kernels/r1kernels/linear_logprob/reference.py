"""What linear_logprob means, with the logits whole: the oracle of its tests and the baseline of its benchmark."""

from __future__ import annotations

import torch


def linear_logprob_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (logp, entropy), in the dtype of the inputs, differentiable in all of them."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(
        logits / (temperature[..., None] if torch.is_tensor(temperature) else temperature), dim=-1
    )
    return log_p.gather(-1, labels[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
