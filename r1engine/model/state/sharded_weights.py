"""This rank's part of the weights: read from a Hugging Face folder, gathered back to whole tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from r1engine.hf.architecture import Architecture
from r1engine.hf.folder import Folder
from r1engine.hf.tensors import SCORE, hf_shapes, is_float32, mtp_shapes
from r1engine.model.state.dealing import Lot, deal, in_turns
from r1engine.model.state.rules import WeightRule, mtp_rules, one_by_one, rules
from r1engine.ranks import World


class ShardedWeights:
    """The parameters, and the buffers that are part of the model, of all chunks of layers on this rank.

    Attributes:
        local: name with global layer numbers, and expert numbers where each expert has its own -> this rank's tensor.
    """

    def __init__(self, chunks: list[Any], model: Architecture, world: World, *, with_mtp: bool) -> None:
        self.model, self.world, self.has_mtp = model, world, with_mtp
        self._rules = rules(model) | (mtp_rules(model) if with_mtp else {})
        self._shapes = hf_shapes(model) | (mtp_shapes(model) if with_mtp else {})
        self.local: dict[str, torch.Tensor] = {}
        for chunk in chunks:
            self.local |= {self._global(name, chunk): tensor for name, tensor in _tensors(chunk)}
        # Name of a rule -> name in `local`, and which of its experts where it has those of all.
        self._held: dict[str, tuple[str, int | None]] = {}
        for name in self.local:
            names = one_by_one(name, self._experts)
            self._held |= {one: (name, None if one == name else i) for i, one in enumerate(names)}
        self._stage_of = self._find_stages()
        self._lots: list[tuple[Lot, int]] | None = None  # of this rank's stage, each with the rank that has it

    def _global(self, name: str, chunk: Any) -> str:
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + get_transformer_layer_offset(chunk.config, vp_stage=chunk.vp_stage))
        if "local_experts" in parts:
            at = parts.index("local_experts") + 1
            parts[at] = str(self._experts[int(parts[at])])
        return ".".join(parts)

    @property
    def _experts(self) -> range:
        """The routed experts of this rank."""
        count = self.model.moe.num_experts // self.world.ep_size if self.model.moe else 0
        return range(self.world.ep_rank * count, (self.world.ep_rank + 1) * count)

    def _own(self, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the rule `name` makes, of `local` or of tensors under the same names."""
        held, expert = self._held[name]
        return tensors[held] if expert is None else tensors[held][expert]

    def _rule(self, name: str) -> WeightRule:
        if self.model.is_tied and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"  # the last stage's copy of a tied weight
        return self._rules[name]

    def _find_stages(self) -> dict[str, int]:
        """Name -> the first pipeline stage that has it, experts of other ranks included."""
        names: list = [sorted(self._held)]
        if self.world.pp_size > 1:
            names = [None] * self.world.pp_size
            dist.all_gather_object(names, sorted(self._held), group=ps.get_pipeline_model_parallel_group())
        return {name: stage for stage in reversed(range(len(names))) for name in names[stage]}

    def _split(self, rule: WeightRule) -> tuple[int, int, dist.ProcessGroup | None]:
        """(this rank, number of ranks, their group) that a parameter is split over."""
        world = self.world
        if rule.dim is None:
            return 0, 1, None
        if rule.expert is not None:
            return world.etp_rank, world.etp_size, ps.get_expert_tensor_parallel_group()
        return world.tp_rank, world.tp_size, ps.get_tensor_model_parallel_group()

    # ------------------------------------------------------------------ in

    def load(self, folder: Folder, fresh: Collection[str] = ()) -> None:
        """Read what this rank holds, one tensor after the other, and nothing else.

        Args:
            folder: of the model.
            fresh:  Hugging Face names that it does not have: their parameters stay as they are.
        """
        for name in self._held:
            rule = self._rule(name)
            if not {*rule.hf} & {*fresh}:
                self._fill(self._own(name, self.local), rule, folder)

    def read(self, folder: Folder, model: Architecture) -> dict[str, torch.Tensor]:
        """What this rank would hold of another model, in host memory.

        Args:
            folder: of a model with the same layers; its head may be a score.
            model:  what it is.
        """
        found: dict[str, torch.Tensor] = {}
        for name, rule in rules(model).items():
            if name in self._held:
                held, _ = self._held[name]
                if held not in found:
                    own = self.local[held]
                    found[held] = torch.empty_like(own, device="cpu", pin_memory=own.is_cuda)
                self._fill(self._own(name, found), rule, folder)
            elif name == SCORE and "decoder.final_layernorm.weight" in self.local:  # the last stage
                norm = self.local["decoder.final_layernorm.weight"]
                found[name] = torch.empty(1, len(norm), dtype=norm.dtype, pin_memory=norm.is_cuda)
                self._fill(found[name], rule, folder)
        return found

    def _fill(self, tensor: torch.Tensor, rule: WeightRule, folder: Folder) -> None:
        """Read this rank's part of a parameter into `tensor`."""
        rank, ranks, _ = self._split(rule)
        slices = [folder.read(hf, self._index(rule, hf, rank, ranks)) for hf in rule.hf]
        whole = rule.fuse(slices)
        if whole.shape == tensor.shape:
            tensor.copy_(whole)
        else:  # the vocabulary is padded
            tensor.zero_()
            tensor[: len(whole)].copy_(whole)

    def _index(self, rule: WeightRule, hf: str, rank: int, ranks: int) -> tuple[slice, ...]:
        if rule.dim is None or ranks == 1:
            return ()
        shape = self._shapes[hf]
        before = tuple(slice(0, size) for size in shape[: rule.dim])
        return (*before, rule.slice_of(shape[rule.dim], rank, ranks))

    # ------------------------------------------------------------------ out

    def full(self, skip: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor), one at a time, on every rank. Collective.

        Shards are gathered, experts exchanged, and pipeline stages broadcast; a tensor is valid until the next one is
        asked for. The order is that of `rules`, but experts come by their place on their rank.

        Args:
            skip: Hugging Face names that nobody needs, the same on every rank.
        """
        for names in self._bundles():
            wanted = [hf for name in names for hf in self._rules[name].hf]
            if not all(hf in skip for hf in wanted):
                yield from zip(wanted, self._gather(names), strict=True)

    def dealt(self, skip: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor | None]]:
        """This rank's share of what `full` yields: over all ranks each tensor once. Collective.

        A tensor comes on a rank that holds it or a part of it; parts are gathered inside their tensor-parallel group.
        Shares are about equal, and the same every time. The attention of a layer comes in one piece. All ranks of a
        pipeline stage see the same names: None is what another one has. The owners take turns, so that after any
        number of tensors all have had about as much.

        Args:
            skip: Hugging Face names that nobody needs, the same on every rank.
        """
        if self._lots is None:
            self._lots = self._deal()
        for lot, owner in self._lots:
            for name in lot.names:
                rule = self._rules[name]
                if all(hf in skip for hf in rule.hf):
                    continue
                tensors = self._whole_on(owner, rule, name)
                for place, hf in enumerate(rule.hf):
                    yield hf, tensors[place] if tensors is not None else None

    def _deal(self) -> list[tuple[Lot, int]]:
        """The lots of this pipeline stage, each with the rank that makes it whole, in the order of `in_turns`."""
        places = self.world.everyones((self.world.pp_rank, self.world.ep_rank))
        own, _ = places[self.world.rank]
        holders: dict[int | None, list[int]] = {}  # of the experts of a rank; None: of everything else
        for rank, (stage, expert_rank) in enumerate(places):
            if stage == own:
                holders.setdefault(None, []).append(rank)
                holders.setdefault(expert_rank, []).append(rank)
        per_rank = self.model.moe.num_experts // self.world.ep_size if self.model.moe else 1
        lots: dict[str, Lot] = {}
        for name, rule in self._rules.items():
            stands_for = name  # the parameter of this rank that lies where it lies
            if rule.expert is not None:
                mine = rule.expert % per_rank + self.world.ep_rank * per_rank
                stands_for = name.replace(f"local_experts.{rule.expert}.", f"local_experts.{mine}.")
            if self._stage_of[stands_for] != self.world.pp_rank:
                continue
            key = name.split(".self_attention.")[0] + " attention" if ".self_attention." in name else name
            lot = lots.setdefault(key, Lot([], holders[None if rule.expert is None else rule.expert // per_rank]))
            lot.names.append(name)
            lot.size += sum(math.prod(self._shapes[hf]) for hf in rule.hf)
        return in_turns(list(zip(lots.values(), deal(list(lots.values())), strict=True)))

    def _whole_on(self, owner: int, rule: WeightRule, name: str) -> list[torch.Tensor] | None:
        """A parameter's Hugging Face tensors on the rank `owner`, None on others; with its group's other ranks."""
        _, ranks, group = self._split(rule)
        is_owner = owner == self.world.rank
        if rule.dim is None or ranks == 1:
            return self._cut(rule, rule.unfuse(self._own(name, self.local).detach())) if is_owner else None
        if owner not in dist.get_process_group_ranks(group):
            return None
        shard = self._own(name, self.local).detach().contiguous()
        shards = [torch.empty_like(shard) for _ in range(ranks)] if is_owner else None
        dist.gather(shard, shards, dst=owner, group=group)
        return self._joined(rule, shards) if shards is not None else None

    def _bundles(self) -> Iterator[list[str]]:
        """Names that are gathered together: one, or the same place of every expert-parallel rank."""
        ranks = self.world.ep_size
        for name, rule in self._rules.items():
            if rule.expert is None or ranks == 1:
                yield [name]
                continue
            assert self.model.moe is not None
            per_rank = self.model.moe.num_experts // ranks
            if rule.expert < per_rank:
                place = f"local_experts.{rule.expert}."
                yield [name.replace(place, f"local_experts.{rule.expert + r * per_rank}.") for r in range(ranks)]

    def _gather(self, names: list[str]) -> list[torch.Tensor]:
        """The Hugging Face tensors of a bundle, in its order."""
        own = names[self.world.ep_rank] if len(names) > 1 else names[0]
        tensors = None
        if own in self._held:
            tensors = self._whole(self._rules[own], self._own(own, self.local).detach())
            if len(names) > 1:
                tensors = self._exchange(tensors)
        if self.world.pp_size == 1:
            assert tensors is not None
            return tensors
        return self._from_stage(self._stage_of[own], names, tensors)

    def _whole(self, rule: WeightRule, shard: torch.Tensor) -> list[torch.Tensor]:
        _, ranks, group = self._split(rule)
        if rule.dim is None or ranks == 1:
            return self._cut(rule, rule.unfuse(shard))
        shards = [torch.empty_like(shard) for _ in range(ranks)]
        dist.all_gather(shards, shard.contiguous(), group=group)
        return self._joined(rule, shards)

    def _joined(self, rule: WeightRule, shards: list[torch.Tensor]) -> list[torch.Tensor]:
        """The Hugging Face tensors of a parameter, of the shards of all ranks."""
        assert rule.dim is not None
        return self._cut(rule, [torch.cat(parts, rule.dim) for parts in zip(*map(rule.unfuse, shards), strict=True)])

    def _cut(self, rule: WeightRule, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Without padding: only a padded vocabulary is longer than its Hugging Face tensor."""
        shapes = [self._shapes[hf] for hf in rule.hf]
        return [t[: shape[0]] if t.shape != shape else t for t, shape in zip(tensors, shapes, strict=True)]

    def _exchange(self, own: list[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors of all expert-parallel ranks, rank after rank."""
        gathered = []
        for tensor in own:
            parts = [torch.empty_like(tensor) for _ in range(self.world.ep_size)]
            dist.all_gather(parts, tensor.contiguous(), group=ps.get_expert_model_parallel_group())
            gathered.append(parts)
        return [part for parts in zip(*gathered, strict=True) for part in parts]

    def _from_stage(self, stage: int, names: list[str], tensors: list[torch.Tensor] | None) -> list[torch.Tensor]:
        """Broadcast from the first pipeline stage that has the tensors."""
        group = ps.get_pipeline_model_parallel_group()
        if stage != self.world.pp_rank or tensors is None:
            dtype, device = next(iter(self.local.values())).dtype, self.world.device
            sent = [hf for name in names for hf in self._rules[name].hf]
            types = [torch.float32 if is_float32(hf) else dtype for hf in sent]
            tensors = [torch.empty(self._shapes[hf], dtype=t, device=device) for hf, t in zip(sent, types, strict=True)]
        tensors = [t.contiguous() for t in tensors]
        for tensor in tensors:
            dist.broadcast(tensor, dist.get_global_rank(group, stage), group=group)
        return tensors


def _tensors(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and the experts' biases, which are buffers."""
    yield from chunk.named_parameters()
    yield from ((name, buffer) for name, buffer in chunk.named_buffers() if name.endswith("router.expert_bias"))
