"""torch.ops.r1kernels.linear_logprob: what torch.compile, torch.export and fake tensors see of the op."""

from __future__ import annotations

import torch

from r1kernels.linear_logprob.head import Chunking, Head, HeadGradients, as_given, check_head, product_dtype
from r1kernels.logprob_entropy import LogProb, logprob_of
from r1kernels.logprob_entropy.problem import Selection, Softmax, wide
from r1kernels.logprob_entropy.torch_op import NUM_SUMS, arguments_of, softmax_of, stacked, unstacked


@torch.library.custom_op("r1kernels::linear_logprob", mutates_args=())
def row_sums(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    temperatures: torch.Tensor | None,
    row_mask: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    group: str,
    sequence_parallel: bool,
    chunk_tokens: int | None,
    dtype: torch.dtype,  # of the products
    entropy: bool,
    entropy_grad: bool,
    impl: str,
) -> torch.Tensor:
    """[7, N] the fields of RowSums; the first two are differentiable in hidden, weight and bias."""
    softmax = softmax_of(temperatures, temperature, logit_scale, softcap, group)
    chunking = Chunking(sequence_parallel, chunk_tokens)
    head = _head(hidden, weight, bias, labels, softmax, Selection(ignore_index, row_mask), chunking, dtype)
    logprob, problem = logprob_of("linear_logprob", impl, head.hidden), head.problem
    parts = hidden.new_zeros(5, len(problem.labels), dtype=problem.dtype)
    with as_given(hidden.device.type):
        for chunk in head.chunks():
            parts[:, chunk.flat] = logprob.partials(chunk.problem, entropy=entropy, squares=False)
    return stacked(logprob.merge(problem, problem.gather(parts)))


@row_sums.register_fake
def _(hidden, weight, bias, labels, *rest):
    dtype = next(x for x in rest if isinstance(x, torch.dtype))
    return hidden.new_empty(NUM_SUMS, labels.numel(), dtype=wide(dtype))


@torch.library.custom_op("r1kernels::linear_logprob_backward", mutates_args=())
def layer_gradients(
    grad: torch.Tensor,
    sums: torch.Tensor,
    needs: list[bool],  # of hidden, weight and bias
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    temperatures: torch.Tensor | None,
    row_mask: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    group: str,
    sequence_parallel: bool,
    chunk_tokens: int | None,
    dtype: torch.dtype,
    entropy: bool,
    entropy_grad: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias, empty where they are not needed."""
    softmax = softmax_of(temperatures, temperature, logit_scale, softcap, group)
    chunking = Chunking(sequence_parallel, chunk_tokens)
    head = _head(hidden, weight, bias, labels, softmax, Selection(ignore_index, row_mask), chunking, dtype)
    logprob, rows = logprob_of("linear_logprob", impl, head.hidden), unstacked(sums, head.problem)
    gradients = HeadGradients(head, (needs[0], needs[1], needs[2]))
    with as_given(hidden.device.type):
        for chunk in head.chunks():
            out, flat = chunk.problem.logits, chunk.flat
            to_entropy = grad[1][flat] if entropy_grad else None
            logprob.gradient(chunk.problem, rows.of_rows(flat), grad[0][flat], to_entropy, out)
            gradients.add(chunk, out[0])
    return given_back(gradients, hidden, weight, bias)


@layer_gradients.register_fake
def _(grad, sums, needs, hidden, weight, bias, *rest):
    return empty_gradients(needs, hidden, weight, bias)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output, *inputs[:6])
    ctx.constants = inputs[6:]


def _backward(ctx, grad):
    sums, *tensors = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    found = layer_gradients(grad, sums, needs, *tensors, *ctx.constants)
    return *(x if need else None for x, need in zip(found, needs, strict=True)), *[None] * 14


row_sums.register_autograd(_backward, setup_context=_setup)


def traced(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    softmax: Softmax,
    selection: Selection,
    chunking: Chunking,
    entropy: bool,
    entropy_grad: bool,
    impl: str,
) -> LogProb:
    """`linear_logprob` as one node of a graph; the backward pass computes the logits again."""
    temperatures, temperature, logit_scale, softcap, group = arguments_of(softmax)
    sums = row_sums(
        hidden,
        weight,
        bias,
        labels,
        temperatures,
        selection.row_mask,
        temperature,
        logit_scale,
        softcap,
        selection.ignore_index,
        group,
        *chunking,
        product_dtype(hidden),
        entropy,
        entropy_grad,
        impl,
    )
    logp, entropies, lse = (sums[i].view(labels.shape) for i in range(3))
    kept = entropies if entropy_grad else entropies.detach()
    return LogProb(logp, kept if entropy else None, lse.detach())


def _head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    softmax: Softmax,
    selection: Selection,
    chunking: Chunking,
    dtype: torch.dtype,
) -> Head:
    """Autocast was there when the graph was made, and is not when it runs: `dtype` is what it said."""
    device = hidden.device.type
    with torch.autocast(device, dtype, enabled=dtype != hidden.dtype):
        return check_head("linear_logprob", hidden, weight, labels, bias, softmax, selection, chunking)


def given_back(
    gradients: HeadGradients, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sums of the gradients in the shapes and dtypes of their tensors; empty where they are not needed."""
    first, second, third = gradients.results(hidden, weight, bias)
    empty = [hidden.new_empty(0) if x is None else x for x in (first, second, third)]
    return empty[0] if first is None else empty[0].view(hidden.shape), empty[1], empty[2]


def empty_gradients(
    needs: list[bool], hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `given_back` returns, without values."""
    tensors = (hidden, weight, bias)
    first, second, third = (
        x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0)
        for x, need in zip(tensors, needs, strict=True)
    )
    return first, second, third
