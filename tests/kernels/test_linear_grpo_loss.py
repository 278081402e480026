"""linear_grpo_loss against the losses of whole logits in float64; three products; what it refuses."""

from __future__ import annotations

import pytest
import torch

from r1kernels import GrpoObjective, grpo_loss, linear_grpo_loss, linear_logprob
from r1kernels.linear_grpo_loss.reference import linear_grpo_loss_reference

N, H, V = 37, 24, 96
NAN = float("nan")


def case(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = randn(N) * 0.3 - 4.5
    made = {"hidden": randn(N, H), "weight": 0.3 * randn(V, H), "bias": randn(V), "old_logp": old}
    made |= {"ref_logp": old + 0.3 * randn(N), "rollout_logp": old + 0.2 * randn(N), "advantage": randn(N)}
    made["loss_weight"] = torch.rand(N, generator=generator, dtype=torch.float64).masked_fill(
        torch.arange(N) % 5 == 0, 0
    )
    made = {name: x.to(dtype) for name, x in made.items()}
    return made | {"labels": torch.randint(V, (N,), generator=generator)}


def run(op, x: dict[str, torch.Tensor], objective: GrpoObjective, **options: object) -> list[torch.Tensor]:
    """Loss, metrics, gradients of hidden, weight and bias for a loss gradient of 2."""
    x = dict(x)
    inputs = [x[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    x.update(zip(("hidden", "weight", "bias"), inputs, strict=True))
    loss, metrics, *_ = op(**x, objective=objective, temperature=0.8, **options)
    return [loss.detach(), torch.stack([*metrics]), *torch.autograd.grad(2 * loss, inputs)]


@pytest.mark.parametrize("chunk_tokens", [5, None])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "cispo"},
        {"loss": "sapo", "entropy_coef": 0.1},
        {"kl_coef": 0.1, "kl": "k1", "kl_grad": "k2", "dual_clip": 3.0},
        {"kl_coef": 0.1, "kl_importance": True, "tis": "truncate", "tis_high": 1.1},
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
def test_matches_whole_logits_in_float64(dtype, tolerance, options, chunk_tokens):
    x, objective = case(dtype), GrpoObjective(clip_eps=0.2, **options)
    exact = {name: t.double() if t.is_floating_point() else t for name, t in x.items()}
    wanted = run(linear_grpo_loss_reference, exact, objective)
    for found, y in zip(run(linear_grpo_loss, x, objective, chunk_tokens=chunk_tokens), wanted, strict=True):
        torch.testing.assert_close(found.double(), y, rtol=tolerance, atol=tolerance)


def test_equals_the_two_ops_in_a_row_and_returns_their_log_probabilities():
    x, objective = case(torch.float32), GrpoObjective(clip_eps=0.2, kl_coef=0.1)
    found = linear_grpo_loss(**x, objective=objective, chunk_tokens=5)
    logp, entropy, *_ = linear_logprob(x["hidden"], x["weight"], x["labels"], bias=x["bias"], chunk_tokens=5)
    loss, metrics = grpo_loss(logp, x["old_logp"], x["advantage"], x["loss_weight"], objective, ref_logp=x["ref_logp"])
    torch.testing.assert_close((found.loss, found.metrics), (loss, metrics), rtol=1e-5, atol=1e-5)
    used = x["loss_weight"] != 0
    torch.testing.assert_close((found.logp[used], found.entropy[used]), (logp[used], entropy[used]))


def test_on_policy_needs_no_old_log_probabilities():
    x = case(torch.float32)
    logp = linear_logprob(x["hidden"], x["weight"], x["labels"], bias=x["bias"], temperature=0.8).logp
    wanted = run(linear_grpo_loss, x | {"old_logp": logp}, GrpoObjective())
    del x["old_logp"]
    for found, y in zip(run(linear_grpo_loss, x, GrpoObjective(), old_logp=None), wanted, strict=True):
        torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-5)


def test_three_products_and_none_in_the_backward_pass():
    x = case(torch.float32)
    names: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name().split("::")[1].split(".")[0])
            return func(*args, **(kwargs or {}))

    with Watch():
        found = linear_grpo_loss(**x | {"hidden": x["hidden"].clone().requires_grad_()}, chunk_tokens=N)
        assert sum(name in ("mm", "addmm") for name in names) == 2  # no gradient is asked of the weight
        names.clear()
        weight = x["weight"].clone().requires_grad_()
        found = linear_grpo_loss(
            **x | {"hidden": x["hidden"].clone().requires_grad_(), "weight": weight}, chunk_tokens=N
        )
        assert sum(name in ("mm", "addmm", "addmm_") for name in names) == 3
        names.clear()
        found.loss.backward()
    assert not {"mm", "addmm", "addmm_", "bmm"} & set(names)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_tokens_of_weight_zero_may_hold_anything(bad):
    x, objective = case(torch.float32), GrpoObjective(clip_eps=0.2, kl_coef=0.1)
    unused = x["loss_weight"] == 0
    wanted = run(linear_grpo_loss, x, objective, chunk_tokens=5)
    names = ("old_logp", "ref_logp", "rollout_logp", "advantage")
    spoiled = x | {name: x[name].masked_fill(unused, bad) for name in names}
    spoiled["labels"] = x["labels"].masked_fill(unused, V + 7)
    for found, y in zip(run(linear_grpo_loss, spoiled, objective, chunk_tokens=5), wanted, strict=True):
        assert torch.equal(found, y)


