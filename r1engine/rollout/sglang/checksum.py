"""What SGLang's /weights_checker must answer for given weights: its layout of tensors and its hash, computed here.

SGLang fuses what Hugging Face names separately: q, k, v into one matrix, gate and up into another; every
tensor-parallel rank holds a slice. A refresh is right when each rank's hash of each of its tensors
is the hash of the slice made here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from r1engine.architecture import Architecture

VOCABULARY_MULTIPLE = 64  # SGLang pads the rows of embedding and output matrix to it, with zeros
_FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
_PARTS = {"qkv_proj": 3, "gate_up_proj": 2}
_LINEAR = re.compile(r"(.*)\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.(weight|bias)$")
_ROW_SPLIT = re.compile(r"\.(o_proj|down_proj)\.weight$")  # split along the input dimension


def digest(tensor: torch.Tensor) -> str:
    """SGLang's hash of a tensor on a CPU: the first 8 bytes of SHA-256 over its bytes, as hexadecimal."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(data)).hexdigest()[:16]


@dataclass
class Expected:
    """Collects tensors under their Hugging Face names, and holds the digests of every rank's parameters."""

    arch: Architecture
    ranks: int  # tensor-parallel size of a server
    digests: list[dict[str, str]] = field(init=False)  # of each rank: SGLang's name -> digest
    _waiting: dict[str, dict[int, torch.Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.digests = [{} for _ in range(self.ranks)]

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; the parts of a fused one are kept until all are there."""
        match = _LINEAR.match(name)
        if match is None:
            self._finish(name, [self._slices(name, tensor)])
            return
        stem, linear, kind = match.groups()
        fused, position = _FUSED[linear]
        parts = self._waiting.setdefault(f"{stem}.{fused}.{kind}", {})
        parts[position] = tensor.detach().clone()
        if len(parts) == _PARTS[fused]:
            del self._waiting[f"{stem}.{fused}.{kind}"]
            slices = [self._slices(f"{stem}.{fused}.{kind}", parts[i], part=i) for i in range(len(parts))]
            self._finish(f"{stem}.{fused}.{kind}", slices)

    def _finish(self, name: str, parts: list[list[torch.Tensor]]) -> None:
        for rank in range(self.ranks):
            pieces = [part[rank] for part in parts]
            self.digests[rank][name] = digest(torch.cat(pieces) if len(pieces) > 1 else pieces[0])

    def _slices(self, name: str, tensor: torch.Tensor, part: int = 0) -> list[torch.Tensor]:
        """What each rank holds of a tensor."""
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            missing = -tensor.shape[0] % VOCABULARY_MULTIPLE
            padded = torch.nn.functional.pad(tensor, (0, 0, 0, missing)) if missing else tensor
            return list(padded.chunk(self.ranks))
        if ".qkv_proj." in name and part > 0 and self.ranks > self.arch.num_kv_heads:
            # Fewer key/value heads than ranks: neighbouring ranks hold the same head.
            copies = self.ranks // self.arch.num_kv_heads
            heads = tensor.chunk(self.arch.num_kv_heads)
            return [heads[rank // copies] for rank in range(self.ranks)]
        if ".qkv_proj." in name or ".gate_up_proj." in name:
            return list(tensor.chunk(self.ranks))
        if _ROW_SPLIT.search(name):
            return list(tensor.chunk(self.ranks, dim=1))
        return [tensor] * self.ranks

    def compare(self, answers: list[dict[str, str]]) -> list[str]:
        """Names (with their rank) whose digest a server reports differently, lacks or has too much; empty if equal."""
        return list(self._differences(answers))

    def _differences(self, answers: list[dict[str, str]]) -> Iterator[str]:
        if len(answers) != self.ranks:
            yield f"{len(answers)} ranks answered, required {self.ranks}"
            return
        for rank, (expected, found) in enumerate(zip(self.digests, answers, strict=True)):
            where = f" (rank {rank})" if self.ranks > 1 else ""
            tied = {"lm_head.weight"} if self.arch.is_tied else set()
            for name in sorted((expected.keys() | found.keys()) - tied):
                if name not in found:
                    yield f"{name}{where}: not reported"
                elif name not in expected:
                    yield f"{name}{where}: reported and not sent"
                elif expected[name] != found[name]:
                    yield f"{name}{where}: differs"
