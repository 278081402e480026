"""paged_attention against PyTorch's attention over a dense cache, and flash-attn's over pages where it is installed.

python benchmarks/bench_paged_attention.py --device cuda

Heads of Qwen2.5-7B; `latent`: one entry of 512 + 64 numbers a token for 16 heads, whose values are in it
(Moonlight-16B). `equal`: rows of one length; `mixed`: a long row among short ones, for which a dense cache has the
longest length everywhere; `few`: rows that alone do not fill a GPU. Bytes are what is kept of the tokens there are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import peers
import timing
import torch
from torch.nn.functional import scaled_dot_product_attention

from r1kernels import paged_attention

HEADS, KV_HEADS, HEAD_DIM, PAGE = 28, 4, 128, 64
LATENT_HEADS, LATENT_DIM, LATENT_RANK = 16, 576, 512
CASES = {"equal": [2048] * 64, "mixed": [1024] * 63 + [32768], "few": [32768] * 4}
SMALL = {"equal": [64] * 4, "mixed": [20] * 3 + [128]}


def calls(lengths: list[int], device: torch.device) -> dict[str, Callable[[], object]]:
    """Of one step and layer; the same numbers in pages in no order, in a dense cache, and in pages of flash-attn."""
    query, dense, inside = numbers(lengths, HEADS, (2, KV_HEADS, HEAD_DIM), device)
    pool, table, on_device = in_pages(dense, lengths)

    def over_dense() -> torch.Tensor:
        by_key_head = query.view(len(lengths), KV_HEADS, -1, HEAD_DIM)
        return scaled_dot_product_attention(by_key_head, *dense, attn_mask=inside)

    found: dict[str, Callable[[], object]] = {
        "ours": lambda: paged_attention(query, *pool, table, on_device),
        "PyTorch, dense": over_dense,
    }
    by_token = dense.transpose(2, 3).contiguous()
    for name, call in peers.installed(peers.PAGED_ATTENTION, device).items():
        found[name] = partial(call, query, *by_token, on_device)
    return found


def latent_calls(lengths: list[int], device: torch.device) -> dict[str, Callable[[], object]]:
    """The same where values are in the keys."""
    query, dense, inside = numbers(lengths, LATENT_HEADS, (1, 1, LATENT_DIM), device)
    pool, table, on_device = in_pages(dense, lengths)
    return {
        "ours": lambda: paged_attention(query, pool[0], None, table, on_device, value_dim=LATENT_RANK),
        "PyTorch, dense": lambda: scaled_dot_product_attention(
            query[:, None], dense[0], dense[0, ..., :LATENT_RANK], attn_mask=inside
        ),
    }


def numbers(
    lengths: list[int], heads: int, shape: tuple[int, int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, [parts, rows, key heads, longest, dim] in a dense cache, and which of its tokens there are."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    (parts, kv_heads, dim), longest = shape, -(-max(lengths) // 256) * 256  # flash-attn's pages are multiples of 256
    query = torch.randn(len(lengths), heads, dim, device=device, dtype=dtype)
    dense = torch.randn(parts, len(lengths), kv_heads, longest, dim, device=device, dtype=dtype)
    inside = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    return query, dense, inside[:, None, None]


def in_pages(dense: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A dense cache in pages in no order, their table, and the lengths on the device."""
    used = [-(-length // PAGE) for length in lengths]
    order = iter(torch.randperm(sum(used)).tolist())
    table = torch.zeros(len(lengths), max(used), dtype=torch.int32)
    pool = dense.new_empty(len(dense), sum(used), dense.shape[2], PAGE, dense.shape[4])
    for row, count in enumerate(used):
        pages = [next(order) for _ in range(count)]
        table[row, :count] = torch.tensor(pages)
        pool[:, pages] = dense[:, row, :, : count * PAGE].unflatten(2, (-1, PAGE)).transpose(1, 2)
    return pool, table.to(dense.device), torch.tensor(lengths, dtype=torch.int32, device=dense.device)


def main() -> None:
    args = timing.arguments(__doc__)
    rounds = 1 if args.smoke else 10
    rate = timing.copy_rate(args.device, 2**20 if args.smoke or args.device.type == "cpu" else 2**30)
    cases = SMALL if args.smoke or args.device.type == "cpu" else CASES
    kinds = {"": (calls, 2 * KV_HEADS * HEAD_DIM), "latent, ": (latent_calls, LATENT_DIM)}
    for (kind, (make, width)), (case, lengths) in product(kinds.items(), cases.items()):
        size = 4 if args.device.type == "cpu" else 2
        num_bytes, found = sum(lengths) * width * size, make(lengths, args.device)
        for name, taken in timing.compared(found, args.device, rounds=rounds).items():
            row = {"case": kind + case, "rows": len(lengths), "tokens": sum(lengths)} | timing.summary(taken)
            row |= {"bytes": num_bytes, "of_copy_rate": num_bytes / row["median"] / rate}
            timing.emit("paged_attention", f"{name}, {kind}{case}", args.device, row)


if __name__ == "__main__":
    main()
