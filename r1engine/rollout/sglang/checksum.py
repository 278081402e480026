"""What SGLang's /weights_checker must answer for given weights: its layout of tensors, made here.

SGLang fuses what Hugging Face names separately: q, k, v into one matrix; gate and up into another; of latent attention
the two down-projections; all routed experts of a layer into two tensors. Every tensor-parallel rank holds a slice. A
refresh is right when each rank's hash of each of its tensors is the hash of the slice made here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from r1engine.hf.architecture import Architecture
from r1engine.hf.tensors import hf_shapes
from r1engine.rollout.sglang.delivery import ServerLayout
from r1engine.rollout.sglang.digest import CpuDigest, CudaDigest, Digest

VOCABULARY_MULTIPLE = 64  # SGLang pads the rows of embedding and output matrix to it, with zeros
_QKV, _HALVES = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_DOWN = ("q_a_proj", "kv_a_proj_with_mqa")  # in latent attention
_BY_ROWS = (*_QKV, *_HALVES, "q_b_proj", "kv_b_proj")  # linears: a rank has some of their outputs
_BY_COLUMNS = ("o_proj", "down_proj")  # a rank has some of their inputs


@dataclass(frozen=True)
class Part:
    """Where a Hugging Face tensor stands in SGLang's."""

    whole: str  # SGLang's name
    place: int = 0
    num_parts: int = 1


def parts(arch: Architecture) -> dict[str, Part]:
    """Hugging Face name -> its part, of every tensor of the model."""
    names = hf_shapes(arch).keys()
    found = {name: Part(name) for name in (*names, "lm_head.weight")}  # a tied model's trainer may send it all the same
    for layer in range(arch.num_layers):
        for whole, fused in _fusions(arch, f"model.layers.{layer}"):
            if names >= {*fused}:
                found |= {name: Part(whole, place, len(fused)) for place, name in enumerate(fused)}
    return found


def _fusions(arch: Architecture, layer: str) -> Iterator[tuple[str, list[str]]]:
    """SGLang's name of each fused tensor that a layer may have, and its parts in their order."""
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    for kind in ("weight", "bias"):
        yield f"{attention}.qkv_proj.{kind}", [f"{attention}.{linear}.{kind}" for linear in _QKV]
    yield f"{attention}.fused_qkv_a_proj_with_mqa.weight", [f"{attention}.{linear}.weight" for linear in _DOWN]
    for module in (mlp, f"{mlp}.shared_experts"):
        yield f"{module}.gate_up_proj.weight", [f"{module}.{linear}.weight" for linear in _HALVES]
    experts = [f"{mlp}.experts.{expert}" for expert in range(arch.moe.num_experts if arch.moe else 0)]
    yield f"{mlp}.experts.w13_weight", [f"{expert}.{linear}.weight" for expert in experts for linear in _HALVES]
    yield f"{mlp}.experts.w2_weight", [f"{expert}.down_proj.weight" for expert in experts]


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
    expert: int = 1  # expert-parallel size of a server
    digests: list[dict[str, str]] = field(init=False)  # of each rank: SGLang's name -> digest
    _parts: dict[str, Part] = field(init=False)
    _fused: dict[str, _Fused] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.digests = [{} for _ in range(self.ranks)]
        self._parts = parts(self.arch)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; it may be overwritten afterwards.

        Raises:
            ValueError: the model has no tensor of this name.
        """
        if name not in self._parts:
            raise ValueError(f"refresh: found {name}, required a tensor of the model")
        part = self._parts[name]
        fused = self._fused.setdefault(part.whole, _Fused(part.num_parts, [self.kind() for _ in range(self.ranks)]))
        self._add(part.whole, fused, part.place, self._slices(name, tensor))

    def _add(self, whole: str, fused: _Fused, place: int, slices: list[torch.Tensor]) -> None:
        if fused.add(place, slices):
            for digests, hashed in zip(self.digests, fused.hashes, strict=True):
                digests[whole] = hashed.value()
            del self._fused[whole]

    def loose(self) -> dict[str, dict[int, list[torch.Tensor]]]:
        """Parts that wait for others: SGLang's name -> place -> slices."""
        return {whole: fused.waiting for whole, fused in self._fused.items()}

    def complete(self, loose: list[dict[str, dict[int, list[torch.Tensor]]]]) -> None:
        """Add what other ranks have of fused tensors to those whose first part is here; theirs are the other ones."""
        for whole, fused in list(self._fused.items()):
            if not fused.taken:
                del self._fused[whole]
                continue
            for place, slices in (part for parts in loose for part in parts.get(whole, {}).items()):
                if place not in fused.waiting and place >= fused.taken:
                    self._add(whole, fused, place, slices)

    def take(self, digests: list[list[dict[str, str]]]) -> None:
        """Add the digests of other ranks' tensors."""
        for theirs in digests:
            for own, found in zip(self.digests, theirs, strict=True):
                own.update(found)

    def _slices(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        """What each rank holds of a tensor; nothing of an expert that others serve."""
        num_experts = self.arch.moe.num_experts if self.arch.moe else 0
        holders = ServerLayout((range(self.ranks),), num_experts, self.expert).holders(name)
        slices = self._split(name, tensor, len(holders))
        nothing = tensor.new_empty(0)
        return [slices[rank - holders.start] if rank in holders else nothing for rank in range(self.ranks)]

    def _split(self, name: str, tensor: torch.Tensor, ranks: int) -> list[torch.Tensor]:
        """A tensor as the ranks that need it hold it."""
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            missing = -tensor.shape[0] % VOCABULARY_MULTIPLE
            padded = torch.nn.functional.pad(tensor, (0, 0, 0, missing)) if missing else tensor
            return list(padded.chunk(ranks))
        linear = name.split(".")[-2]
        if linear in ("k_proj", "v_proj") and ranks > self.arch.num_kv_heads:
            # Fewer key/value heads than ranks: neighbouring ranks hold the same head.
            copies = ranks // self.arch.num_kv_heads
            heads = tensor.chunk(self.arch.num_kv_heads)
            return [heads[rank // copies] for rank in range(ranks)]
        if linear in _BY_ROWS:
            return list(tensor.chunk(ranks))
        if linear in _BY_COLUMNS and tensor.dim() == 2:
            return list(tensor.chunk(ranks, dim=1))
        return [tensor] * ranks

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
