"""grpo_loss against the losses of TRL, verl and slime, written down again from their definitions as oracles.

Padded [B, L] batches with masks and an aggregation on their side; packed tokens with loss_weight on ours.
"""

from __future__ import annotations

import pytest
import torch

from r1kernels import GrpoObjective, grpo_loss

LENGTHS = [3, 7, 1, 5]
B, L = len(LENGTHS), max(LENGTHS)
MASK = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
CU = torch.tensor([0, *LENGTHS]).cumsum(0)


def batch(seed: int = 0, spread: float = 0.4) -> dict[str, torch.Tensor]:
    """[B, L] float64 log-probabilities and [B] advantages; what is masked holds infinities."""
    generator = torch.Generator().manual_seed(seed)

    def near(x: torch.Tensor) -> torch.Tensor:
        return x + spread * torch.randn(B, L, generator=generator, dtype=torch.float64)

    logp = -2 * torch.rand(B, L, generator=generator, dtype=torch.float64)
    old = near(logp)
    made = {"logp": logp, "old": old, "ref": near(logp), "rollout": near(old)}
    made = {name: x.masked_fill(~MASK, -torch.inf) for name, x in made.items()}
    return made | {"advantage": torch.randn(B, generator=generator, dtype=torch.float64)}


def ours(
    x: dict[str, torch.Tensor], objective: GrpoObjective, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, d loss / d logp [tokens]) with `weight` [B, L]."""
    logp = x["logp"][MASK].requires_grad_()
    advantage = x["advantage"][:, None].expand(B, L)[MASK]
    tensors = {"ref_logp": x["ref"][MASK], "rollout_logp": x["rollout"][MASK], "cu_seqlens": CU}
    loss, _ = grpo_loss(logp, x["old"][MASK], advantage, weight[MASK], objective, **tensors)
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def theirs(x: dict[str, torch.Tensor], loss_of) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, d loss / d logp [tokens]) of a function of logp [B, L], by autograd; masked entries replaced by 0."""
    clean = {name: v if name == "advantage" else v.masked_fill(~MASK, 0.0) for name, v in x.items()}
    logp = clean["logp"].requires_grad_()
    loss = loss_of(logp, clean["old"], clean["ref"], clean["rollout"], clean["advantage"][:, None])
    return loss.detach(), torch.autograd.grad(loss, logp)[0][MASK]


