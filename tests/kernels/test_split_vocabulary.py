"""logprob_entropy and logits_grpo_loss over a vocabulary split over 2 and 4 processes: what the whole one gives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from r1kernels import GrpoObjective, logits_grpo_loss, logprob_entropy
from r1kernels.integrations import linear_cross_entropy

INF = float("inf")
OBJECTIVE = GrpoObjective(clip_eps=0.2, kl_coef=0.1, entropy_coef=0.1)


def split_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(9, 128, generator=generator)
    labels = torch.randint(128, (9,), generator=generator)
    logits[3, :64] = -INF  # all of the first rank's slice, or of the first two
    labels[3] = 100
    logits[4, 64:] = 500.0  # the ranks' largest logits lie far apart
    labels[:2] = torch.tensor([63, 64])  # either side of the border
    return logits, labels, torch.linspace(-1.0, 2.0, 9)


def oracle(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float, grad_logp: torch.Tensor
) -> list[torch.Tensor]:
    """Log-probability, entropy and gradient of the weighted log-probabilities, in float64."""
    x = logits.double().requires_grad_()
    log_p = torch.log_softmax(x / temperature, dim=-1)
    logp = log_p.gather(-1, labels[:, None])[:, 0]
    (grad,) = torch.autograd.grad((logp * grad_logp.double()).sum(), x)
    return [logp.detach(), -torch.where(log_p == -INF, 0.0, log_p.exp() * log_p).sum(-1).detach(), grad]


def at_temperature(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float, grad_logp: torch.Tensor, group: dist.ProcessGroup
) -> list[torch.Tensor]:
    x = logits.clone().requires_grad_()
    logp, entropy, *_ = logprob_entropy(x, labels, temperature=temperature, tp_group=group)
    logp.backward(grad_logp)
    return [logp.detach(), entropy, x.grad]


def with_entropy(logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    x = logits.double().requires_grad_()
    found = logprob_entropy(x, labels, entropy_grad=True, return_sum_pi_sq=True, tp_group=group)
    (found.entropy.sum() + found.logp.sum()).backward()
    return [*(value.detach() for value in found), x.grad]


def grpo(logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    advantage, weight = torch.linspace(-1.0, 2.0, 9).double(), torch.full((9,), 1 / 8).double()
    weight[7] = 0
    x = logits.double().requires_grad_()
    old = logprob_entropy(x.detach(), labels, tp_group=group).logp + 0.1
    tensors = {"old_logp": old, "ref_logp": old - 0.3, "advantage": advantage, "loss_weight": weight}
    found = logits_grpo_loss(x, labels, **tensors, objective=OBJECTIVE, tp_group=group, inplace=False)
    found.loss.backward()
    return [found.loss.detach(), *found.metrics, found.logp, found.entropy, x.grad]


def verl(ranks: int, rank: int, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """Values and gradients of the drop-in for verl's linear_cross_entropy: weight's, then hidden states'."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(9, 8, generator=generator).double(), torch.randn(128, 8, generator=generator).double()
    hidden, part = hidden.requires_grad_(), weight.chunk(ranks)[rank].requires_grad_()
    logp, entropy = linear_cross_entropy(hidden, part, split_case()[1], 0.7, "none", group)
    (logp * torch.linspace(-1.0, 2.0, 9) + entropy).sum().backward()
    return [logp.detach(), entropy.detach(), part.grad, hidden.grad]


def of_a_rank() -> tuple[tuple, list[torch.Tensor], str]:
    """(log-probabilities, entropy, loss; those for verl; the message on a label out of range)."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    logits, labels, grad_logp = split_case()
    part, group = logits.chunk(ranks, dim=1)[rank], dist.group.WORLD
    found = at_temperature(part, labels, 0.6, grad_logp, group), with_entropy(part, labels, group)
    found = (*found, grpo(part, labels, group))
    for_verl = verl(ranks, rank, group)
    with pytest.raises(ValueError) as caught:
        logprob_entropy(part, labels + 128, tp_group=group)
    dist.destroy_process_group()
    return found, for_verl, str(caught.value)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_split_vocabulary_gives_what_the_whole_gives(ranks):
    of_ranks = on_ranks(ranks, of_a_rank)
    logits, labels, grad_logp = split_case()
    exact = oracle(logits, labels, 0.6, grad_logp)
    wholes = with_entropy(logits, labels, None), grpo(logits, labels, None)
    for rank, ((found, *others), _, message) in enumerate(of_ranks):
        for x, y in zip(found, (*exact[:2], exact[2].chunk(ranks, dim=1)[rank]), strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
        for parts, whole in zip(others, wholes, strict=True):
            for x, y in zip(parts, (*whole[:-1], whole[-1].chunk(ranks, dim=1)[rank]), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
        assert message.startswith("logprob_entropy: labels must be in [0, 128), got")
    logp, entropy, weight, hidden = verl(1, 0, None)
    parts = [for_verl for _, for_verl, _ in of_ranks]
    for part, of_weight in zip(parts, weight.chunk(ranks), strict=True):
        torch.testing.assert_close(part[:3], [logp, entropy, of_weight], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sum(part[3] for part in parts), hidden, rtol=1e-10, atol=1e-10)
