"""logits_grpo_loss against whole logits in float64 and against its two ops in a row; in PyTorch and in Triton."""

from __future__ import annotations

import aot
import pytest
import torch
from compiled_kernels import logits_grpo

from r1kernels import GrpoObjective, grpo_loss, logits_grpo_loss, logprob_entropy
from r1kernels.grpo_loss.reference import grpo_loss_reference
from r1kernels.grpo_loss.terms import TokenTerms
from r1kernels.logits_grpo_loss.triton_impl import MAX_REGISTERS
from r1kernels.logprob_entropy import cpu_impl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["reference", "triton"]
NAN, INF = float("nan"), float("inf")
OBJECTIVES = [
    {},
    {"loss": "cispo", "entropy_coef": 0.2},
    {"loss": "sapo", "kl_coef": 0.1, "kl": "abs"},
    {"kl_coef": 0.1, "kl": "k1", "kl_grad": "k2", "dual_clip": 3.0, "entropy_coef": -0.1},
    {"kl_coef": 0.1, "kl_importance": True, "tis": "truncate", "tis_high": 1.1},
    {"tis": "mask", "tis_low": 0.9, "tis_high": 1.1},
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several row blocks of the PyTorch form even in tiny cases, the last of them not full."""
    monkeypatch.setattr(cpu_impl, "BLOCK_ELEMENTS", 300)


def case(rows: int = 9, vocab: int = 127, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Two of nine rows have weight 0."""
    generator = torch.Generator().manual_seed(rows * vocab)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits, labels = 3 * randn(rows, vocab), torch.randint(vocab, (rows,), generator=generator)
    logp = torch.log_softmax(logits.to(dtype).double(), 1).gather(1, labels[:, None])[:, 0]
    old = logp + 0.2 * randn(rows)
    made = {"old_logp": old, "ref_logp": old + 0.3 * randn(rows), "rollout_logp": old + 0.1 * randn(rows)}
    made |= {"advantage": randn(rows), "loss_weight": (0.1 + torch.rand(rows, generator=generator)) / rows}
    made["loss_weight"][1::5] = 0
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    made = {name: x.to(DEVICE, exact) for name, x in made.items()}
    return made | {"logits": logits.to(DEVICE, dtype), "labels": labels.to(DEVICE)}


def run(x: dict[str, torch.Tensor], objective: GrpoObjective, **options: object) -> list[torch.Tensor]:
    """Loss, metrics, log-probabilities, entropies, and the logits' gradient for a loss gradient of 2."""
    logits = x["logits"].detach().clone().requires_grad_()
    found = logits_grpo_loss(**x | {"logits": logits * 1}, objective=objective, **options)
    (grad,) = torch.autograd.grad(2 * found.loss, logits)
    return [found.loss.detach(), torch.stack([*found.metrics]), found.logp, found.entropy, grad]


def oracle(
    x: dict[str, torch.Tensor], objective: GrpoObjective, temperature: float | torch.Tensor = 1.0, softcap: float = INF
) -> list[torch.Tensor]:
    """The same by autograd, in float64."""
    x = {name: None if t is None else t.double() if t.is_floating_point() else t for name, t in x.items()}
    logits = x["logits"].detach().requires_grad_()
    z = logits if softcap == INF else softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double()[:, None]
    log_p = torch.log_softmax(z / temperature, dim=1)
    logp, entropy = log_p.gather(1, x["labels"][:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    names = ("old_logp", "advantage", "loss_weight", "ref_logp", "rollout_logp")
    loss, metrics = grpo_loss_reference(logp, TokenTerms(**{name: x[name] for name in names}), objective, entropy)
    rows = [t.detach().masked_fill(x["loss_weight"] == 0, 0.0) for t in (logp, entropy)]
    return [loss.detach(), torch.stack([*metrics]), *rows, torch.autograd.grad(2 * loss, logits)[0]]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(found, wanted, strict=True):
        near = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(a.dtype, tolerance)  # an ulp of the gradient
        torch.testing.assert_close(a.double(), b.double(), rtol=near, atol=tolerance)


# ---- against float64 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OBJECTIVES)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_kind_of_objective_matches_float64(impl, options):
    x, objective = case(), GrpoObjective(clip_eps=0.2, **options)
    same(run(x, objective, impl=impl, temperature=0.8), oracle(x, objective, temperature=0.8), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 127), (5, 4096), (2, 33_000)])
@pytest.mark.parametrize("impl", IMPLS)
def test_every_size_and_dtype_matches_float64(impl, rows, vocab, dtype):
    x, objective = case(rows, vocab, dtype), GrpoObjective(clip_eps=0.2, kl_coef=0.1)
    same(run(x, objective, impl=impl), oracle(x, objective))


@pytest.mark.parametrize("impl", IMPLS)
def test_options_of_the_logits(impl):
    x = case() | {"logits": 3 * case()["logits"]}
    options = {"temperature": torch.linspace(0.5, 2.0, 9, device=DEVICE), "softcap": 4.0}
    objective = GrpoObjective(clip_eps=0.2, entropy_coef=0.1)
    found = run(x, objective, impl=impl, logit_scale=0.5, **options)
    halved = x | {"logits": x["logits"] * 0.5}
    *values, grad = oracle(halved, objective, **options)
    same(found, [*values, 0.5 * grad])


def test_float64_gradients_are_central_differences():
    # gradcheck would go backwards through one graph many times, which overwritten memory forbids.
    x = case(4, 9, torch.float64)
    objective = GrpoObjective(clip_eps=0.5, kl_coef=0.1, entropy_coef=0.1)
    logits, grad = x.pop("logits"), run(x | {"logits": case(4, 9, torch.float64)["logits"]}, objective)[4]

    def loss(z: torch.Tensor) -> torch.Tensor:
        return logits_grpo_loss(z, **x, objective=objective).loss

    steps = 1e-5 * torch.eye(36, dtype=torch.float64, device=DEVICE).view(36, 4, 9)
    wanted = torch.stack([(loss(logits + step) - loss(logits - step)) / 1e-5 for step in steps]).view(4, 9)
    torch.testing.assert_close(grad, wanted, rtol=1e-7, atol=1e-9)


def test_equals_the_two_ops_in_a_row():
    x, objective = case(), GrpoObjective(clip_eps=0.2, kl_coef=0.1, entropy_coef=0.1)
    logits = x["logits"].clone().requires_grad_()
    logp, entropy, *_ = logprob_entropy(logits, x["labels"], entropy_grad=True)
    loss, metrics = grpo_loss(
        logp, x["old_logp"], x["advantage"], x["loss_weight"], objective, entropy=entropy, ref_logp=x["ref_logp"]
    )
    (grad,) = torch.autograd.grad(2 * loss, logits)
    used = x["loss_weight"] != 0
    rows = [torch.where(used, t.detach(), 0.0) for t in (logp, entropy)]
    for impl in IMPLS:
        found = run(x, objective, impl=impl)
        same(found, [loss.detach(), torch.stack([*metrics]), *rows, grad])


@pytest.mark.parametrize("impl", IMPLS)
def test_on_policy_needs_no_old_log_probabilities(impl):
    x = case()
    x["old_logp"] = logprob_entropy(x["logits"], x["labels"]).logp
    same(run(x | {"old_logp": None}, GrpoObjective(), impl=impl), run(x, GrpoObjective(), impl=impl))


# ---- borders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_weight_zero_may_hold_anything(impl, bad):
    x, objective = case(), GrpoObjective(clip_eps=0.2, kl_coef=0.1, entropy_coef=0.1)
    unused = x["loss_weight"] == 0
    wanted = run(x, objective, impl=impl)
    names = ("old_logp", "ref_logp", "rollout_logp", "advantage")
    spoiled = x | {name: x[name].masked_fill(unused, bad) for name in names}
    spoiled |= {"logits": x["logits"].masked_fill(unused[:, None], bad), "labels": x["labels"].masked_fill(unused, -3)}
    same(run(spoiled, objective, impl=impl), wanted, 1e-6)
    assert (wanted[4][unused] == 0).all()
    assert wanted[4][~unused].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_forbidden_tokens_get_no_gradient(impl):
    x = case()
    x["logits"][:, ::2] = -INF
    x["labels"] = x["labels"] // 2 * 2 + 1
    x["labels"].clamp_(max=125)
    logits = x["logits"].masked_fill(x["logits"] == -INF, -1e4)
    objective = GrpoObjective(clip_eps=1e6, entropy_coef=0.1)
    x["old_logp"] = None
    found = run(x, objective, impl=impl)
    same(found, oracle(x | {"logits": logits}, objective))
    assert (found[4][:, ::2] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_and_no_weights(impl):
    x = case()
    for y in ({name: t[:0] for name, t in x.items()}, x | {"loss_weight": torch.zeros(9, device=DEVICE)}):
        assert all(not t.any() for t in run(y, GrpoObjective(kl_coef=0.1, entropy_coef=0.1), impl=impl))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_with_any_strides(impl, inplace):
    x, objective = case(6), GrpoObjective(clip_eps=0.2)
    wanted = run(x, objective, impl="reference")
    padded = torch.cat([x["logits"], torch.full((6, 3), 50.0, device=DEVICE)], 1)
    for view in (padded[:, :127], x["logits"].t().contiguous().t(), padded.clone().view(2, 3, 130)[..., :127]):
        shape = view.shape[:-1]
        y = {name: t.view(shape) for name, t in x.items() if name != "logits"}
        logits = view.detach().requires_grad_()
        found = logits_grpo_loss(logits, **y, objective=objective, inplace=inplace, impl=impl)
        (grad,) = torch.autograd.grad(2 * found.loss, logits)
        same([found.loss, grad.reshape(6, 127)], [wanted[0], wanted[4]])
        assert found.logp.shape == found.entropy.shape == shape
    assert (padded[:, 127:] == 50.0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_in_place_is_bitwise_the_same_and_twice_too(impl):
    x, objective = case(9, 127, torch.bfloat16), GrpoObjective(clip_eps=0.2, entropy_coef=0.1)
    first, again, beside = (run(x, objective, impl=impl, inplace=inplace) for inplace in (True, True, False))
    for a, b, c in zip(first, again, beside, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_where_the_gradient_is_written(impl, inplace):
    x = case()
    logits = x.pop("logits")
    kept = logits.clone()
    logits_grpo_loss(logits, **x, inplace=inplace, impl=impl)  # no gradient is wanted
    with torch.no_grad():
        logits_grpo_loss(logits.requires_grad_(), **x, inplace=inplace, impl=impl)
    assert torch.equal(logits, kept)
    found = logits_grpo_loss(logits, **x, inplace=inplace, impl=impl)
    assert torch.equal(logits, kept) is not inplace
    (grad,) = torch.autograd.grad(found.loss, logits, retain_graph=True)
    assert (grad.data_ptr() == logits.data_ptr()) is inplace
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.loss.backward()


def test_whoever_kept_the_logits_is_told():
    x = case()
    logits = x.pop("logits").requires_grad_().exp()  # exp keeps its result for the backward pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits_grpo_loss(logits, **x).loss.backward()


# ---- messages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            {},
            {"objective": GrpoObjective(ratio_level="sequence_mean")},
            "ratio_level='sequence_mean' with tis_level='token' needs the log-probabilities of whole sequences before "
            "the first gradient; use grpo_loss(logprob_entropy(...).logp, ...)",
        ),
        ({"ref_logp": None}, {"objective": GrpoObjective(kl_coef=0.1)}, "kl_coef=0.1 needs ref_logp, got None"),
        ({"logits": torch.zeros(9, 127).long()}, {}, "logits must be floating point, got torch.int64"),
        (
            {"labels": torch.zeros(8).long()},
            {},
            "loss_weight must have the shape of labels, (8,), got (9,)",
        ),
        (
            {"logits": torch.zeros(8, 127)},
            {},
            "labels must be int64 (8,) on cpu for logits (8, 127), got torch.int64 (9,) on cpu",
        ),
        ({"labels": torch.full((9,), -100)}, {}, "labels must be in [0, 127), got -100 .. -100"),
        ({}, {"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        (
            {"logits": torch.zeros(9, 1).expand(9, 127)},
            {},
            "inplace=True needs logits that do not overlap themselves, got shape (9, 127) with strides (1, 0)",
        ),
        ({}, {"tp_group": 2}, "tp_group must be a torch.distributed.ProcessGroup or None, got 2"),
        ({}, {"impl": "cuda"}, "impl='cuda' does not exist; this op has triton, reference"),
        (
            {"logits": torch.zeros(9, 127).double()},
            {"impl": "triton"},
            "impl='triton' does not exist; this op has reference",
        ),
    ],
)
def test_error(change, options, message):
    x = {name: t.cpu() for name, t in case().items()} | change
    with pytest.raises(ValueError) as caught:
        logits_grpo_loss(**x, **options)
    assert str(caught.value) == f"logits_grpo_loss: {message}"


# ---- the code for GPUs -----------------------------------------------------------------------------------------


@pytest.mark.machine_code
def test_compiled_kernels_are_lean():
    cases = {
        "sm_80": logits_grpo(80),
        "sm_90a": logits_grpo(90),
        "sm_100": logits_grpo(100),
        "with entropy": logits_grpo(90, entropy=True),
    }
    cases |= {"fp32": logits_grpo(90, dtype="fp32"), "short rows": logits_grpo(90, num_warps=8)}
    for name, made in zip(cases, aot.compile_triton(list(cases.values())), strict=True):
        elements = 16 if name == "fp32" else 32  # of a thread in a block
        assert made.spill_free, name
        # Two blocks of 256 threads fit a multiprocessor; of long rows the L2 cache holds no more than one of 512 each.
        assert made.registers <= (96 if name in ("sm_90a", "short rows") else MAX_REGISTERS), (name, made.registers)
        assert ".f64" not in made.ptx, name
        assert made.count("LDG", "128") == 8, name  # four in each of the two passes
        assert made.count("STG", "128") == 8, name  # four, and four of zeros for a row that is not used
        assert "evict_last" in made.ptx, name  # the first pass
        assert "evict_first" in made.ptx, name  # the second
        # One exponential an element and pass; the running maximum takes two a block, the loss three.
        assert 2 * elements + 5 == made.count("MUFU", "EX2"), (name, made.count("MUFU", "EX2"))
