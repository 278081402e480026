"""FlashAttention over packed sequences on a GPU: flash-attn where it is installed, else what PyTorch brings."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad

INSTALL = "pip install --no-build-isolation 'flash-attn>=2.8'"


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    borders: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    *,
    scale: float,
) -> torch.Tensor:
    """Causal attention within each sequence; with fewer queries than keys the last query sees the last key.

    Its gradient is deterministic where `torch.use_deterministic_algorithms` asks for it.

    Args:
        q:       [queries, heads, head_dim] float16 or bfloat16.
        k, v:    [keys, kv_heads, head_dim].
        borders: int32 [sequences + 1] each: where the sequences begin and end in q, and in k and v.
        longest: most queries and most keys of a sequence.
        scale:   factor on the product of a query and a key.

    Returns:
        [queries, heads, head_dim].

    Raises:
        RuntimeError: flash-attn is installed and does not load.
    """
    if (flash := flash_attn()) is not None:
        deterministic = torch.are_deterministic_algorithms_enabled()
        return flash(q, k, v, *borders, *longest, softmax_scale=scale, causal=True, deterministic=deterministic)
    size, has_groups = q.shape[-1], q.shape[1] != k.shape[1]
    if size % 8:  # flash-attn fills up by itself
        q, k, v = (pad(x, (0, -size % 8)) for x in (q, k, v))
    options: dict[str, Any] = {}
    if has_groups and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif has_groups:  # PyTorch 2.11 promises nothing about fewer key heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    causal = (-1, 0)  # as many keys before the query as there are, none behind it
    out = varlen_attn(q, k, v, *borders, *longest, scale=scale, window_size=causal, **options)
    assert isinstance(out, torch.Tensor)  # not a tuple, as nothing else is asked for
    return out[..., :size]


@cache
def flash_attn() -> Callable[..., torch.Tensor] | None:
    """flash_attn_varlen_func; None where flash-attn is not installed.

    Raises:
        RuntimeError: it is there and does not load.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except Exception as error:  # of the loader, of Python, or what its own start raises
        if isinstance(error, ModuleNotFoundError) and error.name == "flash_attn":
            return None
        reason = f"{type(error).__name__}: {error}"
        raise RuntimeError(
            f"attention: the flash-attn that is installed does not load ({reason}); required is one built for torch "
            f"{torch.__version__} ({INSTALL}), or none: PyTorch's own is used then"
        ) from error
    return flash_attn_varlen_func


def choice() -> str:
    """What attends on a GPU, in words.

    Raises:
        RuntimeError: flash-attn is installed and does not load.
    """
    if flash_attn() is None:
        return f"torch.nn.attention.varlen of PyTorch {torch.__version__}"
    return f"flash-attn {importlib.metadata.version('flash-attn')}"
