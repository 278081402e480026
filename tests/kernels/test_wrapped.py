"""The ops inside models that others wrap: DDP and FSDP2 on two ranks (gloo) give the gradients of one process."""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks
from torch import nn

from r1kernels import GrpoObjective, grpo_loss, linear_logprob, logprob_entropy

ROWS, LENGTH, H, V = 4, 6, 16, 29
OBJECTIVE = GrpoObjective(clip_eps=0.2, kl_coef=0.04)


class Tiny(nn.Module):
    """Embedding, layer and output matrix; returns the log-probabilities, as in trainers that fuse the head."""

    def __init__(self, *, is_fused: bool) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V, bias=False)
        self.is_fused = is_fused

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.layer(self.embedding(tokens)))
        if self.is_fused:
            return linear_logprob(hidden, self.head.weight, labels, return_entropy=False).logp
        return logprob_entropy(self.head(hidden), labels).logp


def model(is_fused: bool) -> Tiny:
    torch.manual_seed(0)
    return Tiny(is_fused=is_fused)


def loss_of(model: nn.Module, rows: slice) -> torch.Tensor:
    """GRPO's loss of some of the rows: the mean over ranks of equally many rows is that of all."""
    draw = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(V, (2, ROWS, LENGTH), generator=draw)
    advantage, noise = torch.randn(2, ROWS, LENGTH, generator=draw)
    logp = model(tokens[rows], labels[rows]).flatten()
    old = logp.detach() + 0.1 * noise[rows].flatten()
    weight = torch.full_like(logp, 1 / logp.numel())
    given = {"old_logp": old, "ref_logp": old, "advantage": advantage[rows].flatten(), "loss_weight": weight}
    return grpo_loss(logp, objective=OBJECTIVE, **given)[0]


def wrapped_gradients(kind: str, is_fused: bool) -> dict[str, torch.Tensor]:
    """On a rank: the whole gradients after a step on its half of the rows."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    plain = model(is_fused)
    if kind == "ddp":
        module: nn.Module = DistributedDataParallel(plain)
    else:
        fully_shard(plain.layer, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        module = fully_shard(plain, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    half = ROWS // 2
    loss_of(module, slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)).backward()
    found = {}
    for name, parameter in plain.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found  # the group ends with the process: PyTorch's destructor may wait for a thread that waits for the GIL


@pytest.mark.parametrize(("kind", "is_fused"), [("ddp", False), ("ddp", True), ("fsdp2", False), ("fsdp2", True)])
def test_two_wrapped_ranks_have_the_gradients_of_one(kind, is_fused):
    alone = model(is_fused)
    loss_of(alone, slice(None)).backward()
    for found in on_ranks(2, wrapped_gradients, kind, is_fused):
        assert found.keys() == dict(alone.named_parameters()).keys()
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7)