def check(x: dict[str, torch.Tensor], objective: GrpoObjective, weight: torch.Tensor, loss_of) -> None:
    for found, wanted in zip(ours(x, objective, weight), theirs(x, loss_of), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


# How each trainer averages, as the weight of a token.
TOKEN_MEAN = MASK.double() / MASK.sum()  # verl token-mean, TRL bnpo and (with the global count) dapo
SEQUENCE_MEAN = MASK.double() / MASK.sum(1, keepdim=True) / B  # verl seq-mean-token-mean, TRL grpo, R1 eq. 1
DR_GRPO = MASK.double() / (B * 16)  # TRL dr_grpo with max_completion_length 16, verl seq-mean-token-sum-norm
SEQUENCE_SUM = MASK.double() / B  # verl seq-mean-token-sum


def aggregate(per_token: torch.Tensor, mode: str) -> torch.Tensor:
    if mode == "token-mean":
        return (per_token * MASK).sum() / MASK.sum()
    sums = (per_token * MASK).sum(1)
    if mode == "seq-mean-token-sum":
        return sums.mean()
    if mode == "seq-mean-token-sum-norm":
        return sums.sum() / (B * 16)
    return (sums / MASK.sum(1)).mean()


AGGREGATIONS = {
    "token-mean": TOKEN_MEAN,
    "seq-mean-token-mean": SEQUENCE_MEAN,
    "seq-mean-token-sum-norm": DR_GRPO,
    "seq-mean-token-sum": SEQUENCE_SUM,
}


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_verl_vanilla_with_dual_clip_and_truncated_importance_sampling(mode, seed):
    def loss_of(logp, old, ref, rollout, a):
        ratio = torch.exp((logp - old).clamp(-20, 20))
        losses = torch.maximum(-a * ratio, -a * ratio.clamp(1 - 0.2, 1 + 0.28))
        losses = torch.where(a < 0, torch.minimum(-a * 1.5, losses), losses)
        return aggregate(losses * torch.exp(old - rollout).clamp(max=1.2), mode)

    objective = GrpoObjective(clip_eps=0.2, clip_eps_high=0.28, dual_clip=1.5, tis="truncate", tis_high=1.2)
    check(batch(seed), objective, AGGREGATIONS[mode], loss_of)


@pytest.mark.parametrize("delta", [None, 1.5])
def test_trl_grpo_with_kl_and_delta(delta):
    def loss_of(logp, old, ref, rollout, a):
        coef = torch.exp(logp - old)
        clipped = coef.clamp(1 - 0.2, 1 + 0.28)
        coef = coef if delta is None else coef.clamp(max=delta)
        kl = torch.exp(ref - logp) - (ref - logp) - 1
        return aggregate(-torch.minimum(coef * a, clipped * a) + 0.04 * kl, "seq-mean-token-mean")

    objective = GrpoObjective(clip_eps=0.2, clip_eps_high=0.28, dual_clip=delta, kl_coef=0.04)
    check(batch(), objective, SEQUENCE_MEAN, loss_of)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_trl_importance_sampling_modes(mode, level):
    # token_truncate, token_mask, sequence_truncate, sequence_mask; the geometric mean of a sequence as in verl.
    def loss_of(logp, old, ref, rollout, a):
        difference = (old - rollout) * MASK
        if level != "token":
            difference = difference.sum(1, keepdim=True)
        if level == "sequence_mean":
            difference = difference / MASK.sum(1, keepdim=True)
        v = difference.exp()
        v = v.clamp(0.9, 1.1) if mode == "truncate" else torch.where((v >= 0.9) & (v <= 1.1), v, 0.0)
        ratio = torch.exp(logp - old)
        return aggregate(-torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * v, "token-mean")

    objective = GrpoObjective(clip_eps=0.2, tis=mode, tis_level=level, tis_low=0.9, tis_high=1.1)
    check(batch(spread=0.1), objective, TOKEN_MEAN, loss_of)


@pytest.mark.parametrize("seed", range(3))
def test_gspo_is_verls_with_its_gradient_through_each_token(seed):
    def loss_of(logp, old, ref, rollout, a):
        mean = ((logp - old) * MASK).sum(1, keepdim=True) / MASK.sum(1, keepdim=True)
        ratio = torch.exp((logp - logp.detach() + mean.detach()).clamp(max=10))
        losses = torch.maximum(-a * ratio, -a * ratio.clamp(1 - 0.1, 1 + 0.2))
        return aggregate(losses, "seq-mean-token-mean")

    objective = GrpoObjective(ratio_level="sequence_mean", clip_eps=0.1, clip_eps_high=0.2)
    check(batch(seed), objective, SEQUENCE_MEAN, loss_of)


def test_cispo_is_trls():
    def loss_of(logp, old, ref, rollout, a):
        weight = torch.exp(logp - old).clamp(max=1 + 0.3).detach()
        return aggregate(-weight * a * logp, "token-mean")

    # TRL bounds the weight from above only; a clip_eps of 1 or more is no lower bound.
    check(batch(), GrpoObjective(loss="cispo", clip_eps=1.0, clip_eps_high=0.3), TOKEN_MEAN, loss_of)


def test_sapo_is_trls():
    def loss_of(logp, old, ref, rollout, a):
        ratio = torch.exp(logp - old)
        tau = torch.where(a > 0, a.new_tensor(1.0), a.new_tensor(1.05))
        return aggregate(-torch.sigmoid(tau * (ratio - 1)) * 4 / tau * a, "token-mean")

    check(batch(), GrpoObjective(loss="sapo"), TOKEN_MEAN, loss_of)


KL = {
    "k1": lambda logp, ref: logp - ref,
    "k2": lambda logp, ref: 0.5 * (logp - ref) ** 2,
    "k3": lambda logp, ref: torch.exp(ref - logp) - (ref - logp) - 1,
    "abs": lambda logp, ref: (logp - ref).abs(),
}


@pytest.mark.parametrize("kl_grad", [None, "k2"])
@pytest.mark.parametrize("kl", list(KL))
def test_verls_kl_penalties_plain_and_straight_through(kl, kl_grad):
    def loss_of(logp, old, ref, rollout, a):
        value = KL[kl](logp, ref)
        if kl_grad is not None:
            source = KL[kl_grad](logp, ref)
            value = source - source.detach() + value.detach()
        return aggregate(-torch.exp(logp - old) * a + 0.5 * value, "token-mean")

    check(batch(), GrpoObjective(clip_eps=1e9, kl=kl, kl_grad=kl_grad, kl_coef=0.5), TOKEN_MEAN, loss_of)


def test_the_unbiased_kl_of_deepseek_v32():
    def loss_of(logp, old, ref, rollout, a):
        ratio = torch.exp(logp - old)
        return aggregate(-ratio * a + 0.5 * ratio * KL["k3"](logp, ref), "token-mean")

    check(batch(), GrpoObjective(clip_eps=1e9, kl_importance=True, kl_coef=0.5), TOKEN_MEAN, loss_of)


# ---- which gradient is right: exact expectations over a three-token vocabulary ---------------------------------


def expected_kl_gradient(kl_grad: str, importance: bool) -> torch.Tensor:
    """Mean over the old policy's samples of the KL term's gradient in the policy's logits."""
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    logp = torch.log_softmax(logits, 0)
    ref = torch.log_softmax(torch.tensor([-0.2, 0.4, 0.1], dtype=torch.float64), 0)
    old = torch.log_softmax(torch.tensor([0.9, 0.0, -0.4], dtype=torch.float64), 0) if importance else logp.detach()
    objective = GrpoObjective(clip_eps=1e9, kl="k3", kl_grad=kl_grad, kl_coef=1.0, kl_importance=importance)
    loss, _ = grpo_loss(logp, old, torch.zeros_like(logp), old.exp(), objective, ref_logp=ref)
    return torch.autograd.grad(loss, logits)[0]


def true_kl_gradient() -> torch.Tensor:
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    logp = torch.log_softmax(logits, 0)
    ref = torch.log_softmax(torch.tensor([-0.2, 0.4, 0.1], dtype=torch.float64), 0)
    return torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits)[0]


