"""Log-probabilities and the one-read loss on a GPU: float64 is the measure, nothing waits. `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from r1kernels import GrpoObjective, grpo_loss, logits_grpo_loss, logprob_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

OBJECTIVE = GrpoObjective(clip_eps=0.2, kl_coef=0.1, entropy_coef=0.01)


def case(rows: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows + vocab)
    logits = 3 * torch.randn(rows, vocab, device="cuda", generator=generator)
    return logits.to(dtype), torch.randint(vocab, (rows,), device="cuda", generator=generator)


def tokens(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the loss takes beside logits and labels; a quarter of the rows has weight 0."""
    rows = len(labels)
    logp = logprob_entropy(logits, labels).logp.float()
    weight = torch.full((rows,), 1 / rows, device="cuda")
    weight[::4] = 0
    return {"old_logp": logp + 0.1, "ref_logp": logp - 0.2, "advantage": torch.randn_like(logp), "loss_weight": weight}


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (300, 32_003), (64, 151_936), (1000, 129_280)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_log_probabilities_are_as_exact_as_the_logits_allow(dtype, rows, vocab):
    logits, labels = case(rows, vocab, dtype)
    grads = []
    for x, impl in ((logits.clone().requires_grad_(), "triton"), (logits.double().requires_grad_(), "reference")):
        found = logprob_entropy(x, labels, temperature=0.8, entropy_grad=True, impl=impl)
        (grad,) = torch.autograd.grad((found.logp + found.entropy).sum(), x)
        grads.append([found.logp.detach().double(), found.entropy.detach().double(), grad.double()])
    near = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 1e-4}[dtype]
    for (a, b), tolerance in zip(zip(*grads, strict=True), (1e-5, 1e-5, near), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=2e-5)


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (300, 32_003), (1000, 151_936)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_one_read_loss_equals_the_two_ops_and_itself(dtype, rows, vocab):
    logits, labels = case(rows, vocab, dtype)
    x = tokens(logits, labels)
    z = logits.double().requires_grad_()
    found = logprob_entropy(z, labels, entropy_grad=True)
    exact = {name: t.double() for name, t in x.items()}
    loss, metrics = grpo_loss(found.logp, **exact, entropy=found.entropy, objective=OBJECTIVE, impl="reference")
    (wanted,) = torch.autograd.grad(2 * loss, z)
    runs = []
    for _ in range(2):
        y = logits.clone().requires_grad_()
        ours = logits_grpo_loss(y, labels, **x, objective=OBJECTIVE)
        runs.append([ours.loss.detach(), torch.stack([*ours.metrics]), torch.autograd.grad(2 * ours.loss, y)[0]])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    near = 2.0**-7 if dtype == torch.bfloat16 else 1e-4
    values = torch.cat([runs[0][0][None], runs[0][1]]).double()
    torch.testing.assert_close(values, torch.stack([loss.detach(), *metrics]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runs[0][2].double() * rows, wanted * rows, rtol=near, atol=1e-4)


def test_offsets_beyond_32_bits():
    logits, labels = case(14_400, 151_936, torch.bfloat16)  # 2.19e9 logits
    last = logprob_entropy(logits[-8:].clone(), labels[-8:])
    everything = logprob_entropy(logits, labels)
    assert torch.equal(everything.logp[-8:], last.logp)
    weight = torch.zeros(14_400, device="cuda")
    weight[-8:] = 1 / 8
    wanted = logits[-8:].clone().requires_grad_()
    ones = torch.ones(14_400, device="cuda")
    loss = logits_grpo_loss(wanted, labels[-8:], None, ones[-8:], weight[-8:]).loss
    (grad,) = torch.autograd.grad(loss, wanted)
    x = logits.requires_grad_()
    found = logits_grpo_loss(x, labels, None, ones, weight)
    (whole,) = torch.autograd.grad(found.loss, x)
    assert torch.equal(whole[-8:], grad)
    assert not whole[:-8].any()


def test_nothing_waits_for_the_device():
    logits, labels = case(64, 4096, torch.bfloat16)
    x = tokens(logits, labels)

    def step() -> None:
        y = logits.clone().requires_grad_()
        found = logprob_entropy(y, labels, entropy_grad=True, row_mask=x["loss_weight"] != 0)
        (found.logp + found.entropy).sum().backward()
        logits_grpo_loss(logits.clone().requires_grad_(), labels, **x, objective=OBJECTIVE).loss.backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
