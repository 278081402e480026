"""What SGLang's /weights_checker must answer for given weights: its layout of tensors, made here.

SGLang fuses what Hugging Face names separately: q, k, v into one matrix; gate and up into another; of latent attention
the two down-projections; all routed experts of a layer into two tensors. Every tensor-parallel rank holds a slice. A
refresh is right when each rank's hash of each of its tensors is the hash of the slice made here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from r1engine.hf.architecture import Architecture
from r1engine.rollout.sglang.digest import CpuDigest, CudaDigest, Digest

VOCABULARY_MULTIPLE = 64  # SGLang pads the rows of embedding and output matrix to it, with zeros
_FUSED = {  # name of a part -> (name of the whole, place in it, parts)
    "q_proj": ("qkv_proj", 0, 3),
    "k_proj": ("qkv_proj", 1, 3),
    "v_proj": ("qkv_proj", 2, 3),
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "q_a_proj": ("fused_qkv_a_proj_with_mqa", 0, 2),
    "kv_a_proj_with_mqa": ("fused_qkv_a_proj_with_mqa", 1, 2),
}
_LINEAR = re.compile(r"(.*)\.(\w+)\.(weight|bias)")
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass
class _Fused:
    """A tensor of the server while its parts come: one running hash a rank, parts ahead of their turn kept."""

    num_parts: int
    hashes: list[Digest]
    taken: int = 0
    waiting: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, place: int, slices: list[torch.Tensor]) -> bool:
        """Take the slices of one part; whether all parts are there."""
        if place == self.taken:
            waiting = slices
        else:
            self.waiting[place], waiting = [s.detach().clone() for s in slices], None
        while waiting is not None:
            for hashed, piece in zip(self.hashes, waiting, strict=True):
                hashed.update(piece)
            self.taken += 1
            waiting = self.waiting.pop(self.taken, None)
        return self.taken == self.num_parts


@dataclass
class Expected:
    """Takes tensors under their Hugging Face names, in any order, and holds the digests of every rank's parameters."""

    arch: Architecture
    ranks: int  # tensor-parallel size of a server
    kind: type[CpuDigest] | type[CudaDigest] = CpuDigest
    digests: list[dict[str, str]] = field(init=False)  # of each rank: SGLang's name -> digest
    _fused: dict[str, _Fused] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.digests = [{} for _ in range(self.ranks)]

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; it may be overwritten afterwards."""
        whole, place, num_parts = self._place(name)
        fused = self._fused.setdefault(whole, _Fused(num_parts, [self.kind() for _ in range(self.ranks)]))
        if fused.add(place, self._slices(name, tensor)):
            for digests, hashed in zip(self.digests, fused.hashes, strict=True):
                digests[whole] = hashed.value()
            del self._fused[whole]

    def _place(self, name: str) -> tuple[str, int, int]:
        """SGLang's name of the tensor that this one is a part of, which part, and how many there are."""
        if match := _EXPERT.fullmatch(name):
            assert self.arch.moe is not None
            stem, expert, kind = match[1], int(match[2]), match[3]
            if kind == "down":
                return f"{stem}.w2_weight", expert, self.arch.moe.num_experts
            return f"{stem}.w13_weight", 2 * expert + (kind == "up"), 2 * self.arch.moe.num_experts
        match = _LINEAR.fullmatch(name)
        if match is None or match[2] not in _FUSED or not self._is_fused(match[2]):
            return name, 0, 1
        whole, place, num_parts = _FUSED[match[2]]
        return f"{match[1]}.{whole}.{match[3]}", place, num_parts

    def _is_fused(self, linear: str) -> bool:
        """Latent attention fuses its down-projections, where queries have one, and nothing else."""
        if self.arch.mla is None or linear in ("gate_proj", "up_proj"):
            return True
        return self.arch.mla.query_rank is not None and linear in ("q_a_proj", "kv_a_proj_with_mqa")

    def _slices(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        """What each rank holds of a tensor."""
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            missing = -tensor.shape[0] % VOCABULARY_MULTIPLE
            padded = torch.nn.functional.pad(tensor, (0, 0, 0, missing)) if missing else tensor
            return list(padded.chunk(self.ranks))
        match = _LINEAR.fullmatch(name)
        linear = match[2] if match else ""
        if linear in ("k_proj", "v_proj") and self.ranks > self.arch.num_kv_heads:
            # Fewer key/value heads than ranks: neighbouring ranks hold the same head.
            copies = self.ranks // self.arch.num_kv_heads
            heads = tensor.chunk(self.arch.num_kv_heads)
            return [heads[rank // copies] for rank in range(self.ranks)]
        if linear in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "q_b_proj", "kv_b_proj"):
            return list(tensor.chunk(self.ranks))
        if linear in ("o_proj", "down_proj") and tensor.dim() == 2:  # split along the input dimension
            return list(tensor.chunk(self.ranks, dim=1))
        return [tensor] * self.ranks

    def compare(self, answers: list[dict[str, str]]) -> list[str]:
        """Names (with their rank) whose digest a server reports differently, lacks or has too much; empty if equal."""
        return list(self._differences(answers))

    def _differences(self, answers: list[dict[str, str]]) -> Iterator[str]:
        if len(answers) != self.ranks:
            yield f"{len(answers)} ranks answered, required {self.ranks}"
            return
        for name in sorted(self._fused):
            yield f"{name}: only some of its parts were sent"
        for rank, (expected, found) in enumerate(zip(self.digests, answers, strict=True)):
            where = f" (rank {rank})" if self.ranks > 1 else ""
            tied = {"lm_head.weight"} if self.arch.is_tied else set()
            for name in sorted((expected.keys() | found.keys()) - tied - self._fused.keys()):
                if name not in found:
                    yield f"{name}{where}: not reported"
                elif name not in expected:
                    yield f"{name}{where}: reported and not sent"
                elif expected[name] != found[name]:
                    yield f"{name}{where}: differs"
