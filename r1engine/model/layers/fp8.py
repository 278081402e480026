"""FP8 in the linears of the layers (`model.fp8`): Transformer Engine's, with DeepSeek-V3's block scaling.

In FP8 (E4M3, one scale a 1 x 128 part of an activation or gradient and a 128 x 128 block of a weight, all three
products of a linear): the projections of attention, the dense MLPs and the shared experts. In the model's precision:
embedding, output matrix, norms, attention itself, router, MTP modules, and MLA's small projection to the latent of
keys and values, whose 576 columns 8 ranks cannot share in sixteens (2 % of an attention layer's weights). Weights
stay in bfloat16 with their float32 masters: Transformer Engine quantizes copies of them at the first row of each
pass, so that names, checkpoints, export and refresh are what they are without FP8.

Routed experts follow `model.experts`, not this: 8 local experts of 671B would be 24 products of a thousand tokens a
layer in Megatron's SequentialMLP, each padded; its TEGroupedMLP has other parameter names and runs the same products on
a few streams (Hopper's cuBLAS has no grouped FP8 product). `fused_fp8` is one grouped product and sends tokens in FP8.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from packaging.version import Version

from r1engine.config import ConfigError

NEEDED = "2.9"  # first version that Megatron-core 0.16 is tested with
INSTALL = f"pip install --no-build-isolation 'transformer-engine[pytorch]>={NEEDED},<2.12' (CUDA 12.9 or later)"


class Linears(NamedTuple):
    """The classes of a layer's linears."""

    column: type
    row: type


def linears(config: Any) -> Linears:
    """Megatron's own, or its wrappers of Transformer Engine's where its TransformerConfig asks for FP8."""
    if config.fp8:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        return Linears(TEColumnParallelLinear, TERowParallelLinear)
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    return Linears(ColumnParallelLinear, RowParallelLinear)


@contextlib.contextmanager
def copies_of_weights(modules: Sequence[Any]) -> Iterator[None]:
    """Inside, one pass over all rows, quantized copies of the weights are made once (2 bytes a weight); then they are
    freed. The next pass may be under other weights, and Transformer Engine's of a pass without gradient lack the
    transposed half that a backward pass needs."""
    parts = [part for module in modules for part in module.modules()]
    routed = [part for part in parts if hasattr(part, "keep_fp8")]
    for part in routed:
        part.keep_fp8(True)
    try:
        yield
    finally:
        for part in routed:
            part.keep_fp8(False)
        for part in parts:
            if hasattr(part, "_fp8_workspaces"):
                part._fp8_workspaces.clear()


def check_machine() -> None:
    """Refuse a machine without Transformer Engine or without a GPU that computes with its block scaling.

    Raises:
        ConfigError: saying what was found, what is required and how to install it.
    """
    if problem := machine_problem():
        raise ConfigError(f"model.fp8: {problem}")


def machine_problem() -> str | None:
    """What this machine lacks; None where FP8 linears can run."""
    if importlib.util.find_spec("transformer_engine") is None:
        return f"found no transformer_engine, required {INSTALL} and a Hopper GPU"
    try:
        from transformer_engine import __version__ as version
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
    except (ImportError, OSError) as error:  # built for another torch or CUDA; the library is not found
        return f"transformer_engine cannot be imported ({error}), required {INSTALL}"
    if Version(version) < Version(NEEDED):
        return f"found transformer_engine {version}, required {INSTALL}"
    try:
        is_available, reason = FP8GlobalStateManager.is_fp8_block_scaling_available()
    except (RuntimeError, AssertionError, TypeError) as error:  # no driver, no device, a torch without CUDA
        is_available, reason = False, str(error)
    return None if is_available else f"transformer_engine {version} cannot scale by blocks on this machine: {reason}"
