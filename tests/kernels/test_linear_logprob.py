"""linear_logprob against the whole logits in float64, in chunks, over split vocabularies and tokens."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from r1kernels import linear_logprob
from r1kernels.linear_logprob import head
from r1kernels.linear_logprob.reference import linear_logprob_reference

N, H, V = 37, 24, 96


def case(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (N, H), "weight": (V, H), "bias": (V,), "grad_logp": (N,), "grad_entropy": (N,)}
    made = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    made["weight"] *= 0.4
    made = {name: x.to(dtype) for name, x in made.items()}
    return made | {"labels": torch.randint(V, (N,), generator=generator)}


def run(x: dict[str, torch.Tensor], entropy_grad: bool = False, **options: object) -> list[torch.Tensor]:
    """logp, entropy, gradients of hidden, weight and bias."""
    inputs = [x[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    hidden, weight, bias = inputs
    found = linear_logprob(hidden, weight, x["labels"], bias=bias, entropy_grad=entropy_grad, **options)
    loss = (found.logp * x["grad_logp"]).sum()
    if entropy_grad:
        loss = loss + (found.entropy * x["grad_entropy"]).sum()
    return [found.logp.detach(), found.entropy.detach(), *torch.autograd.grad(loss, inputs)]


def oracle(x: dict[str, torch.Tensor], entropy_grad: bool = False, **options: object) -> list[torch.Tensor]:
    """The same in float64 with whole logits."""
    inputs = [x[name].double().requires_grad_() for name in ("hidden", "weight", "bias")]
    logp, entropy = linear_logprob_reference(*inputs[:2], x["labels"], bias=inputs[2], **options)
    loss = (logp * x["grad_logp"].double()).sum()
    if entropy_grad:
        loss = loss + (entropy * x["grad_entropy"].double()).sum()
    return [logp.detach(), entropy.detach(), *torch.autograd.grad(loss, inputs)]


TEMPERATURES = 0.5 + torch.linspace(0, 1, N)


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 37, None])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": TEMPERATURES}, {"softcap": 3.0}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_matches_whole_logits_in_float64(dtype, tolerance, options, chunk_tokens, entropy_grad):
    x = case(dtype)
    wanted = oracle(x, entropy_grad, **options)
    for found, exact in zip(run(x, entropy_grad, chunk_tokens=chunk_tokens, **options), wanted, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_tokens", [5, None])
def test_bfloat16_is_at_most_a_tenth_more_wrong_than_unfused_bfloat16(chunk_tokens):
    x = case(torch.bfloat16)
    wanted = oracle(x)
    found = run(x, chunk_tokens=chunk_tokens)
    inputs = [x[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    logp, entropy = linear_logprob_reference(*inputs[:2], x["labels"], bias=inputs[2])
    plain = [logp, entropy, *torch.autograd.grad((logp * x["grad_logp"]).sum(), inputs)]
    assert [y.dtype for y in found] == [torch.float32] * 2 + [torch.bfloat16] * 3
    for ours, theirs, exact in zip(found, plain, wanted, strict=True):
        assert (ours.double() - exact).norm() <= 1.1 * (theirs.double() - exact).norm()


@pytest.mark.parametrize("options", [{}, {"temperature": TEMPERATURES, "softcap": 3.0}])
@pytest.mark.parametrize("chunk_tokens", [5, None])
def test_a_frozen_weight_gives_the_same_gradient_with_two_products(chunk_tokens, options):
    x = case()
    wanted = oracle(x, **options)[2]
    hidden = x["hidden"].clone().requires_grad_()
    found = linear_logprob(hidden, x["weight"], x["labels"], bias=x["bias"], chunk_tokens=chunk_tokens, **options)
    products = [0]

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products[0] += func.name().split("::")[1].split(".")[0] in ("mm", "addmm", "addmm_", "bmm", "linear")
            return func(*args, **(kwargs or {}))

    with Count():
        (grad,) = torch.autograd.grad((found.logp * x["grad_logp"]).sum(), hidden)
    assert products == [0]  # the forward pass made both
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_with_entropy_gradient():
    x = case()
    hidden = x["hidden"].clone().requires_grad_()
    found = linear_logprob(hidden, x["weight"], x["labels"], bias=x["bias"], chunk_tokens=5, entropy_grad=True)
    loss = (found.logp * x["grad_logp"]).sum() + (found.entropy * x["grad_entropy"]).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0].double(), oracle(x, True)[2], rtol=1e-5, atol=1e-5)


def test_main_grad_is_added_to_and_autograd_gets_none():
    x = case()
    hidden, weight = x["hidden"].clone().requires_grad_(), x["weight"].clone().requires_grad_()
    main_grad = torch.ones(V, H)
    options = {"bias": x["bias"], "main_grad": main_grad, "chunk_tokens": 5}
    (linear_logprob(hidden, weight, x["labels"], **options).logp * x["grad_logp"]).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(main_grad.double() - 1, oracle(x)[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [5, None])
def test_a_second_backward_pass_gives_the_same(chunk_tokens):
    x = case()
    hidden = x["hidden"].clone().requires_grad_()
    loss = linear_logprob(
        hidden, x["weight"].clone().requires_grad_(), x["labels"], chunk_tokens=chunk_tokens
    ).logp.sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, hidden)[0])


def test_ignored_rows_are_zero_and_take_no_part():
    x = case()
    x["labels"][::3] = -100
    mask = torch.arange(N) % 2 == 0
    found = linear_logprob(x["hidden"], x["weight"], x["labels"], row_mask=mask, chunk_tokens=5)
    used = mask & (x["labels"] >= 0)
    logp, entropy = linear_logprob_reference(x["hidden"][used], x["weight"], x["labels"][used])
    assert not found.logp[~used].any() and not found.entropy[~used].any()
    torch.testing.assert_close(found.logp[used], logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy[used], entropy, rtol=1e-5, atol=1e-5)


def test_no_tokens():
    hidden, weight = torch.empty(0, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    found = linear_logprob(hidden, weight, torch.empty(0, dtype=torch.int64))
    found.logp.sum().backward()
    assert found.logp.shape == found.entropy.shape == (0,)
    assert hidden.grad.shape == (0, H) and not weight.grad.any()


def test_any_leading_shape_and_no_entropy():
    x = case()
    flat = linear_logprob(x["hidden"][:36], x["weight"], x["labels"][:36])
    found = linear_logprob(
        x["hidden"][:36].view(4, 9, H), x["weight"], x["labels"][:36].view(4, 9), return_entropy=False
    )
    assert torch.equal(found.logp, flat.logp.view(4, 9))
    assert found.entropy is None


def test_two_runs_are_bitwise_equal():
    first, second = (run(case(), chunk_tokens=5) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_gradcheck():
    x = case(torch.float64)
    inputs = [x[name][:6].clone().requires_grad_() if name == "hidden" else x[name].clone().requires_grad_()
              for name in ("hidden", "weight", "bias")]  # fmt: skip
    labels = x["labels"][:6]

    def outputs(hidden, weight, bias):
        found = linear_logprob(hidden, weight, labels, bias=bias, softcap=2.0, entropy_grad=True, chunk_tokens=4)
        return found.logp, found.entropy

    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)


def test_extra_memory_is_that_of_a_chunk(monkeypatch):
    # Every allocation is seen: none is larger than a chunk's logits or a gradient.
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 8 * 4000 * 4)
    hidden, weight = torch.randn(512, 16, requires_grad=True), torch.randn(4000, 16, requires_grad=True)
    largest = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest[0] = max(largest[0], tensor.untyped_storage().nbytes())
            return out

    with Watch():
        linear_logprob(hidden, weight, torch.randint(4000, (512,)), entropy_grad=True).logp.sum().backward()
    assert largest[0] == weight.numel() * 4  # 256 kB; the logits would be 8 MB


# ---- split over ranks ------------------------------------------------------------------------------------------

SPLIT = 36  # tokens, divisible by 4 ranks


def split_runs() -> dict[tuple, list[torch.Tensor]]:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = {}
    for sequence_parallel in (False, True):
        for chunk_tokens in (5, None):
            for frozen in (False, True):
                key = sequence_parallel, chunk_tokens, frozen
                found[key] = split_run(rank, ranks, sequence_parallel, chunk_tokens, frozen)
    dist.destroy_process_group()
    return found


def split_run(
    rank: int, ranks: int, sequence_parallel: bool, chunk_tokens: int | None, frozen: bool
) -> list[torch.Tensor]:
    x = case(torch.float64)
    hidden = x["hidden"][:SPLIT].chunk(ranks)[rank] if sequence_parallel else x["hidden"][:SPLIT]
    inputs = [hidden.clone(), x["weight"].chunk(ranks)[rank].clone(), x["bias"].chunk(ranks)[rank].clone()]
    inputs = [t.requires_grad_(i == 0 or not frozen) for i, t in enumerate(inputs)]
    found = linear_logprob(
        inputs[0],
        inputs[1],
        x["labels"][:SPLIT],
        bias=inputs[2],
        temperature=TEMPERATURES[:SPLIT],
        tp_group=dist.group.WORLD,
        sequence_parallel=sequence_parallel,
        chunk_tokens=chunk_tokens,
        entropy_grad=not frozen,
    )
    loss = (found.logp * x["grad_logp"][:SPLIT]).sum()
    if not frozen:
        loss = loss + (found.entropy * x["grad_entropy"][:SPLIT]).sum()
    grads = torch.autograd.grad(loss, inputs[:1] if frozen else inputs)
    return [found.logp.detach(), found.entropy.detach(), *grads]


@pytest.mark.parametrize("ranks", [2, 4])
def test_split_vocabulary_and_tokens_give_what_one_rank_gives(ranks):
    everyone = on_ranks(ranks, split_runs)
    x = case(torch.float64)
    x = {name: t[:SPLIT] if len(t) == N else t for name, t in x.items()}
    for key in everyone[0]:
        sequence_parallel, _, frozen = key
        wanted = run(x, entropy_grad=not frozen, temperature=TEMPERATURES[:SPLIT])
        for rank, found in enumerate(e[key] for e in everyone):
            mine = [*wanted[:2], wanted[2].chunk(ranks)[rank] if sequence_parallel else wanted[2]]
            mine += [t.chunk(ranks)[rank] for t in wanted[3:]]
            for ours, whole in zip(found, mine, strict=False):
                torch.testing.assert_close(ours, whole, rtol=1e-6, atol=1e-9)


# ---- messages --------------------------------------------------------------------------------------------------

X, W, Y = torch.zeros(4, 3), torch.zeros(8, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ((X.long(), W, Y), {}, "hidden must be floating point, got torch.int64"),
        ((X, W.t(), Y), {}, "hidden [..., H] and weight [V, H] are required, got (4, 3) and (3, 8)"),
        ((X, W.double(), Y), {}, "weight must be torch.float32 (8, 3) on cpu, got torch.float64 (8, 3) on cpu"),
        ((X, W, Y), {"bias": X[0]}, "bias must be torch.float32 (8,) on cpu, got torch.float32 (3,) on cpu"),
        (
            (X, W, Y),
            {"main_grad": W.double()},
            "main_grad must be torch.float32 (8, 3) on cpu, got torch.float64 (8, 3) on cpu",
        ),
        ((X, W, Y[:3]), {}, "labels must have 4 entries, one for each token, got (3,)"),
        ((X, W, Y + 8), {}, "labels must be in [0, 8), got 8 .. 8"),
        ((X, W, Y), {"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ((X, W, Y), {"chunk_tokens": 0}, "chunk_tokens must be >= 1, got 0"),
        ((X, W, Y), {"sequence_parallel": True}, "sequence_parallel=True needs tp_group, got None"),
        ((X, W, Y), {"entropy_grad": True, "return_entropy": False}, "entropy_grad=True needs return_entropy=True"),
        ((X, W, Y), {"impl": "cuda"}, "impl='cuda' does not exist; this op has triton, reference"),
    ],
)
def test_error(tensors, options, message):
    with pytest.raises(ValueError) as caught:
        linear_logprob(*tensors, **options)
    assert str(caught.value) == f"linear_logprob: {message}"
