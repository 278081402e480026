"""What mixed precision and sharding hand to the ops: autocast, float32 masters, float16, DTensors, torch.vmap."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from r1kernels import (
    GrpoObjective,
    group_advantage,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    logits_grpo_loss,
    logprob_entropy,
)

N, H, V = 11, 16, 37
LABELS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.linspace(-1.0, 1.0, N)


def layer(hidden: torch.dtype, weight: torch.dtype) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    made = torch.randn(N, H, generator=draw).to(hidden), torch.randn(V, H, generator=draw).to(weight)
    return [x.requires_grad_() for x in (*made, torch.randn(V, generator=draw).to(weight))]


def plain(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return torch.log_softmax(logits, -1).gather(1, LABELS[:, None])[:, 0]


@pytest.mark.parametrize("chunk_tokens", [4, None])
@pytest.mark.parametrize(
    ("hidden", "weight"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_under_autocast_the_products_are_those_of_any_linear_layer(autocast, hidden, weight, chunk_tokens):
    ours, theirs = layer(hidden, weight), layer(hidden, weight)
    with torch.autocast("cpu", autocast):
        found = linear_logprob(*ours[:2], LABELS, bias=ours[2], chunk_tokens=chunk_tokens).logp
        wanted = plain(*theirs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=4e-2)
    grads = torch.autograd.grad((found * WEIGHTS).sum(), ours)
    wanted_grads = torch.autograd.grad((wanted * WEIGHTS).sum(), theirs)
    assert [g.dtype for g in grads] == [x.dtype for x in ours]
    for a, b in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("chunk_tokens", [4, None])
def test_a_float32_weight_gets_a_gradient_that_is_not_rounded(chunk_tokens):
    ours = layer(torch.bfloat16, torch.float32)
    exact = [x.detach().bfloat16().double().requires_grad_() for x in ours]
    logits = torch.nn.functional.linear(*exact)
    # Only the products are in 16 bits: of few logits, whose probabilities are far from 0, that shows little.
    wanted = torch.log_softmax(logits, -1).gather(1, LABELS[:, None])[:, 0]
    found = linear_logprob(*ours[:2], LABELS, bias=ours[2], chunk_tokens=chunk_tokens).logp
    (grad,) = torch.autograd.grad((found * WEIGHTS).sum(), ours[1])
    (wanted_grad,) = torch.autograd.grad((wanted * WEIGHTS).sum(), exact[1])
    assert grad.dtype == torch.float32
    assert not torch.equal(grad, grad.bfloat16().float())
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=0, atol=0.06)


def test_linear_grpo_loss_takes_what_linear_logprob_takes():
    tokens = {"old_logp": -3 - WEIGHTS, "advantage": WEIGHTS, "loss_weight": torch.full((N,), 1 / N)}
    ours, theirs = layer(torch.float32, torch.float32), layer(torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_grpo_loss(*ours[:2], LABELS, bias=ours[2], **tokens).loss
        logp = linear_logprob(*theirs[:2], LABELS, bias=theirs[2]).logp
    wanted, _ = grpo_loss(logp, **tokens)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, ours), torch.autograd.grad(wanted, theirs), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_float16_goes_through_every_op_of_the_loss():
    draw = torch.Generator().manual_seed(2)
    logits = (3 * torch.randn(N, V, generator=draw)).half()
    hidden, weight, _ = layer(torch.float16, torch.float16)
    tokens = {"old_logp": -3 - WEIGHTS, "advantage": WEIGHTS, "loss_weight": torch.full((N,), 1 / N)}
    calls = {
        "logprob": lambda x: logprob_entropy(x, LABELS).logp.sum(),
        "logits": lambda x: logits_grpo_loss(x * 1, LABELS, **tokens).loss,
    }
    for name, call in calls.items():
        half, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        found, wanted = call(half), call(exact)
        (grad,), (wanted_grad,) = torch.autograd.grad(found, half), torch.autograd.grad(wanted, exact)
        assert (found.dtype, grad.dtype) == (torch.float32, torch.float16), name
        torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-3, atol=1e-3)
    for op in (linear_logprob, lambda *x: linear_grpo_loss(*x, **tokens).loss):
        found = op(hidden, weight, LABELS)
        value = found if isinstance(found, torch.Tensor) else found.logp.sum()
        assert all(
            g.isfinite().all() and g.dtype == torch.float16 for g in torch.autograd.grad(value, (hidden, weight))
        )


@pytest.fixture
def sharded(world):
    return lambda x: distribute_tensor(x, init_device_mesh("cpu", (1,)), [Shard(0)])


def test_a_dtensor_is_refused_with_what_to_do(sharded):
    hidden, weight, bias = (x.detach() for x in layer(torch.float32, torch.float32))
    logits, floats = torch.zeros(N, V), torch.zeros(N)
    calls = {
        "linear_logprob: weight": lambda: linear_logprob(hidden, sharded(weight), LABELS),
        "linear_logprob: bias": lambda: linear_logprob(hidden, weight, LABELS, bias=sharded(bias)),
        "linear_grpo_loss: hidden": lambda: linear_grpo_loss(sharded(hidden), weight, LABELS, None, floats, floats),
        "logprob_entropy: logits": lambda: logprob_entropy(sharded(logits), LABELS),
        "logits_grpo_loss: logits": lambda: logits_grpo_loss(sharded(logits), LABELS, None, floats, floats),
        "grpo_loss: logp": lambda: grpo_loss(sharded(floats), None, floats, floats, GrpoObjective()),
        "group_advantage: rewards": lambda: group_advantage(sharded(floats), LABELS),
    }
    for name, call in calls.items():
        argument = name.partition(": ")[2]
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == (
            f"{name} must be a plain tensor, got a DTensor of (Shard(dim=0),); required {argument}.full_tensor(), or "
            f"{argument}.to_local() and tp_group for a vocabulary that is split over ranks"
        )


def test_vmap_and_complex_numbers_are_refused():
    logits = torch.zeros(2, N, V)
    message = "logprob_entropy: logits was found inside torch.vmap; required the whole batch in one call"
    with pytest.raises(RuntimeError, match=message):
        torch.vmap(lambda x: logprob_entropy(x, LABELS).logp)(logits)
    with pytest.raises(ValueError, match=r"logprob_entropy: logits must be floating point, got torch\.complex64"):
        logprob_entropy(logits[0].to(torch.complex64), LABELS)
    with pytest.raises(ValueError, match=r"weight must be torch\.bfloat16 \(37, 16\) on cpu, got torch\.float64"):
        linear_logprob(*layer(torch.bfloat16, torch.float64)[:2], LABELS)
    with pytest.raises(ValueError, match=r"weight must be torch\.float32 \(37, 16\) on cpu, got torch\.bfloat16"):
        linear_logprob(*layer(torch.float32, torch.bfloat16)[:2], LABELS)