def test_no_tokens_and_no_weights():
    x = case(torch.float32)
    nothing = {name: t if name in ("weight", "bias") else t[:0] for name, t in x.items()}
    for y in (nothing, x | {"loss_weight": torch.zeros(N)}):
        assert all(not t.any() for t in run(linear_grpo_loss, y, GrpoObjective(kl_coef=0.1)))


def test_two_runs_are_bitwise_equal():
    first, second = (run(linear_grpo_loss, case(torch.float32), GrpoObjective(), chunk_tokens=5) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_main_grad_is_added_to_and_autograd_gets_none():
    x, objective = case(torch.float32), GrpoObjective(clip_eps=0.2)
    hidden, weight = x["hidden"].clone().requires_grad_(), x["weight"].clone().requires_grad_()
    linear_grpo_loss(**x | {"hidden": hidden, "weight": weight}, objective=objective).loss.backward()
    wanted, given, main_grad = (hidden.grad, weight.grad), (hidden.clone(), weight.clone()), torch.ones(V, H)
    hidden, weight = (t.detach().requires_grad_() for t in given)
    layer = {"hidden": hidden, "weight": weight, "main_grad": main_grad, "chunk_tokens": 5}
    found = linear_grpo_loss(**x | layer, objective=objective)
    found.loss.backward(retain_graph=True)
    assert weight.grad is None
    torch.testing.assert_close((hidden.grad, main_grad - 1), wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        linear_grpo_loss(**x | layer, objective=objective)
    torch.testing.assert_close(main_grad - 1, wanted[1], rtol=1e-5, atol=1e-6)  # only where there is a backward pass
    with pytest.raises(RuntimeError, match="with main_grad the loss's own gradient must be 1"):
        (2 * found.loss).backward()


SEQUENCES = "needs the log-probabilities of whole sequences before the first gradient"


@pytest.mark.parametrize(
    ("change", "objective", "message"),
    [
        (
            {},
            GrpoObjective(ratio_level="sequence_mean"),
            f"ratio_level='sequence_mean' with tis_level='token' {SEQUENCES}",
        ),
        (
            {},
            GrpoObjective(tis="mask", tis_level="sequence"),
            f"ratio_level='token' with tis_level='sequence' {SEQUENCES}",
        ),
        ({"ref_logp": None}, GrpoObjective(kl_coef=0.1), "kl_coef=0.1 needs ref_logp, got None"),
        ({"labels": torch.full((N,), -100)}, None, "labels must be in [0, 96), got -100 .. -100"),
        ({"advantage": torch.zeros(3)}, None, "advantage is (3,) on cpu, but logp is (37,) on cpu"),
        (
            {"main_grad": torch.zeros(V, 3)},
            None,
            "main_grad must be torch.float32 (96, 24) on cpu, got torch.float32 (96, 3)",
        ),
        (
            {"weight": torch.zeros(8, 3)},
            None,
            "hidden [..., H] and weight [V, H] are required, got (37, 24) and (8, 3)",
        ),
    ],
)
def test_error(change, objective, message):
    with pytest.raises(ValueError) as caught:
        linear_grpo_loss(**case(torch.float32) | change, objective=objective)
    assert str(caught.value).startswith(f"linear_grpo_loss: {message}")
