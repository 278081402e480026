"""The router against a plain-Python float64 DeepSeek-V3 gate and transformers' router; replay, ties, balance."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from r1kernels import Gate, moe_balance_loss, moe_gate_topk, moe_update_bias

INF, NAN = float("inf"), float("nan")
SHAPES = [  # experts, topk, groups, chosen groups
    (256, 8, 8, 4),
    (8, 2, 1, 1),
    (1, 1, 1, 1),
    (8, 8, 1, 1),
    (12, 3, 3, 2),
    (40, 6, 5, 3),
    (64, 6, 8, 3),
    (96, 7, 32, 11),
    (6, 2, 6, 3),
]


def python_gate(
    logits: list[float],
    bias: list[float],
    topk: int,
    n_group: int,
    topk_group: int,
    score: str,
    norm: bool,
    scale: float,
) -> tuple[list[int], list[float]]:
    """One token, DeepSeek-V3 eq. 12 to 16 read aloud in float64."""
    if score == "sigmoid":
        s = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        top = max(logits)
        total = math.fsum(math.exp(x - top) for x in logits)
        s = [math.exp(x - top) / total for x in logits]
    biased = [a + b for a, b in zip(s, bias, strict=True)]
    size = len(logits) // n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(n_group)]
    groups.sort(key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))  # sort is stable
    experts = sorted(itertools.chain(*groups[:topk_group]))
    ids = sorted(experts, key=lambda e: -biased[e])[:topk]
    chosen = [s[e] for e in ids]
    total = math.fsum(chosen) if norm else 1.0
    return ids, [scale * x / total for x in chosen]


def case(num_tokens: int, num_experts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    bias = 0.3 * torch.randn(num_experts, generator=generator, dtype=torch.float64)
    return logits, bias


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_matches_plain_python(shape, score, norm, dtype, tolerance):
    num_experts, topk, n_group, topk_group = shape
    logits, bias = case(23, num_experts)
    options = {"topk": topk, "n_group": n_group, "topk_group": topk_group, "score": score, "norm": norm, "scale": 2.5}
    gate = moe_gate_topk(logits.to(dtype), bias.to(dtype), **options)
    wanted = [python_gate(row, bias.tolist(), **options) for row in logits.tolist()]
    assert gate.ids.tolist() == [ids for ids, _ in wanted]
    torch.testing.assert_close(
        gate.weights.double(), torch.tensor([w for _, w in wanted], dtype=torch.float64), rtol=tolerance, atol=tolerance
    )
    assert gate.counts.tolist() == torch.bincount(gate.ids.flatten(), minlength=num_experts).tolist()
    assert (gate.ids.dtype, gate.weights.dtype, gate.counts.dtype) == (torch.int32, dtype, torch.int32)


def test_matches_the_router_of_transformers():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(hidden_size=32, n_routed_experts=64, num_experts_per_tok=8, n_group=8, topk_group=4)
    router = DeepseekV3TopkRouter(config)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight, std=0.3)
    # >= 0: some versions of transformers mask foreign groups with 0, not with -inf.
    router.e_score_correction_bias.copy_(torch.rand(64))
    x = torch.randn(50, 32)

    def gradient(weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of all experts, and the gradient of something of them."""
        dense = torch.zeros(50, 64).scatter(1, ids.long(), weights)
        (grad,) = torch.autograd.grad((dense * torch.linspace(-1, 2, 64)).sum(), router.weight)
        return dense.detach(), grad

    _, weights, ids = router(x)
    theirs = gradient(weights, ids)
    gate = moe_gate_topk(x @ router.weight.t(), router.e_score_correction_bias, topk=8)
    for found, wanted in zip(gradient(gate.weights, gate.ids), theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_gradients(score):
    logits, bias = case(5, 12)
    borders = torch.tensor([0, 2, 2, 4], dtype=torch.int32)  # an empty sequence, and a token after the last

    def run(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate = moe_gate_topk(logits, bias, topk=3, n_group=3, topk_group=2, score=score, cu_seqlens=borders)
        return gate.weights, gate.sequence_scores

    assert torch.autograd.gradcheck(run, (logits.requires_grad_(),))


def test_the_bias_chooses_but_has_no_part_in_the_weights():
    # A bias of 1e6 with scores near 1e-3: (s + bias) - bias would be 0 in float32.
    logits = torch.full((1, 8), -7.0)
    logits[0, 5] = -6.5
    bias = torch.full((8,), 1e6)
    bias[2] += 1
    gate = moe_gate_topk(logits, bias, topk=2, n_group=1, topk_group=1, norm=False, scale=1.0)
    assert gate.ids.tolist() == [[2, 0]]
    torch.testing.assert_close(gate.weights, torch.full((1, 2), -7.0).sigmoid())


def test_equal_scores_give_the_lowest_index():
    gate = moe_gate_topk(torch.zeros(3, 32), topk=4, n_group=4, topk_group=2)
    assert gate.ids.tolist() == [[0, 1, 2, 3]] * 3
    logits = torch.zeros(1, 32)
    logits[0, [9, 30]] = 1.0  # groups 1 and 3 tie as the best
    assert moe_gate_topk(logits, topk=4, n_group=4, topk_group=2).ids.tolist() == [[9, 30, 8, 10]]


def test_a_foreign_group_loses_even_to_negative_scores():
    # All biased scores are below 0: masking with 0 (vLLM, transformers) would pick the forbidden groups.
    logits = torch.zeros(1, 16)
    logits[0, 8:12] = 1.0
    gate = moe_gate_topk(logits, torch.full((16,), -5.0), topk=4, n_group=4, topk_group=1)
    assert gate.ids.tolist() == [[8, 9, 10, 11]]


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_ids_are_valid_for_any_logits(bad, score):
    logits, bias = (x.float() for x in case(40, 64))
    generator = torch.Generator().manual_seed(1)
    for share in (0.02, 0.5, 1.0):
        x = torch.where(torch.rand(logits.shape, generator=generator) < share, bad, logits)
        ids = moe_gate_topk(x, bias, score=score).ids
        assert ((ids >= 0) & (ids < 64)).all()
        assert all(len(set(row)) == 8 for row in ids.tolist())


def test_a_nan_score_is_not_chosen():
    logits, bias = (x.float() for x in case(40, 64))
    logits[:, 17] = 10.0
    assert (moe_gate_topk(logits, bias).ids == 17).any()
    logits[:, 17] = NAN
    gate = moe_gate_topk(logits, bias)
    assert not (gate.ids == 17).any()
    assert gate.weights.isfinite().all()


def test_replay_takes_the_ids_and_todays_scores():
    logits, bias = (x.float() for x in case(9, 64))
    recorded = moe_gate_topk(logits + 0.5 * torch.randn(9, 64), bias)
    free = moe_gate_topk(logits, bias)
    replay = recorded.ids.clone()
    replay[4] = -1  # a token without a recorded routing
    x = logits.clone().requires_grad_()
    gate = moe_gate_topk(x, bias, replay_ids=replay)
    wanted = torch.where(replay < 0, free.ids, replay)
    assert torch.equal(gate.ids, wanted)
    assert not torch.equal(gate.ids, free.ids)
    s = logits.sigmoid().gather(1, wanted.long())
    torch.testing.assert_close(gate.weights, 2.5 * s / s.sum(1, keepdim=True))
    assert gate.counts.sum() == 9 * 8
    gate.weights[:, 0].sum().backward()  # the router learns through the replayed choice
    assert torch.equal((x.grad != 0).nonzero()[:, 1].view(9, 8), wanted.sort(1).values)
    same = moe_gate_topk(logits, bias, replay_ids=free.ids)
    assert all(torch.equal(a, b) for a, b in zip(same[:3], free[:3], strict=True))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_balance_loss_is_equations_17_to_20(score):
    logits, bias = case(11, 16)
    borders = [0, 3, 3, 10]
    gate = moe_gate_topk(
        logits, bias, topk=4, n_group=4, topk_group=2, score=score, cu_seqlens=torch.tensor(borders, dtype=torch.int32)
    )
    loss = moe_balance_loss(gate, torch.tensor(borders, dtype=torch.int32))
    for n, (a, b) in enumerate(itertools.pairwise(borders)):
        wanted = 0.0
        for i in range(16):
            if a == b:
                break
            f = 16 / (4 * (b - a)) * sum(i in gate.ids[t].tolist() for t in range(a, b))
            s = logits[a:b].sigmoid() if score == "sigmoid" else logits[a:b].softmax(1)
            wanted += f * (s[:, i] / s.sum(1)).mean().item()
        assert loss[n].item() == pytest.approx(wanted, abs=1e-12)
    assert torch.equal(gate.sequence_counts.sum(0), torch.bincount(gate.ids[:10].flatten(), minlength=16))


def test_bias_moves_against_the_load():
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5])
    out = moe_update_bias(bias, torch.tensor([10, 4, 6, 0], dtype=torch.int32), 0.001)  # mean 5
    torch.testing.assert_close(out, torch.tensor([0.499, 0.501, 0.499, 0.501]), rtol=0, atol=1e-7)
    assert torch.equal(moe_update_bias(bias, torch.full((4,), 7), 0.001), bias)
    assert bias.tolist() == [0.5] * 4


