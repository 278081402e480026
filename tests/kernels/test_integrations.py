"""Drop-in functions against the formulas of their trainers, and `patch`; Megatron is the real one."""

from __future__ import annotations

import importlib
import importlib.util
import sys

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


# ---- patch ------------------------------------------------------------------------------------------------------


def test_megatron_is_patched_where_its_models_call_it_and_put_back(world):
    from megatron.core import tensor_parallel
    from megatron.core.fusions import fused_cross_entropy
    from megatron.core.models.common.language_module import language_module

    before = tensor_parallel.vocab_parallel_cross_entropy, language_module.fused_vocab_parallel_cross_entropy
    wanted = value_and_grad(lambda x: before[0](x.clone(), LABELS))
    smoothed = before[0](LOGITS.clone(), LABELS, 0.1)
    with integrations.megatron.patch() as patched:
        same(value_and_grad(tensor_parallel.vocab_parallel_cross_entropy, LABELS), wanted)
        group = language_module.parallel_state.get_tensor_model_parallel_group()
        same(value_and_grad(language_module.fused_vocab_parallel_cross_entropy, LABELS, group), wanted)
        assert patched.calls == {"vocab_parallel_cross_entropy": 1, "fused_vocab_parallel_cross_entropy": 1}
        # A smoothed cross-entropy is no log-probability.
        assert torch.equal(tensor_parallel.vocab_parallel_cross_entropy(LOGITS.clone(), LABELS, 0.1), smoothed)
        assert patched.notes == ["vocab_parallel_cross_entropy with label_smoothing stays Megatron's"]
        assert "megatron.core.tensor_parallel.vocab_parallel_cross_entropy (1 calls)" in str(patched)
        with pytest.raises(RuntimeError, match=r"megatron 0\.16\.\d is patched already; undo that patch first"):
            integrations.megatron.patch()
    after = tensor_parallel.vocab_parallel_cross_entropy, language_module.fused_vocab_parallel_cross_entropy
    assert after == before
    assert fused_cross_entropy.fused_vocab_parallel_cross_entropy is before[1]


SOURCES = {
    "verl/utils/torch_functional.py": """
def logprobs_from_logits(logits, labels, inplace_backward=True): ...
def entropy_from_logits(logits): ...
""",
    "verl/utils/kernel/linear_cross_entropy.py": """
import torch
class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None): ...
linear_cross_entropy = LinearCrossEntropy.apply
""",
    "verl/workers/actor.py": "from verl.utils.torch_functional import logprobs_from_logits",
    "slime/utils/ppo_utils.py": """
def calculate_log_probs_and_entropy(logits, tokens, tp_group, with_entropy=False, chunk_size=-1): ...
""",
    "slime/backends/loss.py": "from slime.utils.ppo_utils import calculate_log_probs_and_entropy",
}


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Packages with the names and arguments of verl's and slime's seams; a function of the test changes a file."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        importlib.invalidate_caches()

    for path, text in SOURCES.items():
        write(path, text)
    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] in ("verl", "slime")]:
        del sys.modules[name]


def test_verl_and_slime_are_patched_in_the_modules_that_import_from_the_seams(sources):
    actor, loss = importlib.import_module("verl.workers.actor"), importlib.import_module("slime.backends.loss")
    fused = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    before = actor.logprobs_from_logits, loss.calculate_log_probs_and_entropy, fused.linear_cross_entropy
    logits, labels = LOGITS.flatten(0, 1), LABELS.flatten()
    with integrations.verl.patch() as verl, integrations.slime.patch() as slime:
        same(value_and_grad(actor.logprobs_from_logits, LABELS), value_and_grad(log_probability, LABELS))
        logp, _ = loss.calculate_log_probs_and_entropy(logits, labels, None, with_entropy=True)
        torch.testing.assert_close(logp[:, 0], log_probability(logits, labels))
        logp, _ = fused.linear_cross_entropy(logits, torch.eye(37), labels, 1.0, "none", None)
        torch.testing.assert_close(logp, log_probability(logits, labels))
        assert verl.calls == {"logprobs_from_logits": 1, "linear_cross_entropy": 1}
        assert slime.calls == {"calculate_log_probs_and_entropy": 1}
    assert (actor.logprobs_from_logits, loss.calculate_log_probs_and_entropy, fused.linear_cross_entropy) == before


def test_a_version_of_other_arguments_keeps_its_own_and_does_not_lose_its_logits(sources):
    sources("verl/utils/torch_functional.py", "def logprobs_from_logits(logits, labels): ...")
    sources(
        "verl/utils/kernel/linear_cross_entropy.py",
        "def linear_cross_entropy(hidden, weight, labels, reduction): return 7",
    )
    functional = importlib.import_module("verl.utils.torch_functional")
    kernel = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    with integrations.verl.patch() as patched:
        x = LOGITS.clone().requires_grad_()
        functional.logprobs_from_logits(x, LABELS).sum().backward()
        assert torch.equal(x, LOGITS)  # nobody asked for the gradient in their place
        assert kernel.linear_cross_entropy(1, 2, 3, "mean") == 7
    assert patched.notes == [
        "linear_cross_entropy(hidden, weight, labels, reduction) stays verl's; served is one of "
        "(hidden, weight, labels, temperature, reduction, dist_process_group)"
    ]


def test_a_trainer_without_a_seam_or_not_installed_is_an_error(sources):
    sources("slime/utils/ppo_utils.py", "")
    with pytest.raises(RuntimeError) as caught:
        integrations.slime.patch()
    assert str(caught.value) == (
        "r1kernels.integrations: found none of the functions to replace in slime of unknown version; required one of "
        "slime.utils.ppo_utils.calculate_log_probs_and_entropy (tried with main of August 2026, read, not run)"
    )
    sources("verl/__init__.py", "import a_package_that_verl_needs")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_verl_needs"):  # not "no verl"
        integrations.verl.patch()


def test_a_trainer_that_is_not_installed_is_named():
    if importlib.util.find_spec("trl") is not None:
        pytest.skip("trl is installed here")
    with pytest.raises(RuntimeError, match=r"r1kernels\.integrations: found no trl; required pip install trl"):
        integrations.trl.patch()


def test_a_module_that_is_imported_while_patched_is_put_right_too(sources):
    functional = importlib.import_module("verl.utils.torch_functional")
    original = functional.logprobs_from_logits
    with integrations.verl.patch():
        actor = importlib.import_module("verl.workers.actor")
        assert actor.logprobs_from_logits is functional.logprobs_from_logits is not original
    assert actor.logprobs_from_logits is functional.logprobs_from_logits is original
