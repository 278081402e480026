"""logprob_entropy in Triton: interpreted against the float64 reference, and the code made of it for absent GPUs."""

from __future__ import annotations

import aot
import pytest
import torch
from compiled_kernels import backward, forward

from r1kernels import logprob_entropy
from r1kernels.logprob_entropy.triton_impl import GRADIENT_REGISTERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")


def case(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * vocab)
    logits = (3 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    return logits.to(DEVICE), torch.randint(vocab, (rows,), generator=generator).to(DEVICE)


def run(impl: str, logits: torch.Tensor, labels: torch.Tensor, **options: object) -> list[torch.Tensor]:
    """Values and the gradient of a weighted sum of log-probabilities and, where it has one, entropies."""
    x = logits.detach().clone().requires_grad_()
    found = logprob_entropy(x * 1, labels, impl=impl, return_sum_pi_sq=True, **options)
    weights = torch.linspace(-1.0, 2.0, labels.numel(), device=DEVICE, dtype=found.logp.dtype).view(labels.shape)
    loss = (found.logp * weights).sum()
    if options.get("entropy_grad"):
        loss = loss + (found.entropy * weights.flip(0)).sum()
    loss.backward()
    return [*(x.detach() for x in found), x.grad]


def check(logits: torch.Tensor, labels: torch.Tensor, tolerance: float = 1e-5, **options: object) -> None:
    found = run("triton", logits, labels, **options)
    exact = {k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in options.items()}
    for a, b in zip(found, run("reference", logits.double(), labels, **exact), strict=True):
        near = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(a.dtype, tolerance)  # half an ulp of the gradient
        torch.testing.assert_close(a.double(), b, rtol=near, atol=tolerance, equal_nan=True)


# ---- against the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 127), (2, 4096), (2, 8195)])
def test_matches_the_reference(dtype, rows, vocab):
    check(*case(rows, vocab, dtype), temperature=0.6, entropy_grad=True)


def test_options_together():
    logits, labels = case(5, 127)
    temperature = torch.linspace(0.3, 2.0, 5, device=DEVICE)
    mask = torch.tensor([True, True, False, True, True], device=DEVICE)
    labels[4] = -7
    check(
        logits,
        labels,
        temperature=temperature,
        logit_scale=0.7,
        softcap=4.0,
        ignore_index=-7,
        row_mask=mask,
        entropy_grad=True,
    )


def test_keep_sets():
    logits, _ = case(3, 127)
    ids = torch.tensor([5, 126, 0, 7, 3, 90, 91, 92], device=DEVICE)
    offsets = torch.tensor([0, 3, 4, 8], device=DEVICE)
    check(logits, torch.tensor([126, 7, 91], device=DEVICE), keep_ids=ids, keep_offsets=offsets, entropy_grad=True)
    outside = logprob_entropy(
        logits, torch.tensor([6, 7, 91], device=DEVICE), keep_ids=ids, keep_offsets=offsets, impl="triton"
    )
    assert outside.logp[0] == -INF


def test_borders_of_the_domain():
    logits, labels = case(6, 40)
    logits[0, ::2] = -INF  # forbidden tokens, the label among them or not
    logits[1] += 1e4
    logits[2] -= 1e4
    logits[3, 3:] = -INF
    labels[3] = 1
    logits[4] = torch.finfo(torch.float32).min  # what masked_fill writes
    logits[4, 7] = 0.0
    labels[0], labels[4] = 1, 7
    logits[1:3] = (logits[1:3] * 64).round() / 64
    check(logits, labels, entropy_grad=True)
    logits[5] = -INF
    found = logprob_entropy(logits, labels, impl="triton")
    assert all(x[5].isnan() for x in (found.logp, found.entropy, found.lse))
    ignored = logprob_entropy(logits, labels, row_mask=torch.arange(6, device=DEVICE) < 5, impl="triton")
    assert ignored.logp[5] == ignored.entropy[5] == ignored.lse[5] == 0


def test_rows_with_any_strides():
    logits, labels = case(6, 127)
    padded = torch.cat([logits, torch.full((6, 3), 50.0, device=DEVICE)], 1).view(2, 3, 130)
    for view, targets in (
        (padded[:, :-1, :127], labels.view(2, 3)[:, :-1]),  # what TRL's trainers pass
        (logits.t().contiguous().t(), labels),
        (logits.repeat_interleave(2, 0)[::2], labels),
    ):
        x = view.detach().requires_grad_()
        found = logprob_entropy(x, targets, impl="triton")
        (grad,) = torch.autograd.grad(found.logp.sum(), x)
        y = view.detach().double().requires_grad_()
        exact = logprob_entropy(y, targets, impl="reference")
        (wanted,) = torch.autograd.grad(exact.logp.sum(), y)
        torch.testing.assert_close(found.logp.double(), exact.logp, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep", [False, True])
def test_inplace_backward_is_bitwise_the_same_and_happens_once(keep):
    logits, labels = case(3, 127, torch.bfloat16)
    ids = torch.stack([labels, (labels + 1) % 127], 1).flatten()
    options = {"keep_ids": ids, "keep_offsets": torch.arange(0, 7, 2, device=DEVICE)} if keep else {}
    grads = []
    for inplace in (False, True):
        x = logits.clone().requires_grad_()
        logp = logprob_entropy(x, labels, inplace_backward=inplace, impl="triton", **options).logp
        (grad,) = torch.autograd.grad(logp.sum(), x, retain_graph=True)
        grads.append(grad)
    assert torch.equal(*grads)
    assert grads[1].data_ptr() == x.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


def test_a_row_does_not_depend_on_its_company_and_two_runs_are_bitwise_equal():
    logits, labels = case(4, 4096, torch.bfloat16)
    whole, again = (run("triton", logits, labels, temperature=0.6) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))
    alone = logprob_entropy(logits[2:3], labels[2:3], temperature=0.6, impl="triton")
    assert torch.equal(alone.logp[0], whole[0][2])
    assert torch.equal(alone.entropy[0], whole[1][2])


# ---- the code for GPUs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> dict[str, aot.Compiled]:
    kernels = {f"forward {arch}": forward(arch) for arch in (80, 90, 100)}
    kernels |= {"forward fp32": forward(90, "fp32", 4), "logp only": forward(90, ENTROPY=False, SQUARES=False)}
    kernels |= {f"backward {arch}": backward(arch) for arch in (80, 90, 100)}
    kernels |= {"backward with entropy": backward(90, entropy=True), "backward by row": backward(90, per_row=True)}
    kernels |= {"backward softcap": backward(90, SOFTCAP=True)}
    return dict(zip(kernels, aot.compile_triton(list(kernels.values())), strict=True))


@pytest.mark.machine_code
def test_no_spills_no_float64_and_wide_loads(compiled):
    # Vocabulary and stride are multiples of 16, as 129280 and 151936 are: the code does not depend on their values.
    for name, made in compiled.items():
        assert made.spill_free, name
        # Four blocks of 256 threads fit a multiprocessor, of the backward three.
        assert made.registers <= (GRADIENT_REGISTERS if name.startswith("backward") else 64), (name, made.registers)
        assert ".f64" not in made.ptx, name
        assert made.count("LDG", "128") == 4, name
        # Four, and four of zeros for a row that is ignored.
        assert made.count("STG", "128") == (8 if name.startswith("backward") else 0), name
        assert "mul.wide" in made.ptx or "mul.lo.s64" in made.ptx, name  # 64-bit row offsets


@pytest.mark.machine_code
def test_one_exponential_an_element_and_no_barrier_among_the_loads(compiled):
    elements = {name: 16 if name == "forward fp32" else 32 for name in compiled}  # of a thread in a block
    for name, made in compiled.items():
        if "softcap" in name:  # a tanh more an element
            continue
        exponentials = made.count("MUFU", "EX2")
        extra = 2 if not name.startswith("backward") else 0  # running maximum: one a block, one at the end
        assert exponentials == elements[name] + extra, (name, exponentials)
