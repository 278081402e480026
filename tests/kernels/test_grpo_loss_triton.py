"""grpo_loss in Triton: equal to the float64 reference for every kind of objective, deterministic, one lean launch."""

from __future__ import annotations

import aot
import pytest
import torch

from r1kernels import GrpoObjective, grpo_loss

CLIPS = {"clip_eps": 0.2, "clip_eps_high": 0.28, "dual_clip": 3.0, "kl_coef": 0.1, "entropy_coef": 0.01}
BOUNDS = {"tis_low": 0.8, "tis_high": 1.2}
NAN = float("nan")


def case(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A row of sequences; a third of its positions has weight 0 and holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def near(x: torch.Tensor) -> torch.Tensor:
        return x + 0.3 * torch.randn(total, generator=generator)

    logp = -3 * torch.rand(total, generator=generator)
    tensors = {"logp": logp, "old_logp": near(logp), "ref_logp": near(logp), "entropy": near(logp).abs()}
    tensors["rollout_logp"] = near(tensors["old_logp"])
    tensors["advantage"] = torch.randn(total, generator=generator)
    is_unused = torch.rand(total, generator=generator) < 1 / 3
    tensors = {name: x.masked_fill(is_unused, NAN) for name, x in tensors.items()}
    tensors["loss_weight"] = (1.0 / max(1, total) + torch.rand(total, generator=generator)).masked_fill(is_unused, 0)
    return tensors | {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int()}


def run(
    tensors: dict[str, torch.Tensor], objective: GrpoObjective, impl: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    """loss, d loss / d logp, d loss / d entropy, metrics."""
    x = {k: v if k == "cu_seqlens" else v.to(dtype, copy=True) for k, v in tensors.items()}
    inputs = [x["logp"].requires_grad_(), x["entropy"].requires_grad_()]
    loss, metrics = grpo_loss(**x, objective=objective, impl=impl)
    grads = torch.autograd.grad(3 * loss, inputs, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(x["logp"]) if g is None else g for g in grads), torch.stack([*metrics])]


@pytest.mark.parametrize("tis", [("off", "token"), ("truncate", "token"), ("mask", "sequence_mean")])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
@pytest.mark.parametrize("loss", ["clip", "cispo", "sapo"])
def test_every_loss_matches_the_float64_reference(loss, level, tis):
    # Empty and one-token sequences, one longer than a block; 1,063 tokens are two blocks of the token-level form.
    tensors = case([5, 0, 1030, 1, 27])
    objective = GrpoObjective(loss=loss, ratio_level=level, tis=tis[0], tis_level=tis[1], **CLIPS, **BOUNDS)
    wanted = run(tensors, objective, "reference", torch.float64)
    for x, y in zip(run(tensors, objective, "triton", torch.float32), wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-6)


def test_the_kl_of_a_small_step_keeps_its_digits():
    # In float32, exp(1e-3) - 1e-3 - 1 = 4.8e-7 or 6.0e-7, whichever way it rounds; it is 5.002e-7.
    zero = torch.zeros(8)
    for impl in ("reference", "triton"):
        _, metrics = grpo_loss(zero, zero - 1e-3, zero, zero + 1 / 8, ref_logp=zero + 1e-3, impl=impl)
        assert metrics.kl.item() == pytest.approx(1e-6 / 2 + 1e-9 / 6, rel=1e-3)
        assert metrics.policy_kl.item() == pytest.approx(1e-6 / 2 + 1e-9 / 6, rel=1e-3)


@pytest.mark.parametrize("kl_importance", [False, True])
@pytest.mark.parametrize("kl_grad", [None, "k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "abs"])
def test_every_kl_matches_the_float64_reference(kl, kl_grad, kl_importance):
    tensors = case([13, 20])
    objective = GrpoObjective(kl=kl, kl_grad=kl_grad, kl_importance=kl_importance, **CLIPS)
    wanted = run(tensors, objective, "reference", torch.float64)
    for x, y in zip(run(tensors, objective, "triton", torch.float32), wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("level", ["token", "sequence_mean"])
@pytest.mark.parametrize("lengths", [[], [1], [1023], [1024], [1025], [0, 0]])
def test_rows_of_any_length(lengths, level):
    tensors = case(lengths)
    objective = GrpoObjective(ratio_level=level, **CLIPS)
    wanted = run(tensors, objective, "reference", torch.float64)
    for x, y in zip(run(tensors, objective, "triton", torch.float32), wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_row_without_weights_is_zero(level):
    tensors = case([40]) | {"loss_weight": torch.zeros(40), "logp": torch.full((40,), NAN)}
    found = run(tensors, GrpoObjective(ratio_level=level, **CLIPS), "triton", torch.float32)
    assert all((x == 0).all() for x in found)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_ratio_beyond_the_floats_makes_no_nan(level):
    tensors = case([4]) | {"loss_weight": torch.ones(4), "logp": torch.zeros(4), "old_logp": torch.full((4,), -400.0)}
    tensors |= {"advantage": torch.tensor([1.0, -1.0, 0.0, 2.0]), "ref_logp": torch.full((4,), 400.0)}
    tensors["entropy"] = torch.ones(4)
    objective = GrpoObjective(ratio_level=level, clip_eps=0.2, kl_coef=0.1)
    wanted = run(tensors, objective, "reference", torch.float64)
    for x, y in zip(run(tensors, objective, "triton", torch.float32), wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-6)


def test_tensors_that_no_option_needs_may_be_left_out():
    tensors = case([50])
    few = {k: tensors[k] for k in ("logp", "advantage", "loss_weight")}
    wanted = grpo_loss(few["logp"], few["logp"], few["advantage"], few["loss_weight"], impl="reference")
    found = grpo_loss(few["logp"], None, few["advantage"], few["loss_weight"], impl="triton")
    torch.testing.assert_close(found, wanted)


def test_two_runs_are_bitwise_equal_and_leave_the_counter_at_zero():
    from r1kernels.grpo_loss.triton_impl import counter

    tensors = case([700] * 5)
    objective = GrpoObjective(**CLIPS)
    first, second = (run(tensors, objective, "triton", torch.float32) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert counter(torch.device("cpu")).tolist() == [0]


def test_bfloat16_inputs_get_bfloat16_gradients():
    tensors = {k: v if k == "cu_seqlens" else v.bfloat16() for k, v in case([30]).items()}
    logp = tensors["logp"].requires_grad_()
    loss, _ = grpo_loss(**tensors, objective=GrpoObjective(**CLIPS), impl="triton")
    (grad,) = torch.autograd.grad(loss, logp)
    assert (loss.dtype, grad.dtype) == (torch.float32, torch.bfloat16)


# ---- what the GPU would run ------------------------------------------------------------------------------------

POINTERS = "logp old_logp advantage weight ref_logp rollout_logp entropy grad grad_entropy partial loss metrics"
SCALARS = "clip_low clip_high dual_clip sapo_tau sapo_tau_negative kl_coef entropy_coef tis_low tis_high"


def kernel(arch: int, level: str) -> aot.Kernel:
    signature = {f"{name}_ptr": "*fp32" for name in POINTERS.split()} | {"counter_ptr": "*i32", "num_tokens": "i32"}
    constexprs = {
        "LOSS": "clip", "RATIO_LEVEL": level, "KL": "k3", "KL_GRAD": "k2", "KL_IMPORTANCE": False,
        "TIS": "truncate", "TIS_LEVEL": level, "BLOCK": 1024,
    }  # fmt: skip
    if level == "token":
        constexprs["cu_seqlens_ptr"] = None
    else:
        signature["cu_seqlens_ptr"] = "*i32"
    return aot.Kernel(
        "r1kernels.grpo_loss.triton_impl:grpo_kernel",
        signature | dict.fromkeys(SCALARS.split(), "fp32"),
        constexprs,
        arch,
        unaligned=("num_tokens", "counter_ptr", "loss_ptr", "metrics_ptr"),
    )


@pytest.mark.machine_code
def test_compiled_kernels_are_lean():
    cases = [(90, "token"), (90, "sequence_mean"), (80, "token"), (100, "token")]
    made = aot.compile_triton([kernel(arch, level) for arch, level in cases])
    assert all(m.spill_free and m.registers <= 255 and ".f64" not in m.ptx for m in made)
    # A thread has 8 of the 1,024 tokens and takes one exponential of each of ratio, KL and importance weight. Of a
    # sequence, ratio and weight are one number, but the compiler may take them for each token.
    token_level, sequence_level, *_ = made
    assert token_level.registers <= 168
    assert token_level.count("MUFU", "EX2") == 24
    assert sequence_level.count("MUFU", "EX2") <= 24
    # Of full blocks seven tensors are read and two written, by 128 threads: two 128-bit accesses of each. The fifteenth
    # load adds up the programs' sums. Sequences begin anywhere.
    for m in (token_level, *made[2:]):
        assert m.count("LDG", "128") == 15
        assert m.count("STG", "128") == 4