def test_on_policy_k2_has_the_gradient_of_the_kl_and_k1_and_k3_have_not():
    torch.testing.assert_close(expected_kl_gradient("k2", False), true_kl_gradient())
    torch.testing.assert_close(expected_kl_gradient("k1", False), torch.zeros(3, dtype=torch.float64))
    assert not torch.allclose(expected_kl_gradient("k3", False), true_kl_gradient(), atol=1e-2)


def test_off_policy_the_importance_weighted_k3_has_the_gradient_of_the_kl():
    torch.testing.assert_close(expected_kl_gradient("k3", True), true_kl_gradient())


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
@pytest.mark.parametrize("loss", ["clip", "sapo"])
def test_gradcheck(loss, level):
    # At ratios away from the clip's edges; CISPO holds part of its value fixed, so differences cannot check it.
    x = batch(spread=0.02)
    objective = GrpoObjective(loss=loss, ratio_level=level, clip_eps=0.5, kl_coef=0.1, entropy_coef=0.1)
    advantage = x["advantage"][:, None].expand(B, L)[MASK]

    def loss_of(logp, entropy):
        tensors = {"ref_logp": x["ref"][MASK], "cu_seqlens": CU, "entropy": entropy}
        return grpo_loss(logp, x["old"][MASK], advantage, TOKEN_MEAN[MASK], objective, **tensors)[0]

    inputs = x["logp"][MASK].requires_grad_(), torch.ones(int(MASK.sum()), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss_of, inputs)
