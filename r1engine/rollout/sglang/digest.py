"""The hashes that SGLang's /weights_checker answers with, computed on the trainer: one of CPU tensors, one of CUDA's.

Each takes the pieces of a tensor one after the other, as a fused tensor of a server comes in parts from the trainer.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch

TILE = 8192  # 32-bit words that the CUDA hash takes together
TILES_AT_ONCE = 256  # of the computation here: bounds its memory
SEEDS = (0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
POSITION = ((0x27D4EB2D, 15), (0x165667B1, 13))  # multiplier, rotation
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


class Digest(Protocol):
    """Of one tensor."""

    def update(self, piece: torch.Tensor) -> None:
        """The next elements, contiguous."""

    def value(self) -> str:
        """16 hexadecimal digits."""


class CpuDigest:
    """The first 8 bytes of SHA-256 over the tensor's bytes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, piece: torch.Tensor) -> None:
        data = piece.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        self._hash.update(data.data)

    def value(self) -> str:
        return self._hash.hexdigest()[:16]


class CudaDigest:
    """The hash of sglang/kernels/ops/memory/gpu_tensor_hash.py, in PyTorch operations on any device.

    The tensor's bytes are 32-bit words, zeros behind the last. Of every word two 32-bit hashes mix in its position and
    a seed; they add up over a tile, are mixed with the number of bytes, and the tiles' 64-bit values add up.
    """

    def __init__(self) -> None:
        self._pieces: list[torch.Tensor] = []

    def update(self, piece: torch.Tensor) -> None:
        self._pieces.append(piece.detach().contiguous().flatten().view(torch.uint8).clone())

    def value(self) -> str:
        data = torch.cat(self._pieces)
        padded = torch.nn.functional.pad(data, (0, -len(data) % 4))
        words = padded.view(torch.int32)
        if not len(words):
            return f"{0:016x}"
        total = torch.zeros((), dtype=torch.int64, device=words.device)
        for start in range(0, len(words), TILE * TILES_AT_ONCE):
            total += _tiles(words[start : start + TILE * TILES_AT_ONCE], start, 4 * len(words)).sum()  # modulo 2^64
        return f"{_splitmix(int(total) & MASK64):016x}"


def digest(tensor: torch.Tensor, kind: type[CpuDigest] | type[CudaDigest] = CpuDigest) -> str:
    """Hash of one whole tensor."""
    hashed = kind()
    hashed.update(tensor)
    return hashed.value()


def _tiles(words: torch.Tensor, start: int, num_bytes: int) -> torch.Tensor:
    """[tiles] int64: the 64 bits of each tile of these words, the first of which is number `start` of the tensor."""
    missing = -len(words) % TILE
    value = torch.nn.functional.pad(words.long() & MASK32, (0, missing))
    position = torch.arange(start, start + len(value), device=words.device) & MASK32
    is_word = (torch.arange(len(value), device=words.device) < len(words)).long()
    halves = []
    for seed, (multiplier, rotation) in zip(SEEDS, POSITION, strict=True):
        rotated = ((position << rotation) | (position >> (32 - rotation))) & MASK32
        mixed = _fmix(value ^ (((position * multiplier + seed) & MASK32) ^ rotated)) * is_word
        halves.append(_fmix((mixed.view(-1, TILE).sum(1) & MASK32) ^ (num_bytes & MASK32)))
    return (halves[0] << 32) | halves[1]


def _fmix(x: torch.Tensor) -> torch.Tensor:
    """The last mix of 32-bit MurmurHash3 (public domain); int64 holding 32 bits, products wrap around."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & MASK32
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & MASK32
    return x ^ (x >> 16)


def _splitmix(x: int) -> int:
    """The output function of splitmix64."""
    x ^= x >> 30
    x = (x * 0xBF58476D1CE4E5B9) & MASK64
    x ^= x >> 27
    x = (x * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)
