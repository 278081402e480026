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


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("columns", [None, 2])
def test_trl_package(columns, masked, temperature):
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed; its formulas are tested above")
    index = LABELS if columns is None else torch.stack([LABELS, (LABELS + 1) % 37], -1)
    mask = (torch.arange(index.numel()).view(index.shape) % 3 > 0).long() if masked else None
    weights = torch.randn(index.shape, generator=torch.Generator().manual_seed(1))

    def run(module) -> tuple[torch.Tensor, torch.Tensor]:
        x = LOGITS.clone().requires_grad_()
        logp = module.selective_log_softmax(x * 1, index, temperature, mask)
        (logp * weights).sum().backward()
        return logp.detach(), x.grad

    same(run(integrations), run(utils))
    same(value_and_grad(integrations.entropy_from_logits), value_and_grad(utils.entropy_from_logits))
    if columns is None:
        both = [
            m.selective_log_softmax_and_entropy(LOGITS, index, True, temperature, mask) for m in (integrations, utils)
        ]
        same(*both)


def test_trl_log_probability_and_entropy():
    mask = torch.tensor([[1, 1, 0, 1, 1]] * 2)

    def theirs(logits: torch.Tensor, which: int) -> torch.Tensor:
        z = logits / 0.7
        return (log_probability(z, LABELS), entropy(z))[which].masked_fill(mask == 0, 0.0)

    def ours(logits: torch.Tensor, which: int) -> torch.Tensor:
        return integrations.selective_log_softmax_and_entropy(logits, LABELS, temperature=0.7, row_mask=mask)[which]

    for which in (0, 1):
        same(value_and_grad(ours, which), value_and_grad(theirs, which))
    x = LOGITS.clone().requires_grad_()
    assert not integrations.selective_log_softmax_and_entropy(x, LABELS, entropy_requires_grad=False)[1].requires_grad


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_verl_linear_cross_entropy(reduction):
    draw = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(2, 5, 8, generator=draw), torch.randn(37, 8, generator=draw)
    weights = torch.randn(10, generator=draw)

    def theirs(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What verl's test of its kernel compares with: float32 logits, divided by the temperature."""
        z = (hidden.flatten(0, 1) @ weight.t()).float() / 1.5
        logp = log_probability(z, LABELS.flatten())
        p = torch.softmax(z, -1)
        return {"none": logp, "sum": logp.sum(), "mean": logp.mean()}[reduction], z.logsumexp(-1) - (p * z).sum(-1)

    def ours(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return integrations.linear_cross_entropy(hidden, weight, LABELS, 1.5, reduction, None)

    results = []
    for run in (ours, theirs):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
        logp, found = run(*inputs)
        loss = (logp * weights[: logp.numel()].view(logp.shape)).sum() + (found * weights.flip(0)).sum()
        results.append((logp.detach(), found.detach(), *torch.autograd.grad(loss, inputs)))
    same(*results)


def test_verl_linear_cross_entropy_names_a_wrong_reduction():
    with pytest.raises(ValueError, match=r"linear_cross_entropy: reduction must be none, sum or mean, got 'max'"):
        integrations.linear_cross_entropy(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1).long(), 1.0, "max")


def test_slime_shapes_and_values():
    logits, tokens = LOGITS.flatten(0, 1), LABELS.flatten()
    logp, none = integrations.calculate_log_probs_and_entropy(logits, tokens, None)
    assert none is None
    torch.testing.assert_close(logp, log_probability(logits, tokens)[:, None])
    x = logits.clone().requires_grad_()
    for has_grad in (True, False):
        options = {"with_entropy": True, "chunk_size": 4, "with_entropy_grad": has_grad}
        _, found = integrations.calculate_log_probs_and_entropy(x, tokens, None, **options)
        torch.testing.assert_close(found.detach(), entropy(logits))
        assert found.requires_grad is has_grad
    nothing = integrations.calculate_log_probs_and_entropy(logits[:0], tokens[:0], None, True)
    assert [x.shape for x in nothing] == [(0,), (0,)]


@pytest.mark.parametrize("which", [0, 1])
def test_slime_top_p_mask_changes_the_log_probability_and_not_the_entropy(which):
    keep = torch.rand(10, 37, generator=torch.Generator().manual_seed(3)) < 0.4
    keep[0] = False  # nothing but the label, which is always kept

    def theirs(logits: torch.Tensor) -> torch.Tensor:
        logits, tokens = logits.flatten(0, 1), LABELS.flatten()
        with_label = keep | torch.nn.functional.one_hot(tokens, 37).bool()
        return log_probability(logits.masked_fill(~with_label, -torch.inf), tokens) if which == 0 else entropy(logits)

    def ours(logits: torch.Tensor) -> torch.Tensor:
        tensors = logits.flatten(0, 1), LABELS.flatten(), None
        return integrations.calculate_log_probs_and_entropy(*tensors, True, -1, keep, True)[which]

    same(value_and_grad(lambda x: ours(x).view(10)), value_and_grad(theirs))


def test_megatron_core_package(world):
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    wanted = value_and_grad(lambda x: vocab_parallel_cross_entropy(x.clone(), LABELS))
    same(value_and_grad(integrations.vocab_parallel_cross_entropy, LABELS), wanted)
