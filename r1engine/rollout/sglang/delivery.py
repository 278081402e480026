"""Which rank of a server gets which tensors from which rank of the trainer (route `receivers`); pure functions.

A routed expert is needed by the ranks that serve it, everything else by all ranks of a server. Of each node the ranks
that need the same tensors get a chunk each over the network and pass it on to each other: a tensor crosses the network
once a node, however many of its GPUs need it. The chunks come from different ranks of the trainer, to which the one
that has the tensor scatters them once: else its adapter would carry them to every node of every server.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from r1engine.rollout.sglang.buckets import ATTENTION_BLOCK

ALIGNMENT = 16  # bytes; parcels and chunks begin at a multiple of it, and with it every tensor at one of its element
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Spec:
    """A tensor without its values."""

    name: str
    dtype: str  # of torch, such as "bfloat16"
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return getattr(torch, self.dtype).itemsize

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.itemsize


@dataclass(frozen=True)
class ServerLayout:
    """The ranks of a server and what they hold."""

    nodes: tuple[range, ...]  # its tensor-parallel ranks by node
    num_experts: int = 0  # routed ones of a layer
    expert: int = 1  # expert-parallel size: groups of ranks that the experts are spread over

    @property
    def ranks(self) -> int:
        return sum(map(len, self.nodes))

    def holders(self, name: str) -> range:
        """The ranks that need a Hugging Face tensor.

        Expert-parallel groups are of neighbouring ranks, each with the next num_experts / expert experts; the ranks of
        a group split every one of its experts between them, and SGLang takes the split itself (FusedMoE.weight_loader
        of 0.5.23, without redundant experts).
        """
        found = _EXPERT.search(name)
        if found is None:
            return range(self.ranks)
        group, size = int(found[1]) // (self.num_experts // self.expert), self.ranks // self.expert
        return range(group * size, (group + 1) * size)


@dataclass(frozen=True)
class Parcel:
    """Tensors of one rank of the trainer for the ranks of one node that all need them."""

    sender: int  # that has them
    sources: tuple[int, ...]  # the ranks of the trainer that each member's chunk comes from
    members: range  # ranks of the server
    specs: tuple[Spec, ...]  # end to end, wider elements first

    @cached_property
    def num_bytes(self) -> int:
        return _aligned(sum(spec.num_bytes for spec in self.specs))

    def chunk(self, place: int) -> slice:
        """The bytes that the member of this place gets from its source, and passes on."""
        size = _aligned(-(-self.num_bytes // len(self.members)))
        return slice(min(place * size, self.num_bytes), min((place + 1) * size, self.num_bytes))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def parcels(shares: Sequence[Sequence[Spec]], layout: ServerLayout) -> list[Parcel]:
    """The parcels of one round into a server, in an order that all ranks find alike.

    Args:
        shares: of each rank of the trainer, the tensors that it has in this round.
        layout: of the server.
    """
    found, senders = [], len(shares)
    for sender, specs in enumerate(shares):
        of_holders: dict[range, list[Spec]] = {}
        for spec in sorted(specs, key=lambda spec: -spec.itemsize):
            of_holders.setdefault(layout.holders(spec.name), []).append(spec)
        for holders, own in of_holders.items():
            for node in layout.nodes:
                members = range(max(holders.start, node.start), min(holders.stop, node.stop))
                if members:
                    sources = tuple((sender + place) % senders for place in range(len(members)))
                    found.append(Parcel(sender, sources, members, tuple(own)))
    return found


def rounds(
    weights: Iterable[tuple[str, torch.Tensor | None]], sizes: Mapping[str, int], layout: ServerLayout, limit: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Copies of this rank's tensors, cut so that no rank of a server gets more than `limit` bytes in a round.

    A single larger tensor comes alone, and the tensors of an attention block come together, even past the limit. Ranks
    that see the same names cut at the same ones, so that a tensor that they gather together is gathered by all.

    Args:
        weights: (Hugging Face name, tensor that is valid until the next one is asked for, None: another rank has it).
        sizes:   name -> bytes on the server, scales included; what is not in it goes with the tensor before.
        layout:  of a server.
        limit:   bytes that a rank of a server gets at once.
    """
    own: list[tuple[str, torch.Tensor]] = []
    room, last_block = [0] * layout.ranks, None
    for name, tensor in weights:
        if name in sizes:
            block = match[1] if (match := ATTENTION_BLOCK.match(name)) else None
            holders = layout.holders(name)
            is_full = max(room[rank] for rank in holders) + sizes[name] > limit
            if any(room) and is_full and (block is None or block != last_block):
                yield own
                own, room = [], [0] * layout.ranks
            for rank in holders:
                room[rank] += sizes[name]
            last_block = block
        if tensor is not None:
            own.append((name, tensor.detach().clone()))
    if any(room):
        yield own


@dataclass(frozen=True)
class Flows:
    """Bytes that cross the network for one server."""

    # By each rank of the trainer; what they scatter to each other, once for all servers, is not counted.
    sent: list[int]
    received: list[int]  # by each rank of the server; what is passed on inside a node is not counted


def flows(sent: Iterable[Parcel], senders: int, layout: ServerLayout) -> Flows:
    """Of all these parcels."""
    counted = Flows([0] * senders, [0] * layout.ranks)
    for parcel in sent:
        for place, member in enumerate(parcel.members):
            chunk = parcel.chunk(place)
            counted.sent[parcel.sources[place]] += chunk.stop - chunk.start
            counted.received[member] += chunk.stop - chunk.start
    return counted
