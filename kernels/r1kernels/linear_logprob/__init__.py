"""Log-probability and entropy of the labels from hidden states and the output layer; the logits never exist whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from r1kernels.dispatch import Impl
from r1kernels.linear_logprob.head import (
    Chunking,
    HeadGradients,
    as_given,
    check_head,
    check_main_grad,
    product_dtype,
    refuse_traced,
)
from r1kernels.logprob_entropy import LogProb, have, logprob_of, shaped
from r1kernels.logprob_entropy.problem import Logprob, RowSums, Selection, Softmax
from r1kernels.tracing import is_traced, traced_choice


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    row_mask: torch.Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    return_entropy: bool = True,
    entropy_grad: bool = False,
    main_grad: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    impl: Impl | None = None,
) -> LogProb:
    """`logprob_entropy(hidden @ weight.T + bias, labels, ...)`, a chunk of tokens at a time.

    The extra memory is that of one chunk's logits (32 MiB on a CPU, 512 MiB on a GPU), whatever the number of tokens.
    The matrix products are the library's, in the dtype of `hidden`; the weight's gradient is summed over the chunks in
    float32. The backward pass computes a chunk's logits again, four products in all; what fits into one chunk is kept
    rather than recomputed. With a frozen weight and without entropy_grad the forward pass computes the gradient of the
    hidden states already, and two products are all.

    With `tp_group` weight and bias are this rank's slice of the vocabulary. With `sequence_parallel` hidden is this
    rank's slice of the tokens: chunks of it are gathered, and their gradients scattered, as they are needed.

    Under autocast the products are in its dtype, as those of any linear layer. A float32 weight beside 16-bit hidden
    states is rounded for the products; its gradient is the float32 sum, not rounded.

    Args:
        hidden:            [..., H] float, differentiable; with sequence_parallel this rank's 1/ranks of the tokens.
        weight:            [V_local, H], dtype of hidden (or float32, see above), differentiable.
        labels:            [...] int64, global token ids; with sequence_parallel of all ranks' tokens, in rank order.
        bias:              [V_local], as weight, differentiable, or None.
        temperature, logit_scale, softcap, ignore_index, row_mask: as logprob_entropy takes them.
        tp_group:          process group of the vocabulary split; None: the whole vocabulary is here.
        sequence_parallel: the tokens are split over tp_group, too.
        return_entropy:    compute the entropy.
        entropy_grad:      let gradients through the entropy.
        main_grad:         [V_local, H] float32 (float64 for float64): the weight's gradient is added to it in the
                           backward pass, and autograd gets none (Megatron's gradient buffer). Not in a graph.
        chunk_tokens:      tokens of a chunk on each rank; None: as above.
        impl:              force an implementation; None picks one.

    Returns:
        LogProb(logp, entropy, lse), each of labels' shape, float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; see logprob_entropy for what is checked of values.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> found = linear_logprob(hidden, weight, torch.tensor([0, 1]))
        >>> found.logp, found.entropy
        (tensor([-0.1698, -0.5514]), tensor([0.5243, 0.9753]))
    """
    op = "linear_logprob"
    if entropy_grad and not return_entropy:
        raise ValueError(f"{op}: entropy_grad=True needs return_entropy=True")
    softmax, selection = Softmax(temperature, logit_scale, softcap, tp_group), Selection(ignore_index, row_mask)
    chunking = Chunking(sequence_parallel, chunk_tokens)
    if is_traced(hidden):
        from r1kernels.linear_logprob.torch_op import traced

        refuse_traced(op, main_grad)
        chosen = traced_choice(op, impl, hidden.device.type, have(product_dtype(hidden)))
        return traced(hidden, weight, bias, labels, softmax, selection, chunking, return_entropy, entropy_grad, chosen)
    head = check_head(op, hidden, weight, labels, bias, softmax, selection, chunking)
    check_main_grad(op, weight, main_grad)
    is_recording = torch.is_grad_enabled()
    is_frozen = not weight.requires_grad and not (bias is not None and bias.requires_grad)
    options = _Options(
        logprob_of(op, impl, head.hidden),
        return_entropy,
        entropy_grad,
        keeps_logits=is_recording and head.is_single and not is_frozen,
        keeps_gradient=is_recording and is_frozen and hidden.requires_grad and not entropy_grad,
        main_grad=main_grad,
    )
    found = _LinearLogProb.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, head, options)
    return shaped(found, labels.shape)


@dataclass(frozen=True)
class _Options:
    logprob: Logprob
    entropy: bool
    entropy_grad: bool
    keeps_logits: bool  # one chunk: its logits are saved for the backward pass
    keeps_gradient: bool  # frozen weight: d logp / d hidden is made in the forward pass
    main_grad: torch.Tensor | None


class _LinearLogProb(torch.autograd.Function):
    """(hidden [N, H], weight, bias, head, options) -> logp, entropy, lse, all flat."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, options):
        logprob, problem = options.logprob, head.problem
        parts = torch.zeros(5, len(problem.labels), dtype=problem.dtype, device=hidden.device)
        gradients = HeadGradients(head, (options.keeps_gradient, False, False))
        logits = None
        with as_given(hidden.device.type):
            for chunk in head.chunks():
                part = logprob.partials(chunk.problem, entropy=options.entropy, squares=False)
                parts[:, chunk.flat] = part
                if options.keeps_logits:
                    logits = chunk.logits
                elif options.keeps_gradient:
                    rows = logprob.merge(chunk.problem, problem.gather(part))
                    ones = torch.ones_like(rows.logp)
                    logprob.gradient(chunk.problem, rows, ones, None, chunk.problem.logits)
                    gradients.add(chunk, chunk.logits)
            rows = logprob.merge(problem, problem.gather(parts))
        saved = gradients.results(head.hidden, None, None)[0] if options.keeps_gradient else hidden
        ctx.save_for_backward(saved, weight, bias, logits, *rows)
        ctx.head, ctx.options, ctx.hidden_dtype = head.without_tensors(), options, hidden.dtype
        ctx.set_materialize_grads(False)
        entropy = rows.entropy if options.entropy else None
        constants = [rows.lse, *([] if options.entropy_grad else [entropy])]
        ctx.mark_non_differentiable(*(x for x in constants if x is not None))
        return rows.logp, entropy, rows.lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy, _grad_lse):
        hidden, weight, bias, logits, *saved = ctx.saved_tensors
        options, rows = ctx.options, RowSums(*saved)
        if options.keeps_gradient:
            # Saved in the place of `hidden`: its gradient for a grad_logp of 1.
            return (hidden * ctx.head.own(grad_logp)[:, None]).to(ctx.hidden_dtype), None, None, None, None
        head = ctx.head.of(hidden, weight, bias)
        gradients = HeadGradients(head, ctx.needs_input_grad[:3], options.main_grad)
        with as_given(hidden.device.type):
            for chunk in head.chunks(logits):
                flat = chunk.flat
                # What was kept stays for another backward pass; what was computed again is written over.
                out = chunk.problem.logits if logits is None else torch.empty_like(chunk.problem.logits)
                grads = (None if x is None else x[flat] for x in (grad_logp, grad_entropy))
                options.logprob.gradient(chunk.problem, rows.of_rows(flat), *grads, out)
                gradients.add(chunk, out[0])
        return *gradients.results(hidden, weight, bias), None, None
