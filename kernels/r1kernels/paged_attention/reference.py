"""What paged_attention means: pages are put one after the other, then it is attention as anywhere."""

from __future__ import annotations

import torch


def paged_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    value_dim: int,
) -> torch.Tensor:
    """-> [N, heads, value_dim]; float64 is computed in float64, all else in float32."""
    (num_rows, heads, _), (_, kv_heads, page, _) = query.shape, keys.shape
    if not num_rows:
        return query.new_empty(0, heads, value_dim)
    wide = torch.promote_types(query.dtype, torch.float32)
    width = block_table.shape[1]
    if lengths.device.type == "cpu":  # elsewhere to ask for the longest would be to wait for it
        width = -(-int(lengths.max()) // page)
    first = torch.arange(width, device=query.device) * page
    pages = torch.where(first < lengths[:, None], block_table[:, :width], 0).long()
    inside = (torch.arange(width * page, device=query.device) < lengths[:, None])[:, None, :, None]

    def laid_out(pool: torch.Tensor) -> torch.Tensor:
        """[N, kv_heads, tokens, dim]; 0 behind each length, where there may be anything."""
        rows = pool[pages].transpose(1, 2).reshape(num_rows, kv_heads, width * page, -1)
        return torch.where(inside, rows, 0).to(wide)

    split, laid_out_keys = query.to(wide).view(num_rows, kv_heads, -1, query.shape[2]), laid_out(keys)
    scores = split @ laid_out_keys.transpose(2, 3) * scale
    scores = scores.masked_fill(~inside.transpose(2, 3), -torch.inf)
    is_empty = (lengths == 0)[:, None, None, None]
    probs = torch.softmax(scores.masked_fill(is_empty, 0), dim=-1)  # of nothing but -inf it would be NaN
    laid_out_values = laid_out_keys[..., :value_dim] if values is None else laid_out(values)
    return (probs @ laid_out_values).to(query.dtype).reshape(num_rows, heads, -1)
