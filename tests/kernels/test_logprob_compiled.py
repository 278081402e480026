"""csrc/cpu/logprob.cpp where it could go wrong: lengths, strides, -inf, NaN, large logits, likely and rare tokens."""

from __future__ import annotations

import pytest
import torch

from r1kernels import cpu_lib, logprob_entropy

INF = float("inf")
pytestmark = pytest.mark.skipif(cpu_lib.library_path() is None, reason="_cpu.so is not built: no C++ compiler")


def check(logits: torch.Tensor, labels: torch.Tensor, *, temperature: float = 1.0) -> None:
    """Values and gradient of log-probability and entropy against float64."""
    x, exact = logits.detach().requires_grad_(), logits.detach().double().requires_grad_()
    found = logprob_entropy(x, labels, temperature=temperature, entropy_grad=True)
    logp = torch.log_softmax(exact / temperature, -1)
    wanted = logp.gather(-1, labels[..., None])[..., 0]
    products = torch.where(logp == -INF, 0.0, logp.exp() * logp)
    torch.testing.assert_close(found.logp.double(), wanted, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(found.entropy.double(), -products.sum(-1), rtol=1e-5, atol=1e-5)
    by_logp, by_entropy = torch.linspace(-1, 2, labels.numel()).view(labels.shape), 0.3
    (found.logp * by_logp + found.entropy * by_entropy).sum().backward()
    p = logp.exp()
    onehot = torch.zeros_like(p).scatter_(-1, labels[..., None], 1.0)
    grad = by_logp[..., None] * (onehot - p) - by_entropy * (products - p * products.sum(-1, keepdim=True))
    torch.testing.assert_close(x.grad.double(), grad / temperature, rtol=1e-5, atol=1e-6)
    assert (x.grad[logits == -INF] == 0).all()


@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 1023, 1024, 1025, 1032, 3000])
def test_every_length_of_a_row(vocab):
    torch.manual_seed(vocab)
    check(3 * torch.randn(5, vocab), torch.randint(vocab, (5,)), temperature=0.6)


@pytest.mark.parametrize("place", [0, 1023, 1024, 2600])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_a_largest_logit_in_any_block_and_far_from_zero(place, offset):
    logits = torch.randn(4, 2601).round(decimals=1) + offset
    logits[:, place] = offset + 30.0  # all but e^-30 of the probability, found first or last
    check(logits, torch.tensor([place, 0, 5, 2600]))


def test_blocks_of_forbidden_tokens_and_rows_of_one():
    logits = torch.full((3, 2500), -INF)
    logits[0, 2400:] = torch.randn(100)
    logits[1, :100] = torch.randn(100)
    logits[2, 1500] = 3.0
    check(logits, torch.tensor([2401, 7, 1500]))


@pytest.mark.parametrize("place", [0, 3, 1030, 2499])
@pytest.mark.parametrize("others", [0.0, -INF])
def test_nan_stays_visible(place, others):
    logits = torch.full((2, 2500), others)
    logits[:, 5] = 1.0
    logits[0, place] = torch.nan
    logp = logprob_entropy(logits, torch.tensor([5, 5])).logp
    assert logp[0].isnan() and logp[1].isfinite()


def test_shifted_logits_are_read_and_written_where_they_are():
    logits = torch.randn(3, 6, 50)[:, :-1]  # rows of a batch, without the last position
    labels = torch.randint(50, (3, 5))
    check(logits, labels)
    padded = torch.randn(4, 64)[:, :50]
    check(padded, labels.flatten()[:4])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit(threads):
    logits, labels = torch.randn(64, 1003), torch.randint(1003, (64,))
    wanted = logprob_entropy(logits, labels).logp
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(logprob_entropy(logits, labels).logp, wanted)
    finally:
        torch.set_num_threads(before)
