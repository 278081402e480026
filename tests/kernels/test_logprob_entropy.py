"""logprob_entropy against torch.log_softmax in float64, and at the borders of its domain."""

from __future__ import annotations

import math

import pytest
import torch

from r1kernels import cpu_lib, logprob_entropy
from r1kernels.logprob_entropy import cpu_impl
from r1kernels.logprob_entropy.problem import Selection, Softmax
from r1kernels.logprob_entropy.reference import logprob_entropy_reference

INF = float("inf")


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def either_way(request, monkeypatch):
    """The compiled functions, and PyTorch with several row blocks even in tiny cases, the last of them not full."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_impl.compiled, "takes", lambda *tensors: False)
    elif cpu_lib.library_path() is None:
        pytest.skip("_cpu.so is not built: no C++ compiler")
    monkeypatch.setattr(cpu_impl, "BLOCK_ELEMENTS", 300)


def case(rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(vocab, (rows,), generator=generator)


def oracle(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float, grad_logp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logp, entropy, d (grad_logp . logp) / d logits) in float64, by autograd."""
    x = logits.detach().double().requires_grad_()
    log_probability = torch.log_softmax(x / temperature, dim=-1)
    logp = log_probability.gather(-1, labels[..., None])[..., 0]
    (grad,) = torch.autograd.grad((logp * grad_logp.double()).sum(), x)
    product = torch.where(log_probability == -INF, 0.0, log_probability.exp() * log_probability)
    return logp.detach(), -product.sum(-1).detach(), grad


def run(
    logits: torch.Tensor, labels: torch.Tensor, grad_logp: torch.Tensor, **options: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = logits.detach().clone().requires_grad_()
    logp, entropy, *_ = logprob_entropy(x * 1, labels, **options)  # x * 1: an in-place backward leaves x itself alone
    logp.backward(grad_logp.to(logp.dtype))
    return logp.detach(), entropy, x.grad


# ---- against the float64 oracle --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (7, 1), (7, 127), (3, 300), (1, 4096), (5, 4096)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_matches_float64_oracle(dtype, tolerance, rows, vocab, temperature):
    logits, labels = case(rows, vocab, dtype)
    grad_logp = torch.linspace(-1.0, 2.0, rows)
    wanted = oracle(logits, labels, temperature, grad_logp)
    found = run(logits, labels, grad_logp, temperature=temperature)
    assert [x.dtype for x in found] == [dtype] * 3
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_bfloat16_is_hardly_more_wrong_than_plain_pytorch(temperature):
    logits, labels = case(16, 127, torch.bfloat16)
    grad_logp = torch.ones(16)
    wanted = oracle(logits, labels, temperature, grad_logp)
    found = run(logits, labels, grad_logp, temperature=temperature)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.bfloat16]

    x = logits.clone().requires_grad_()
    log_probability = torch.log_softmax(x / temperature, dim=-1)
    logp = log_probability.gather(1, labels[:, None])[:, 0]
    logp.sum().backward()
    entropy = -(log_probability.exp() * log_probability).sum(-1)
    for ours, plain, exact in zip(found, (logp, entropy, x.grad), wanted, strict=True):
        assert (ours.double() - exact).abs().max() <= 1.1 * (plain.detach().double() - exact).abs().max()
    # The values are accumulated in float32: only the input is bfloat16.
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=1e-5)


def test_any_leading_shape():
    logits, labels = case(6, 127)
    logp, entropy, *_ = logprob_entropy(logits.view(2, 3, 127), labels.view(2, 3))
    flat_logp, flat_entropy, *_ = logprob_entropy(logits, labels)
    assert torch.equal(logp, flat_logp.view(2, 3))
    assert torch.equal(entropy, flat_entropy.view(2, 3))


def test_gradcheck():
    logits, labels = case(3, 11, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: logprob_entropy(x, labels, temperature=0.7).logp, (logits.requires_grad_(),)
    )


def test_gradcheck_of_every_option():
    logits, labels = case(4, 9, torch.float64)
    ids, offsets = torch.stack([labels, (labels + 3) % 9], 1).flatten(), torch.arange(0, 9, 2)
    temperature = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    mask = torch.tensor([True, True, False, True])
    for options in (
        {"softcap": 2.0, "logit_scale": 0.7, "temperature": temperature},
        {"row_mask": mask, "temperature": 0.7},
        {"keep_ids": ids, "keep_offsets": offsets, "softcap": 2.0},
    ):

        def both(x: torch.Tensor, options: dict = options) -> tuple[torch.Tensor, torch.Tensor]:
            found = logprob_entropy(x, labels, entropy_grad=True, **options)
            return found.logp, found.entropy

        assert torch.autograd.gradcheck(both, (logits.clone().requires_grad_(),))


