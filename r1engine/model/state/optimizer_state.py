"""Adam's state as one tensor a parameter, whatever optimizer holds it and however the ranks share it out.

Megatron writes another tree for each of its optimizer classes, shaped by the layout of the ranks. Here the state of a
parameter has the parameter's own name and shape, so that any layout can read what any other wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from r1engine.model.state.host_optimizer import HostAdam, Place

Shard: TypeAlias = ShardedTensor | ShardedTensorFactory
MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "param"
PIECE = 1 << 26  # elements that ranks put together at once


@dataclass(frozen=True)
class Held:
    """What this rank's optimizer has of a parameter."""

    parameter: torch.nn.Parameter  # the model's, this rank's whole shard
    main: torch.Tensor | None  # what Adam updates: all of it or a flat part; None where other ranks have all of it
    part: slice  # which elements `main` has
    group: dist.ProcessGroup | None  # the ranks that share it out; None: each has all of it
    inner: torch.optim.Optimizer
    is_on_host: bool = False  # main and its state, of a model that may be on a GPU

    def fields(self) -> tuple[str, ...]:
        """The tensors that a checkpoint needs: float32 weights are their own master copy."""
        return MOMENTS if self.parameter.dtype == torch.float32 else (MASTER, *MOMENTS)

    def tensor(self, field: str) -> torch.Tensor | None:
        """This rank's elements of a field."""
        if self.main is None:
            return None
        return self.main.detach() if field == MASTER else self.inner.state[self.main][field]


def held(optimizer: MegatronOptimizer) -> Iterator[Held]:
    """Every parameter of this rank's model, in the same order on the ranks that share it."""
    for one in _parts(optimizer):
        for item in _held(one):
            if isinstance(item.inner, HostAdam):
                inner, main = (None, None) if item.main is None else item.inner.holder(item.main)
                item = replace(item, main=main, inner=inner, is_on_host=True)
            yield item


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _held(one: MegatronOptimizer) -> Iterator[Held]:
    if isinstance(one, DistributedOptimizer):
        yield from _distributed(one)
    elif isinstance(one, Float16OptimizerWithFloat16Params):
        pairs = [*zip(one.float16_groups, one.fp32_from_float16_groups, strict=True)]
        pairs += [(group, group) for group in one.fp32_from_fp32_groups]
        for parameters, mains in pairs:
            for parameter, main in zip(parameters, mains, strict=True):
                yield Held(parameter, main, slice(None), None, one.optimizer)
    else:
        for parameter in one.get_parameters():
            yield Held(parameter, parameter, slice(None), None, one.optimizer)


def _distributed(one: DistributedOptimizer) -> Iterator[Held]:
    for buffer in one.buffers:
        for parameter in buffer.param_index_map:
            main, part = None, slice(0, 0)
            if parameter in one.model_param_group_index_map:
                group, index = one.model_param_group_index_map[parameter]
                span = one._get_model_param_range_map(parameter)["param"]
                main, part = one.optimizer.param_groups[group]["params"][index], slice(span.start, span.end)
            yield Held(parameter, main, part, one.data_parallel_group, one.optimizer)


def move_to_host(optimizer: MegatronOptimizer) -> None:
    """Keep masters and moments in host memory from here on, before the first update; see `HostAdam`."""
    for one in _parts(optimizer):
        if one.optimizer is None:  # no parameter of its kind on this rank
            continue
        places = [
            Place(item.main, partial(_weight, item.parameter, item.part))
            for item in _held(one)
            if item.main is not None
        ]
        one.optimizer = host = HostAdam(one.optimizer.param_groups, places)
        # Megatron's copies between the weights and its masters on the device, which are gone.
        one._copy_main_params_to_model_params = lambda: None
        one.reload_model_params = lambda host=host, state_dict=None: host.read()


def fuse(optimizer: MegatronOptimizer) -> None:
    """Where PyTorch's Adam updates on a GPU: by its fused kernel, which makes no temporaries of the model's size."""
    for one in _parts(optimizer):
        for group in one.optimizer.param_groups if isinstance(one.optimizer, torch.optim.AdamW) else ():
            group |= {"fused": True, "foreach": False}


def _weight(parameter: torch.nn.Parameter, part: slice) -> torch.Tensor:
    return parameter.data.view(-1)[part]


