"""What logprob_entropy means, with whole rows and autograd: the oracle of its tests."""

from __future__ import annotations

import torch

from r1kernels.logprob_entropy.problem import Selection, Softmax


def logprob_entropy_reference(
    logits: torch.Tensor, labels: torch.Tensor, softmax: Softmax, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits [N, V], labels [N]) -> logp, entropy, lse, sum_pi_sq, [N] each, in the dtype of the logits."""
    c = logits * softmax.logit_scale
    if softmax.softcap is not None:
        c = softmax.softcap * torch.tanh(c / softmax.softcap)
    temperature = softmax.temperature
    z = c / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    if selection.keep_ids is not None and selection.keep_offsets is not None:
        kept = torch.zeros_like(z, dtype=torch.bool)
        kept[torch.repeat_interleave(selection.keep_offsets.diff()), selection.keep_ids] = True
        z = z.masked_fill(~kept, -torch.inf)
    log_p = torch.log_softmax(z, dim=1)
    used, p = selection.is_used(labels), log_p.exp()
    logp = log_p.gather(1, torch.where(used, labels, 0)[:, None])[:, 0]
    entropy = -(p * log_p.clamp(min=-1e30)).sum(1)  # 0 * -inf would be NaN
    logp, entropy, lse, sum_pi_sq = (torch.where(used, x, 0.0) for x in (logp, entropy, z.logsumexp(1), (p * p).sum(1)))
    return logp, entropy, lse, sum_pi_sq
