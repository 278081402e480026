"""The loss ops on a GPU: as exact as float64 allows, the same bits in every run, a chunk of memory. `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from r1kernels import GrpoObjective, group_advantage, grpo_loss, linear_grpo_loss, linear_logprob
from r1kernels.linear_grpo_loss.reference import linear_grpo_loss_reference
from r1kernels.linear_logprob.reference import linear_logprob_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("mode", ["mean_std", "mean", "rloo", "batch_std"])
def test_group_advantage_equals_the_cpu_in_every_order(mode):
    sizes = torch.randint(0, 40, (500,))
    ids = torch.repeat_interleave(torch.arange(500), sizes)
    rewards, cu = torch.randint(3, (len(ids),)).float(), torch.cat([torch.zeros(1).long(), sizes.cumsum(0)])
    order = torch.randperm(len(ids))
    wanted = group_advantage(rewards, ids, mode=mode)
    by_segment = group_advantage(rewards.cuda(), cu_groups=cu.cuda(), mode=mode)
    by_number = group_advantage(rewards[order].cuda(), ids[order].cuda(), mode=mode)
    for x, y, z in zip(wanted, by_segment, by_number, strict=True):
        torch.testing.assert_close(y.cpu(), x, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(z.cpu(), x[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
@pytest.mark.parametrize("loss", ["clip", "cispo", "sapo"])
def test_grpo_loss_equals_float64_and_itself_bit_for_bit(loss, level):
    lengths = torch.randint(1, 3000, (50,))
    tokens, cu = int(lengths.sum()), torch.cat([torch.zeros(1).long(), lengths.cumsum(0)])
    logp = -torch.rand(tokens)
    old, ref, rollout = (logp + 0.01 * torch.randn(tokens) for _ in range(3))
    advantage, weight = torch.randn(tokens), (torch.rand(tokens) > 0.3) / tokens
    o = GrpoObjective(loss=loss, ratio_level=level, clip_eps=0.2, kl_coef=0.1, tis="truncate")

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        x = [t.to(device, dtype) for t in (logp, old, advantage, weight, ref, rollout)]
        x[0].requires_grad_()
        tensors = {"ref_logp": x[4], "rollout_logp": x[5], "cu_seqlens": cu.to(device)}
        found, metrics = grpo_loss(*x[:4], o, **tensors)
        return [found.detach(), torch.autograd.grad(found, x[0])[0] * tokens, torch.stack([*metrics])]

    first, second = run("cuda", torch.float32), run("cuda", torch.float32)
    for x, y, z in zip(first, second, run("cpu", torch.float64), strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x.double().cpu(), z, rtol=1e-4, atol=1e-5)


def layer(tokens: int, size: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(vocab, size, device="cuda") * size**-0.5).bfloat16()
    return hidden, weight, torch.randint(vocab, (tokens,), device="cuda")


def gradients(loss_of, hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    loss = loss_of(*inputs)
    return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, inputs))]


def check_errors(ours, plain, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """Ours in bfloat16 is at most a tenth more wrong than unfused bfloat16."""
    found = gradients(ours, hidden, weight, torch.bfloat16)
    unfused = gradients(plain, hidden, weight, torch.bfloat16)
    for x, y, exact in zip(found, unfused, gradients(plain, hidden, weight, torch.float64), strict=True):
        assert (x - exact).norm() <= 1.1 * (y - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("chunk_tokens", [100, None])
def test_linear_logprob_is_as_exact_as_unfused_bfloat16(chunk_tokens):
    hidden, weight, labels = layer(333, 256, 5003)
    g = torch.randn(333, device="cuda")
    check_errors(
        lambda x, w: (linear_logprob(x, w, labels, chunk_tokens=chunk_tokens).logp * g).sum(),
        lambda x, w: (linear_logprob_reference(x, w, labels)[0] * g).sum(),
        hidden,
        weight,
    )


@pytest.mark.parametrize("chunk_tokens", [100, None])
def test_linear_grpo_loss_is_as_exact_as_unfused_bfloat16(chunk_tokens):
    hidden, weight, labels = layer(333, 256, 5003)
    old, advantage = -8.5 - torch.rand(333, device="cuda"), torch.randn(333, device="cuda")
    tokens = labels, old, advantage, torch.rand(333, device="cuda") / 333
    o = GrpoObjective(clip_eps=1e6)  # no token changes sides of the clip by rounding
    check_errors(
        lambda x, w: linear_grpo_loss(x, w, *tokens, o, chunk_tokens=chunk_tokens).loss,
        lambda x, w: linear_grpo_loss_reference(x, w, *tokens, o)[0],
        hidden,
        weight,
    )


def test_linear_logprob_needs_the_memory_of_a_chunk():
    hidden, weight, labels = layer(16_384, 512, 65_536)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        linear_logprob(hidden, weight, labels)
    assert torch.cuda.max_memory_allocated() - before < 0.6 * 2**30  # whole logits: 2 GiB