def test_the_reference_is_what_the_op_computes_with_every_option():
    logits, labels = case(6, 31, torch.float64)
    labels[4] = -100
    temperature = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, True, True])
    keep_ids = torch.cat([labels[i : i + 1].clamp(min=0) + torch.arange(i + 1) for i in range(6)]) % 31
    keep = {"keep_ids": keep_ids, "keep_offsets": torch.arange(7).cumsum(0)}
    for options in ({}, {"logit_scale": 1.3, "softcap": 5.0}, keep, keep | {"logit_scale": 0.7, "softcap": 2.0}):
        softmax = Softmax(temperature, options.get("logit_scale", 1.0), options.get("softcap"))
        selection = Selection(-100, mask, options.get("keep_ids"), options.get("keep_offsets"))
        mine, theirs = (logits.clone().requires_grad_() for _ in range(2))
        rows = {"temperature": temperature, "row_mask": mask, "entropy_grad": True, "return_sum_pi_sq": True}
        found = logprob_entropy(mine, labels, **rows, **options)
        wanted = logprob_entropy_reference(theirs, labels, softmax, selection)
        torch.testing.assert_close([*found], [*wanted])
        weights = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
        grads = [
            torch.autograd.grad(((a + b * b) * weights).sum(), x)[0]
            for (a, b, *_), x in ((found, mine), (wanted, theirs))
        ]
        torch.testing.assert_close(*grads)


def test_options_mean_what_they_say():
    logits, labels = case(4, 9, torch.float64)
    temperature = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    found = logprob_entropy(
        logits, labels, softcap=2.0, logit_scale=0.7, temperature=temperature, return_sum_pi_sq=True
    )
    z = 2.0 * torch.tanh(0.7 * logits / 2.0) / temperature[:, None]
    exact = torch.log_softmax(z, 1)
    torch.testing.assert_close(found.logp, exact.gather(1, labels[:, None])[:, 0])
    torch.testing.assert_close(found.entropy, -(exact.exp() * exact).sum(1))
    torch.testing.assert_close(found.lse, z.logsumexp(1))
    torch.testing.assert_close(found.sum_pi_sq, exact.exp().square().sum(1))


def test_a_keep_set_is_the_distribution_of_its_tokens():
    logits, _ = case(2, 9, torch.float64)
    ids, offsets = torch.tensor([4, 8, 0, 7, 1]), torch.tensor([0, 3, 5])
    found = logprob_entropy(logits, torch.tensor([8, 2]), keep_ids=ids, keep_offsets=offsets)
    torch.testing.assert_close(found.logp[0], torch.log_softmax(logits[0, [4, 8, 0]], 0)[1])
    assert found.logp[1] == -INF  # not a token that could have been sampled
    exact = torch.log_softmax(logits[1, [7, 1]], 0)
    torch.testing.assert_close(found.entropy[1], -(exact.exp() * exact).sum())


def test_ignored_rows_are_not_read():
    logits, labels = case(5, 127)
    labels[1], mask = -100, torch.tensor([True, True, True, False, True])
    wanted = logprob_entropy(logits[[0, 2, 4]], labels[[0, 2, 4]])
    logits[1], logits[3] = math.nan, INF
    x = logits.requires_grad_()
    found = logprob_entropy(x, labels, row_mask=mask, entropy_grad=True)
    (found.logp.sum() + found.entropy.sum()).backward()
    for a, b in zip(found[:3], wanted[:3], strict=True):
        torch.testing.assert_close(a[[0, 2, 4]], b)
        assert (a[[1, 3]] == 0).all()
    assert (x.grad[[1, 3]] == 0).all()
    everything = logprob_entropy(logits.detach(), torch.full((5,), -100))
    assert (everything.logp == 0).all()


