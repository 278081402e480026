"""Drop-in functions against the formulas of the trainers they are named after; Megatron's is the real one."""

from __future__ import annotations

import pytest
import torch

from r1kernels import integrations

generator = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(2, 5, 37, generator=generator)
LABELS = torch.randint(37, (2, 5), generator=generator)
WEIGHTS = torch.randn(2, 5, generator=generator)


def value_and_grad(function, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
    x = LOGITS.clone().requires_grad_()
    value = function(x * 1, *arguments)
    (value * WEIGHTS.view(value.shape)).sum().backward()
    return value.detach(), x.grad


def same(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def log_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]


def entropy(logits: torch.Tensor) -> torch.Tensor:
    logp = torch.log_softmax(logits, -1)
    return -(logp.exp() * logp).sum(-1)


def test_trl_and_verl_formulas():
    wanted = value_and_grad(log_probability, LABELS)
    same(value_and_grad(integrations.selective_log_softmax, LABELS), wanted)
    same(value_and_grad(integrations.logprobs_from_logits, LABELS), wanted)
    same(value_and_grad(integrations.entropy_from_logits), value_and_grad(entropy))


def test_several_indices_a_row():
    index = torch.stack([LABELS, (LABELS + 1) % 37], -1)
    torch.testing.assert_close(
        integrations.selective_log_softmax(LOGITS, index), torch.log_softmax(LOGITS, -1).gather(-1, index)
    )


def test_trl_package():
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed; its formulas are tested above")
    torch.testing.assert_close(
        integrations.selective_log_softmax(LOGITS, LABELS), utils.selective_log_softmax(LOGITS, LABELS)
    )
    torch.testing.assert_close(integrations.entropy_from_logits(LOGITS), utils.entropy_from_logits(LOGITS))


def test_slime_shapes_and_values():
    logits, tokens = LOGITS.flatten(0, 1), LABELS.flatten()
    logp, none = integrations.calculate_log_probs_and_entropy(logits, tokens, None)
    assert none is None
    torch.testing.assert_close(logp, log_probability(logits, tokens)[:, None])
    _, found = integrations.calculate_log_probs_and_entropy(logits, tokens, None, with_entropy=True)
    torch.testing.assert_close(found, entropy(logits))
    assert not found.requires_grad
    x = logits.clone().requires_grad_()
    kept = integrations.calculate_log_probs_and_entropy(x, tokens, None, with_entropy=True, with_entropy_grad=True)[1]
    assert kept.requires_grad


def test_megatron_core_package(world):
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    wanted = value_and_grad(lambda x: vocab_parallel_cross_entropy(x.clone(), LABELS))
    same(value_and_grad(integrations.vocab_parallel_cross_entropy, LABELS), wanted)
