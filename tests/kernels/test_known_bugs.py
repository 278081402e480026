"""Bugs that users met in other projects' kernels, and the test of ours that would show each of them.

Each entry: where it was reported, what went wrong, and the tests. The ones that need a test of their own follow.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from compile_keys import number_of_keys
from ranks import on_ranks

from r1kernels import GrpoObjective, logits_grpo_loss, logprob_entropy

FOLDER = Path(__file__).resolve().parent

KNOWN = [
    ("trl#7266, mamba#1015", "32-bit offsets overflow beyond 2^31 logits", "test_offsets_beyond_32_bits"),
    ("trl#7244", "several passes over the logits; a float32 copy of them", "test_memory_is_that_of_a_few_rows"),
    ("trl#6808, #5597, Liger-Kernel#1082", "a fused loss that is not the trainer's", "test_trl_grpo_with_kl_and_delta"),
    ("trl#6369, #6439", "wrong denominators", "test_verl_vanilla_with_dual_clip_and_truncated_importance_sampling"),
    ("trl#7068", "groups of equal rewards drift by the KL", "test_equal_rewards_give_exactly_zero"),
    ("trl#3248, #5826", "NaN where all is masked", "test_a_row_without_weights_is_zero"),
    ("trl#3248, #5826", "NaN where all is masked", "test_no_rows_and_no_weights"),
    ("trl#4772, #4159, #6789", "ratios of unlike distributions", "test_trl_importance_sampling_modes"),
    ("trl#6789, #7125", "top-p sampling not accounted for", "test_a_keep_set_is_the_distribution_of_its_tokens"),
    ("Liger-Kernel#1294", "lengths from 65,536 on crash", "test_no_length_asks_for_another_compilation"),
    ("Liger-Kernel#1366", "float64 by accident", "test_no_spills_no_float64_and_wide_loads"),
    ("Liger-Kernel#916, ml-cross-entropy#37", "access out of bounds", "test_matches_the_reference"),
    ("Liger-Kernel#1298", "wrong weight gradient of unreduced losses", "test_matches_whole_logits_in_float64"),
    ("ml-cross-entropy#14", "gradients differ for many classes", "test_matches_float64_oracle"),
    (
        "ml-cross-entropy#31, #42",
        "gradients of a split layer",
        "test_split_vocabulary_and_tokens_give_what_one_rank_gives",
    ),
    ("verl#2656", "log-probabilities above 0", "test_log_probabilities_are_at_most_zero"),
    ("verl#5349", "probability beyond the end of the vocabulary", "test_log_probabilities_are_at_most_zero"),
    ("verl#6349", "masked NaN leaks through a product", "test_positions_of_weight_zero_may_hold_anything"),
    ("verl#6349", "masked NaN leaks through a product", "test_rows_of_weight_zero_may_hold_anything"),
    ("TransformerEngine#2325", "bfloat16 gradients", "test_bfloat16_is_hardly_more_wrong_than_plain_pytorch"),
    ("TransformerEngine#2476", "gradient of ignored tokens", "test_ignored_rows_are_not_read"),
    ("Megatron-LM#6700", "the whole vocabulary crosses the wire", "test_five_floats_a_row_cross_the_wire_at_once"),
    ("slime#1523", "memory of the entropy's backward pass", "test_memory_is_that_of_a_few_rows"),
    ("slime rollout.py", "ragged groups become one", "test_ragged_groups_in_any_order_match_the_oracle"),
    (
        "NeMo-RL#3743, pytorch#195829",
        "digits lost beside a large offset",
        "test_a_common_offset_of_the_logits_changes_nothing",
    ),
    ("unsloth-zoo#1262", "NaN in the KL metric", "test_a_reference_far_away_makes_no_nan"),
    ("triton#11584, #10945, #4972", "the interpreter's bfloat16", "test_gpus_round_in_hardware"),
]


def test_every_known_bug_has_a_test():
    found = set()
    for path in FOLDER.glob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {test for *_, test in KNOWN} <= found


@pytest.fixture(scope="module")
def far_apart() -> torch.Tensor:
    """Three rows so far apart that the last begins beyond 2^31 elements; memory is touched only where they are."""
    stride = 2**30 + 16
    base = torch.empty(2 * stride + 64, dtype=torch.float16)
    return base.as_strided((3, 61), (stride, 1))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_offsets_beyond_32_bits(impl, far_apart):
    generator = torch.Generator().manual_seed(0)
    near = torch.randn(3, 61, generator=generator).half()
    labels = torch.tensor([3, 60, 7])
    tokens = {"old_logp": None, "advantage": torch.ones(3), "loss_weight": torch.tensor([0.2, 0.3, 0.5])}
    results = []
    for logits in (near, far_apart):
        far_apart.copy_(near)
        x = logits.detach().clone() if logits is near else logits.detach()
        x.requires_grad_()
        found = logprob_entropy(x, labels, entropy_grad=True, inplace_backward=True, impl=impl)
        (grad,) = torch.autograd.grad((found.logp + found.entropy).sum(), x)
        grad = grad.clone()
        x.detach().copy_(near)
        loss = logits_grpo_loss(x, labels, **tokens, impl=impl).loss
        results.append([found.logp, found.entropy, grad, loss, torch.autograd.grad(loss, x)[0].clone()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_log_probabilities_are_at_most_zero(impl):
    # V = 32003 is off every block; one token has nearly all of the probability.
    logits = torch.randn(2, 32_003, generator=torch.Generator().manual_seed(0))
    logits[1, 32_002] = 60.0
    labels = torch.tensor([31_999, 32_002])
    found = logprob_entropy(logits, labels, impl=impl)
    exact = torch.log_softmax(logits.double(), 1)
    torch.testing.assert_close(found.logp.double(), exact.gather(1, labels[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.entropy.double(), -(exact.exp() * exact).sum(1), rtol=1e-5, atol=1e-6)
    assert (found.logp <= 0).all()
    assert (found.entropy >= 0).all()


def test_no_length_asks_for_another_compilation():
    (keys,) = on_ranks(1, number_of_keys)
    names = {"partials_kernel", "merge_kernel", "gradient_kernel", "grpo_kernel", "logits_grpo_kernel"}
    names |= {"attention_kernel", "combine_kernel"}
    assert names <= keys.keys()
    assert set(keys.values()) == {1}, keys


def test_triton_specializes_the_numbers_in_a_tuple_whatever_it_is_told():
    # Why the kernels take lengths one by one: in a NamedTuple each of 1 and the multiples of 16 would be a kernel more.
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend

    alone, together = ([native_specialize_impl(BaseBackend, x, False, False, False)[1] for x in values]
                       for values in ((1, 16, 17), ((1,), (16,), (17,))))  # fmt: skip
    assert set(alone) == {None}
    assert len(set(together)) == 3


def test_five_floats_a_row_cross_the_wire_at_once(world):
    calls: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d":
                calls.append(max(x.numel() for x in args[:2] if isinstance(x, torch.Tensor)))
            return func(*args, **(kwargs or {}))

    logits = torch.randn(6, 40, requires_grad=True)
    with Watch():
        found = logprob_entropy(
            logits, torch.arange(6), entropy_grad=True, return_sum_pi_sq=True, tp_group=dist.group.WORLD
        )
        (found.logp + found.entropy).sum().backward()
    assert calls == [5 * 6]


@pytest.mark.parametrize("op", ["logprob_entropy", "logits_grpo_loss"])
def test_memory_is_that_of_a_few_rows(op):
    # Forward and backward with an entropy gradient, bfloat16: nothing of the logits' size is made.
    logits, labels = torch.randn(512, 32_000).bfloat16().requires_grad_(), torch.randint(32_000, (512,))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        if op == "logprob_entropy":
            found = logprob_entropy(logits, labels, entropy_grad=True, inplace_backward=True)
            loss = (found.logp + found.entropy).sum()
        else:
            tokens = {"old_logp": None, "advantage": torch.ones(512), "loss_weight": torch.ones(512)}
            loss = logits_grpo_loss(logits, labels, **tokens, objective=GrpoObjective(entropy_coef=0.1)).loss
        torch.autograd.grad(loss, logits)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak < logits.numel() * logits.element_size() / 4
