"""Load balance of the experts: by the bias alone, and by the sequence-wise loss."""

import itertools

import torch
from policies import policy_of

from r1engine.batch import PackedBatch, RowShape, Sequence, pack
from r1engine.config import RlConfig
from r1engine.model.layers.attention import row_layout
from r1engine.model.policy import Policy
from r1engine.stages.sft import cross_entropy


def rows_of(count: int) -> list[PackedBatch]:
    tokens = [[2 + (7 * i + 3 * j * j) % 90 for j in range(5 + 6 * i)] for i in range(count)]
    return pack([Sequence(t, 1, (1 + i) / 100) for i, t in enumerate(tokens)], RowShape(max_tokens=256))[0]


def routers(policy):
    return [m for m in policy.chunks[0].module.modules() if hasattr(m, "expert_bias")]


def skewed(world, folder, **model) -> Policy:
    """A policy whose routers all prefer the first experts by far."""
    policy = policy_of(RlConfig(model={"path": folder, **model}), world)
    with torch.no_grad():
        for router in routers(policy):
            router.expert_bias.copy_(torch.linspace(0.4, -0.4, len(router.expert_bias)))
    return policy


def imbalance(policy, rows, steps: int, lr: float) -> list[float]:
    """Largest load of an expert over the mean load, of each step; the mean of the layers."""
    found: list[float] = []

    def loss(outputs, row):
        counts = [router.local_tokens_per_expert for router in routers(policy)]
        found.append(sum((c.max() / c.mean()).item() for c in counts) / len(counts))
        return cross_entropy(outputs, row)

    for _ in range(steps):
        policy.update(rows, loss, lr)
    return found


def test_a_skewed_router_becomes_balanced_without_a_loss(world, folders):
    rows = rows_of(6)
    moved = imbalance(skewed(world, folders["moonlight"][0], expert_bias_rate=0.05), rows, steps=20, lr=0.0)
    kept = imbalance(skewed(world, folders["moonlight"][0]), rows, steps=2, lr=0.0)
    assert kept[0] == kept[1] == moved[0] > 2.2  # of at most 8 / 3
    assert sum(moved[-5:]) / 5 < 1.7


def test_the_sequence_wise_loss_is_that_of_the_paper(world, folders):
    # DeepSeek-V3, eq. 17-20, written out for each sequence; weighted as its tokens are.
    folder, _ = folders["moonlight"]
    policy = policy_of(RlConfig(model={"path": folder, "balance_loss": 0.3}), world)
    router, row = routers(policy)[-1], rows_of(4)[0]
    logits = torch.randn(len(row.tokens), 1, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    router.enter(row_layout(row, torch.ones(4), torch.float32), 0)
    probs, _ = router.train().routing(logits)
    (found,) = torch.autograd.grad(probs.sum() * 0, logits)  # nothing but what the loss attached
    expected = torch.zeros(())
    scores = logits[:, 0].sigmoid() / logits[:, 0].sigmoid().sum(1, keepdim=True)
    for a, b in itertools.pairwise(row.cu_seqlens.tolist()):
        chosen = torch.zeros(b - a, 8).scatter(1, scores[a:b].topk(3, dim=1).indices, 1.0)
        f, p = chosen.sum(0) * 8 / (3 * (b - a)), scores[a:b].mean(0)
        expected = expected + row.loss_weight[a:b].sum() * 0.3 * (f * p).sum()
    (slope,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-8)
