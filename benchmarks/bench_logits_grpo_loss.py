"""logits_grpo_loss: loss and gradient from one read of the logits, beside two ops, PyTorch and Liger's GRPO loss.

All get the same [B, L + 1, V] logits and leave the gradient. `over_copy` is the time over that of copying the logits,
which moves what cannot be avoided: every logit read once, every gradient written once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import peers
import timing
import torch

from r1kernels import GrpoObjective, grpo_loss, logits_grpo_loss, logprob_entropy

OPTIONS = {"clip_eps": 0.2, "clip_eps_high": 0.28, "kl_coef": 0.04}
OBJECTIVE = GrpoObjective(**OPTIONS)


def one_read(logits, labels, old, ref, advantage):
    advantage = advantage[:, None].expand_as(old)
    weight = torch.full_like(old, 1 / old.numel())
    return logits_grpo_loss(logits[:, :-1], labels, old, advantage, weight, OBJECTIVE, ref_logp=ref).loss


def two_ops(logits, labels, old, ref, advantage):
    logp = logprob_entropy(logits[:, :-1], labels, return_entropy=False, inplace_backward=True).logp.flatten()
    advantage = advantage[:, None].expand_as(old).flatten()
    weight = torch.full_like(logp, 1 / old.numel())
    return grpo_loss(logp, old.flatten(), advantage, weight, OBJECTIVE, ref_logp=ref.flatten())[0]


def eager(logits, labels, old, ref, advantage):
    """TRL's formula."""
    logp = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, labels[..., None])[..., 0]
    ratio, advantage = (logp - old).exp(), advantage[:, None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    d = ref - logp
    return (0.04 * (d.exp() - d - 1) - gain).mean()


def measure(device: torch.device, shape: tuple[int, int, int], rounds: int) -> None:
    batch, length, vocab = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    logits = torch.randn(batch, length + 1, vocab, device=device, dtype=dtype)
    labels = torch.randint(vocab, (batch, length), device=device)
    with torch.no_grad():
        old = logprob_entropy(logits[:, :-1], labels).logp + 0.1 * torch.randn(batch, length, device=device)
    tensors = labels, old, old + 0.1, torch.randn(batch, device=device)
    runs = {"ours, one read": one_read, "ours, two ops": two_ops, "torch eager": eager}
    if device.type == "cuda":
        runs["torch.compile"] = torch.compile(eager, dynamic=True)
    for name, op in peers.installed(peers.LOGITS_GRPO, device).items():
        runs[name] = partial(op, **OPTIONS)
    scratch, spare = logits.clone(), torch.empty_like(logits)

    def step(run: Callable) -> torch.Tensor:
        x = scratch.detach().requires_grad_()
        loss = run(x, *tensors)
        torch.autograd.grad(loss, x)
        return loss.detach()

    calls = peers.working({name: partial(step, run) for name, run in runs.items()}, peers.LOGITS_GRPO)
    losses = {}
    for name, call in calls.items():
        scratch.copy_(logits)  # in-place gradients destroy the values, not the speed
        losses[name] = call().item()
    taken = timing.compared(calls | {"copy": lambda: spare.copy_(logits)}, device, rounds=rounds)
    copy = statistics.median(taken["copy"])
    for name, call in calls.items():
        row = timing.summary(taken[name])
        row |= {"over_copy": row["median"] / copy, "extra_mb": timing.extra_bytes(call, device) / 2**20}
        row |= {"batch": batch, "length": length, "vocab": vocab, "dtype": str(dtype), "loss": losses[name]}
        timing.emit("logits_grpo_loss", name, device, row)


def main() -> None:
    args = timing.arguments(__doc__)
    shapes = [(4, 128, 32_000)] if args.device.type == "cpu" else [(8, 1024, 151_936), (4, 1024, 129_280)]
    for shape in [(2, 4, 128)] if args.smoke else shapes:
        measure(args.device, shape, rounds=2 if args.smoke else 5 if args.device.type == "cpu" else 20)


if __name__ == "__main__":
    main()