def step_count(optimizer: MegatronOptimizer) -> int:
    """Updates made so far: 0 where the optimizer has no state yet."""
    counts = [0]
    for item in held(optimizer):
        if item.main is not None and item.main in item.inner.state:
            state = item.inner.state[item.main]
            counts.append(int(state["step"]) if "step" in state else item.inner.param_groups[0]["step"])
    return max(counts)


# ------------------------------------------------------------------ out


def written_shards(optimizer: MegatronOptimizer, shards: dict[torch.Tensor, Shard]) -> dict[str, Shard]:
    """What this rank writes, under names of its own. Collective.

    A parameter that data-parallel ranks share out is put together on one of them, in host memory, each parameter on
    the next rank.

    Args:
        optimizer: has made a step.
        shards:    parameter -> Megatron's description of this rank's shard of it.
    """
    found: dict[str, Shard] = {}
    for index, item in enumerate(held(optimizer)):
        shard = shards[item.parameter]
        if any(shard.replica_id[:-1]):
            continue  # another tensor or pipeline rank writes the same
        ranks = item.group.size() if item.group is not None else 1
        owner = index % ranks
        is_owner = item.group.rank() == owner if item.group is not None else shard.replica_id[-1] == 0
        for field in item.fields():
            whole = _whole(item, field, owner)
            if is_owner:
                assert whole is not None
                entry = _entry(shard, field, whole.view_as(item.parameter))
                found[f"{index}.{field}"] = replace(entry, replica_id=(*shard.replica_id[:-1], 0))
    return found


def _whole(item: Held, field: str, owner: int) -> torch.Tensor | None:
    """A field of the whole shard, flat, in host memory on the owner; None on the other ranks that share it out."""
    own = item.tensor(field)
    if item.group is None:
        assert own is not None
        return own.flatten().cpu()
    size, part = item.parameter.numel(), item.part
    whole = torch.empty(size) if item.group.rank() == owner else None
    for start in range(0, size, PIECE):  # so that the device needs no room for the whole
        end = min(start + PIECE, size)
        first, last = max(start, part.start), min(end, part.stop)
        piece = torch.zeros(end - start, device=item.parameter.device)
        if own is not None and first < last:
            piece[first - start : last - start] = own.flatten()[first - part.start : last - part.start]
        # As integers, so that a sum with zeros keeps every bit.
        dist.reduce(piece.view(torch.int32), dist.get_global_rank(item.group, owner), group=item.group)
        if whole is not None:
            whole[start:end] = piece
    return whole


def _entry(shard: Shard, field: str, data: torch.Tensor) -> Shard:
    changes: dict[str, Any] = {"key": f"optimizer.{field}.{shard.key}", "data": data}
    if isinstance(shard, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(shard, **changes)


# ------------------------------------------------------------------ in


def wanted_shards(optimizer: MegatronOptimizer, shards: dict[torch.Tensor, Shard]) -> dict[str, Shard]:
    """What this rank reads: the fields of the parameters that its optimizer has a part of, into host memory."""
    found: dict[str, Shard] = {}
    for index, item in enumerate(held(optimizer)):
        if item.main is not None:
            for field in item.fields():
                found[f"{index}.{field}"] = _entry(shards[item.parameter], field, torch.zeros(item.parameter.shape))
    return found


def restore(optimizer: MegatronOptimizer, read: dict[str, torch.Tensor], step: int) -> None:
    """Put what was read for `wanted_shards` into the optimizer, and the number of updates made."""
    for index, item in enumerate(held(optimizer)):
        if item.main is None:
            continue
        state = item.inner.state[item.main]
        for field in item.fields():
            values = read[f"{index}.{field}"].flatten()[item.part].view_as(item.main).to(item.main.device)
            if field == MASTER:
                item.main.data.copy_(values)
            else:
                state[field] = values.clone()
        if isinstance(item.inner, torch.optim.Adam):
            is_fused = bool(item.inner.param_groups[0]["fused"])  # its kernel reads the number on the device
            state["step"] = torch.tensor(float(step), device=item.main.device if is_fused else "cpu")
        else:  # Transformer Engine's counts in the group
            for group in item.inner.param_groups:
                group["step"] = step
