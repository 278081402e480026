"""paged_attention against PyTorch's attention over a dense cache, and flash-attn's over pages where it is installed.

python benchmarks/bench_paged_attention.py --device cuda

Heads of Qwen2.5-7B. `equal`: rows of one length; `mixed`: a long row among short ones, for which a dense cache has the
longest length everywhere; `few`: rows that alone do not fill a GPU. Bytes are keys and values of the tokens there are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import peers
import timing
import torch
from torch.nn.functional import scaled_dot_product_attention

from r1kernels import paged_attention

HEADS, KV_HEADS, HEAD_DIM, PAGE = 28, 4, 128, 64
CASES = {"equal": [2048] * 64, "mixed": [1024] * 63 + [32768], "few": [32768] * 4}
SMALL = {"equal": [64] * 4, "mixed": [20] * 3 + [128]}


def calls(lengths: list[int], device: torch.device) -> dict[str, Callable[[], object]]:
    """Of one step and layer; the same numbers in pages in no order, in a dense cache, and in pages of flash-attn."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows, longest = len(lengths), -(-max(lengths) // 256) * 256  # flash-attn's pages are multiples of 256
    query = torch.randn(rows, HEADS, HEAD_DIM, device=device, dtype=dtype)
    dense = torch.randn(2, rows, KV_HEADS, longest, HEAD_DIM, device=device, dtype=dtype)
    used = [-(-length // PAGE) for length in lengths]
    order = iter(torch.randperm(sum(used)).tolist())
    table = torch.zeros(rows, max(used), dtype=torch.int32)
    pool = torch.empty(2, sum(used), KV_HEADS, PAGE, HEAD_DIM, device=device, dtype=dtype)
    for row, count in enumerate(used):
        pages = [next(order) for _ in range(count)]
        table[row, :count] = torch.tensor(pages)
        pool[:, pages] = dense[:, row, :, : count * PAGE].unflatten(2, (-1, PAGE)).transpose(1, 2)
    table, on_device = table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)
    inside = (torch.arange(longest, device=device) < on_device[:, None])[:, None, None]

    def over_dense() -> torch.Tensor:
        by_key_head = query.view(rows, KV_HEADS, -1, HEAD_DIM)
        return scaled_dot_product_attention(by_key_head, *dense, attn_mask=inside)

    found: dict[str, Callable[[], object]] = {
        "ours": lambda: paged_attention(query, *pool, table, on_device),
        "PyTorch, dense": over_dense,
    }
    by_token = dense.transpose(2, 3).contiguous()
    for name, call in peers.installed(peers.PAGED_ATTENTION, device).items():
        found[name] = partial(call, query, *by_token, on_device)
    return found


def main() -> None:
    args = timing.arguments(__doc__)
    rounds = 1 if args.smoke else 10
    rate = timing.copy_rate(args.device, 2**20 if args.smoke or args.device.type == "cpu" else 2**30)
    for case, lengths in (SMALL if args.smoke or args.device.type == "cpu" else CASES).items():
        size = 4 if args.device.type == "cpu" else 2
        num_bytes = 2 * sum(lengths) * KV_HEADS * HEAD_DIM * size
        found = calls(lengths, args.device)
        for name, taken in timing.compared(found, args.device, rounds=rounds).items():
            row = {"case": case, "rows": len(lengths), "tokens": sum(lengths)} | timing.summary(taken)
            row |= {"bytes": num_bytes, "of_copy_rate": num_bytes / row["median"] / rate}
            timing.emit("paged_attention", f"{name}, {case}", args.device, row)


if __name__ == "__main__":
    main()