def test_unlikely_labels_and_large_logits_keep_their_digits():
    logits, labels = case(3, 300)
    logits[0, labels[0]] = -200.0  # exp underflows
    logits[1] += 1000.0
    check = torch.ones(3)
    for a, b in zip(run(logits, labels, check), oracle(logits, labels, 1.0, check), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


def test_a_second_backward_over_overwritten_logits_raises():
    logits, labels = case(3, 5)
    logp = logprob_entropy(logits.requires_grad_(), labels, inplace_backward=True).logp
    torch.autograd.grad(logp.sum(), logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


def test_values_by_hand():
    # softmax(log 1, log 2, log 5) = 1/8, 2/8, 5/8.
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log().requires_grad_()
    logp, entropy, *_ = logprob_entropy(logits, torch.tensor([1]))
    logp.sum().backward()
    assert logp.item() == pytest.approx(math.log(2 / 8), abs=1e-6)
    assert entropy.item() == pytest.approx(-sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8)), abs=1e-6)
    assert logits.grad[0].tolist() == pytest.approx([-1 / 8, 1 - 2 / 8, -5 / 8], abs=1e-6)


# ---- borders of the domain -------------------------------------------------------------------------------------


def test_no_rows():
    logits = torch.empty(0, 5, requires_grad=True)
    logp, entropy, *_ = logprob_entropy(logits, torch.empty(0, dtype=torch.int64))
    logp.sum().backward()
    assert logp.shape == entropy.shape == (0,)
    assert logits.grad.shape == (0, 5)


def test_a_forbidden_token_has_no_probability():
    logits = torch.tensor([[1.0, -INF, 2.0], [-INF, -INF, 3.0], [0.0, -INF, 0.0]])
    labels = torch.tensor([2, 2, 1])
    logp, entropy, grad = run(logits, labels, torch.ones(3))
    p = 1 / (1 + math.exp(-1))  # softmax(1, 2)
    binary = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert logp.tolist() == pytest.approx([math.log(p), 0.0, -INF], abs=1e-6)
    assert entropy.tolist() == pytest.approx([binary, 0.0, math.log(2)], abs=1e-6)
    torch.testing.assert_close(grad[:2], torch.tensor([[p - 1, 0.0, 1 - p], [0.0, 0.0, 0.0]]))
    assert grad.isfinite().all()


