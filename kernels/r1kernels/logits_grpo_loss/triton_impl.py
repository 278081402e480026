"""logits_grpo_loss in one launch: a program reads a row, knows its loss, and reads it again from the caches.

A row of bfloat16 logits (V = 151,936: 304 KB) is more than the shared memory of a multiprocessor (227 KB), but the
rows that are being worked on fit the L2 cache: 132 of them are 40 MB of an H100's 50. So a launch has one program of
512 threads for each multiprocessor, or two of 256 where the rows are short, which walk through the rows. The first
pass asks the caches to keep what it reads, the second to drop it; in place, the gradient takes no further cache lines.
Main memory sees 2 bytes read and 2 written a logit where the cache keeps what it is asked to (it is two halves, and
each may hold a copy), and up to 2 more where it does not.

A cluster of 2 to 4 multiprocessors could hold a row in its shared memory for certain, and load the next one meanwhile,
in CUDA C++: the better tool if the L2 cache turns out to lose rows. That takes a measurement, and none was made yet.
"""

from __future__ import annotations

import torch

from r1kernels.grpo_loss.objective import GrpoObjective
from r1kernels.grpo_loss.terms import TokenTerms
from r1kernels.grpo_loss.triton_impl import counter, scalars
from r1kernels.grpo_loss.triton_terms import NUM_SUMS
from r1kernels.logits_grpo_loss import triton_kernels as kernels
from r1kernels.logprob_entropy import triton_impl as logprob
from r1kernels.logprob_entropy.problem import Problem

MAX_REGISTERS = 128  # 65,536 are enough for 512 threads, or twice 256; left alone, the assembler aims at 64 and spills
REPEAT = 4  # 128-bit loads a thread has in flight
NOWHERE = {"out_outer": 0, "out_inner": 0, "out_column": 0}


def loss_and_gradient(
    problem: Problem,
    objective: GrpoObjective,
    terms: TokenTerms,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the package's `loss_and_gradient`, of a whole vocabulary; float32."""
    o, num_rows = objective, len(problem.labels)
    device = problem.logits.device
    sums = torch.zeros(NUM_SUMS, dtype=torch.float32, device=device)
    logp, entropy = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(2))
    if not num_rows:
        return sums, logp, entropy
    programs, num_warps = _schedule(problem.logits)
    with torch.cuda.device_of(sums):
        kernels.logits_grpo_kernel[(programs,)](
            **logprob.row_arguments(problem),
            old_logp_ptr=terms.old_logp,
            advantage_ptr=terms.advantage,
            ref_logp_ptr=terms.ref_logp,
            weight_ptr=terms.loss_weight,
            rollout_logp_ptr=terms.rollout_logp if o.tis != "off" else None,
            logp_ptr=logp,
            entropy_ptr=entropy,
            out_ptr=out,
            **logprob.strides(out, "out") if out is not None else NOWHERE,
            partial_ptr=torch.empty(programs, NUM_SUMS, dtype=torch.float32, device=device),
            counter_ptr=counter(device),
            loss_ptr=sums,
            metrics_ptr=sums[1:],
            num_rows=num_rows,
            **scalars(o),
            ENTROPY_GRAD=bool(o.entropy_coef),
            LOSS=o.loss,
            KL="off" if terms.ref_logp is None else o.kl,
            KL_GRAD=o.kl_grad or o.kl,
            KL_IMPORTANCE=o.kl_importance,
            TIS=o.tis,
            REPEAT=REPEAT,
            THREADS=32 * num_warps,
            WIDTH=16 // problem.logits.element_size(),
            num_warps=num_warps,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
    if out is not None:
        torch.autograd.graph.increment_version(out)
    return sums, logp, entropy


def multiply(grad: torch.Tensor, factor: torch.Tensor) -> None:
    """grad *= factor, a scalar; the device looks at it, and leaves `grad` alone where it is 1."""
    outer, inner, vocab = grad.shape
    if grad.numel():
        programs, num_warps = _schedule(grad)
        with torch.cuda.device_of(grad):
            kernels.multiply_kernel[(programs,)](
                grad_ptr=grad,
                **logprob.strides(grad, "stride"),
                num_inner=inner,
                vocab=vocab,
                factor_ptr=factor,
                num_rows=outer * inner,
                BLOCK=8192,
                num_warps=num_warps,
            )


def _schedule(rows: torch.Tensor) -> tuple[int, int]:
    """Programs and warps of each: as many rows at a time as the L2 cache holds, and a multiprocessor registers for."""
    if not rows.is_cuda:
        return 2, 16  # interpreted
    device = torch.cuda.get_device_properties(rows.device)
    in_cache = device.L2_cache_size // (device.multi_processor_count * rows.shape[2] * rows.element_size())
    if in_cache < 2:
        return device.multi_processor_count, 16
    return device.multi_processor_count * 2, 8
