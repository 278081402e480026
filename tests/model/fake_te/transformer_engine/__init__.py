"""A FAKE Transformer Engine, for tests only: the names and signatures of 2.11 that Megatron-core 0.16 uses, in PyTorch.

Linear computes with block-scaled FP8 inside `fp8_autocast` as the real one does on a Hopper GPU: the same blocks, the
same powers of two as scales, the same limits on shapes, float32 accumulation. What it cannot show: the real kernels,
their speed and memory, CUDA streams, NCCL.
"""

__version__ = "2.11.0"

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