def test_a_common_offset_of_the_logits_changes_nothing():
    logits, labels = case(7, 127)
    logits = (logits * 64).round() / 64  # exact in float32 with the offset, so that only the op could lose digits
    wanted = oracle(logits, labels, 1.0, torch.ones(7))
    for offset in (1e4, -1e4):
        for x, y in zip(run(logits + offset, labels, torch.ones(7)), wanted, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_of_a_wider_or_transposed_tensor(inplace):
    logits, labels = case(7, 127)
    wanted = oracle(logits, labels, 1.0, torch.ones(7))
    wide = torch.cat([logits, torch.full((7, 3), 50.0)], dim=1)
    for view in (wide[:, :127], logits.t().contiguous().t(), logits.repeat_interleave(2, dim=0)[::2]):
        x = view.detach().requires_grad_()
        logp, entropy, *_ = logprob_entropy(x, labels, inplace_backward=inplace)
        (grad,) = torch.autograd.grad(logp.sum(), x)
        for found, exact in zip((logp.detach(), entropy, grad), wanted, strict=True):
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert (wide[:, 127:] == 50.0).all()  # an in-place backward writes the slice only


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_inplace_backward_is_bitwise_the_same(dtype, temperature):
    logits, labels = case(7, 127, dtype)
    grad_logp = torch.linspace(-1.0, 2.0, 7)
    found = run(logits, labels, grad_logp, temperature=temperature, inplace_backward=True)
    wanted = run(logits, labels, grad_logp, temperature=temperature)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("inplace", [False, True])
def test_only_an_inplace_backward_writes_over_the_logits(inplace):
    logits, labels = case(7, 127)
    x = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(logprob_entropy(x, labels, inplace_backward=inplace).logp.sum(), x)
    assert (grad.data_ptr() == x.data_ptr()) is inplace
    assert torch.equal(x, logits) is not inplace


def test_two_runs_are_bitwise_equal():
    logits, labels = case(16, 4096, torch.bfloat16)
    first, second = (run(logits, labels, torch.ones(16), temperature=0.6) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_a_row_does_not_depend_on_its_company(monkeypatch):
    logits, labels = case(9, 127)
    whole = run(logits, labels, torch.ones(9))
    monkeypatch.setattr(cpu_impl, "BLOCK_ELEMENTS", 1 << 20)
    alone = [run(logits[i : i + 1], labels[i : i + 1], torch.ones(1)) for i in range(9)]
    for n, x in enumerate(whole):
        torch.testing.assert_close(x, torch.cat([a[n] for a in alone]), rtol=0, atol=1e-6)


def test_no_gradient_reaches_the_logits_through_the_entropy():
    logits, labels = case(3, 5)
    assert not logprob_entropy(logits.requires_grad_(), labels).entropy.requires_grad


# ---- messages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "labels", "options", "message"),
    [
        (torch.zeros(2, 3).long(), torch.zeros(2).long(), {}, "logits must be floating point, got torch.int64"),
        (
            torch.zeros(2, 3),
            torch.zeros(3).long(),
            {},
            "labels must be int64 (2,) on cpu for logits (2, 3), got torch.int64 (3,) on cpu",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2).int(),
            {},
            "labels must be int64 (2,) on cpu for logits (2, 3), got torch.int32 (2,) on cpu",
        ),
        (torch.zeros(2, 3), torch.tensor([0, 3]), {}, "labels must be in [0, 3), got 0 .. 3"),
        (torch.zeros(2, 3), torch.tensor([-1, 2]), {}, "labels must be in [0, 3), got -1 .. 2"),
        (torch.zeros(2, 3), torch.zeros(2).long(), {"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        (
            torch.zeros(2, 3),
            torch.zeros(2).long(),
            {"temperature": torch.tensor([1.0, 0.0])},
            "temperature must be > 0, got 0.0",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2).long(),
            {"temperature": torch.ones(3)},
            "temperature must be float32 or float64 (2,) on cpu, got torch.float32 (3,) on cpu",
        ),
        (torch.zeros(2, 3), torch.zeros(2).long(), {"softcap": 0.0}, "softcap must be > 0 or None, got 0.0"),
        (torch.zeros(2, 3), torch.zeros(2).long(), {"logit_scale": -1.0}, "logit_scale must be > 0, got -1.0"),
        (
            torch.zeros(2, 3),
            torch.zeros(2).long(),
            {"row_mask": torch.ones(2)},
            "row_mask must be bool (2,) on cpu, got torch.float32 (2,) on cpu",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2).long(),
            {"tp_group": 2},
            "tp_group must be a torch.distributed.ProcessGroup or None, got 2",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2).long(),
            {"entropy_grad": True, "return_entropy": False},
            "entropy_grad=True needs return_entropy=True",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2).long(),
            {"keep_ids": torch.tensor([0])},
            "keep_ids and keep_offsets go together, got only one of them",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2).long(),
            {"keep_ids": torch.tensor([0]), "keep_offsets": torch.tensor([0, 1])},
            "keep_offsets must have rows + 1 = 3 entries, got 2",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2).long(),
            {"keep_ids": torch.tensor([0]), "keep_offsets": torch.tensor([0, 1, 1])},
            "row 1 keeps no token; a row that is not ignored needs at least one",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2).long(),
            {"keep_ids": torch.tensor([0, 3]), "keep_offsets": torch.tensor([0, 1, 2])},
            "keep_ids must be in [0, 3), got 0 .. 3",
        ),
        (
            torch.zeros(2, 1).expand(2, 3),
            torch.zeros(2).long(),
            {"inplace_backward": True},
            "inplace_backward=True needs logits that do not overlap themselves, got shape (2, 3) with strides (1, 0)",
        ),
        (
            torch.zeros(2, 4, 6, 8)[:, :2, :3, :5].flatten(0, 0),
            torch.zeros(2, 2, 3).long(),
            {},
            "logits may have at most two groups of evenly spaced leading dimensions, got shape (2, 2, 3, 5) with strides (192, 48, 8, 1); pass logits.contiguous()",  # noqa: E501
        ),
        (torch.zeros(2, 3), torch.zeros(2).long(), {"temperature": math.nan}, "temperature must be > 0, got nan"),
        (
            torch.zeros(2, 3),
            torch.zeros(2).long(),
            {"impl": "cuda"},
            "impl='cuda' does not exist; this op has triton, reference",
        ),
    ],
)
def test_error(logits, labels, options, message):
    with pytest.raises(ValueError) as caught:
        logprob_entropy(logits, labels, **options)
    assert str(caught.value) == f"logprob_entropy: {message}"