def test_updating_the_bias_evens_the_load():
    logits, _ = case(512, 16)
    logits += torch.linspace(-2, 2, 16)
    bias, spread = torch.zeros(16), []
    for _ in range(200):
        counts = moe_gate_topk(logits.float(), bias, topk=2, n_group=1, topk_group=1).counts
        spread.append((counts.max() / counts.float().mean()).item())
        bias = moe_update_bias(bias, counts, 0.01)
    assert spread[0] > 2.5
    assert spread[-1] < 1.3


def test_no_tokens():
    gate = moe_gate_topk(torch.empty(0, 256), torch.zeros(256))
    assert gate.ids.shape == gate.weights.shape == (0, 8)
    assert gate.counts.tolist() == [0] * 256


def test_bfloat16_logits_are_computed_in_float32():
    logits, bias = (x.float() for x in case(9, 64))
    found = moe_gate_topk(logits.bfloat16(), bias)
    wanted = moe_gate_topk(logits.bfloat16().float(), bias)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], wanted[:3], strict=True))


L8 = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("logits", "bias", "options", "message"),
    [
        (L8.long(), None, {}, "logits must be floating point, got torch.int64"),
        (L8[0], None, {}, "logits must be contiguous [T, E], got shape (8,) stride (1,)"),
        (torch.zeros(2, 2048), None, {}, "the number of experts must be in [1, 1024], got 2048"),
        (torch.zeros(2, 12), None, {}, "12 experts do not divide into n_group=8 groups"),
        (L8, None, {"n_group": 4, "topk_group": 5}, "topk_group must be in [1, n_group=4], got 5"),
        (
            L8, None, {"n_group": 4, "topk_group": 2, "topk": 5},
            "topk must be in [1, 32] and at most the 4 experts of 2 groups, got 5",
        ),
        (
            L8, None, {"n_group": 1, "topk_group": 1, "topk": 9},
            "topk must be in [1, 32] and at most the 8 experts of 1 groups, got 9",
        ),
        (L8, None, {"score": "relu"}, "score must be 'sigmoid' or 'softmax', got 'relu'"),
        (L8, None, {"topk": 4, "scale": INF}, "scale must be finite, got inf"),
        (L8, torch.zeros(7), {}, "bias must be float32 (8,) for logits (2, 8), got torch.float32 (7,)"),
        (L8, torch.zeros(8).bfloat16(), {}, "bias must be float32 (8,) for logits (2, 8), got torch.bfloat16 (8,)"),
        (L8, torch.tensor([NAN] + [0.0] * 7), {}, "bias must be finite, got nan"),
        (
            L8, None, {"topk": 2, "replay_ids": torch.zeros(2, 3).int()},
            "replay_ids must be contiguous int32 (2, 2), got torch.int32 (2, 3)",
        ),
        (
            L8, None, {"topk": 2, "replay_ids": torch.tensor([[1, 8], [-1, 0]]).int()},
            "replay_ids must be in [0, 8), got 1 .. 8",
        ),
        (
            L8, None, {"topk": 2, "cu_seqlens": torch.zeros(3)},
            "cu_seqlens must be int32 [S + 1], got torch.float32 (3,)",
        ),
        (
            L8, None, {"topk": 2, "cu_seqlens": torch.tensor([0, 2, 1]).int()},
            "cu_seqlens must rise from 0 or more to at most 2, got [0, 2, 1]",
        ),
    ],
)  # fmt: skip
def test_error(logits, bias, options, message):
    with pytest.raises(ValueError) as caught:
        moe_gate_topk(logits, bias, **options)
    assert str(caught.value) == f"moe_gate_topk: {message}"


def test_other_errors():
    gate = moe_gate_topk(L8, topk=2)
    assert isinstance(gate, Gate)
    with pytest.raises(
        ValueError, match="moe_balance_loss: the gate has no sums of sequences; pass cu_seqlens to moe_g"
    ):
        moe_balance_loss(gate, torch.tensor([0, 2], dtype=torch.int32))
    gate = moe_gate_topk(L8, topk=2, cu_seqlens=torch.tensor([0, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"moe_balance_loss: the gate has 1 sequences, but cu_seqlens is \(3,\)"):
        moe_balance_loss(gate, torch.tensor([0, 1, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"moe_update_bias: bias must be float32 \[E\], got torch.float64 \(4,\)"):
        moe_update_bias(torch.zeros(4).double(), torch.zeros(4).int(), 0.1)
    with pytest.raises(
        ValueError, match=r"moe_update_bias: counts must be integers \(4,\) on cpu as bias, got torch.float32"
    ):
        moe_update_bias(torch.zeros(4), torch.zeros(4), 0.1)
