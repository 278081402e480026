"""Test-only stand-in for SGLang's CPU kernels, of which PyPI has no build: the names that sglang 0.5.23 imports.

SGLang falls back to PyTorch for all computation on a CPU without AMX. Only the bookkeeping function below has work to
do; the others belong to speculative decoding and say so when called.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__version__ = "0.4.10"  # of the package that sglang 0.5.23 pins


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Writes each request's new cache locations into its row of the token table."""
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        count = max(0, end - start)
        req_to_token[row, start:end] = out_cache_loc[taken : taken + count].to(req_to_token.dtype)
        taken += count


def _absent(name: str) -> Callable[..., None]:
    def call(*args: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name}: the test stand-in has no speculative decoding")

    return call


assign_draft_cache_locs_contiguous_cpu = _absent("assign_draft_cache_locs_contiguous_cpu")
assign_extend_cache_locs_cpu = _absent("assign_extend_cache_locs_cpu")
build_tree_kernel_efficient_cpu = _absent("build_tree_kernel_efficient_cpu")
copy_all_layer_kv_cache_cpu = _absent("copy_all_layer_kv_cache_cpu")
fill_accept_out_cache_loc_cpu = _absent("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _absent("fill_bonus_tokens_cpu")
verify_tree_greedy_cpu = _absent("verify_tree_greedy_cpu")
