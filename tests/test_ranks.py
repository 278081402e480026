"""What ranks tell each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from r1engine import ranks as r
from r1engine.config import ConfigError


def exchange() -> None:
    world = r.start()
    assert world.from_first(lambda: world.rank) == 0
    assert world.everyones(world.rank * 10) == [0, 10]
    assert r.spread(list("abcde"), world, lambda own: [f"{item}{world.rank}" for item in own]) == [
        "a0",
        "b1",
        "c0",
        "d1",
        "e0",
    ]
    with pytest.raises(ConfigError, match="only the first knows"):
        world.from_first(refuse)
    world.wait()
    r.stop()


def refuse() -> None:
    raise ConfigError(["only the first knows"])


def test_ranks_share_what_one_knows_and_what_each_has():
    on_ranks(2, exchange)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def exchange_beside_a_gpu() -> list[str]:
    """The backends that carry objects where the ranks' device is called cuda and the default group stands for NCCL."""
    world, used = replace(r.start(), device=torch.device("cuda", 0)), []
    gather, broadcast = dist.all_gather_object, dist.broadcast_object_list

    def noted(call: Callable) -> Callable:
        def run(*arguments: object, group: dist.ProcessGroup | None = None, **options: object) -> None:
            used.append("the default group" if group in (None, dist.group.WORLD) else dist.get_backend(group))
            call(*arguments, group=group, **options)

        return run

    dist.all_gather_object, dist.broadcast_object_list = noted(gather), noted(broadcast)
    dist.gather_object = noted(dist.gather_object)

    def noted_pair(call: Callable) -> Callable:
        def run(tensor: torch.Tensor, rank: int, group: dist.ProcessGroup | None = None) -> dist.Work | None:
            used.append("the default group" if group in (None, dist.group.WORLD) else dist.get_backend(group))
            return call(tensor, rank, group)

        return run

    dist.isend, dist.irecv = noted_pair(dist.isend), noted_pair(dist.irecv)
    for _ in range(2):  # the group is made anew after a stop
        assert world.everyones(world.rank * 10) == [0, 10]
        assert world.from_first(lambda: world.rank) == 0
        assert world.at_first(world.rank) == ([0, 1] if world.is_first else [])
        other, place = 1 - world.rank, torch.zeros(3, dtype=torch.int16)
        world.exchange([(other, torch.full((3,), world.rank, dtype=torch.int16))], [(other, place)])
        assert place.tolist() == [other] * 3
        other_port = world.from_first(free_port)  # at the old one the store of the first rank may still be there
        r.stop()
        os.environ["MASTER_PORT"] = str(other_port)
        r.start()
    return used


def test_objects_stay_in_host_memory_beside_a_gpu():
    assert on_ranks(2, exchange_beside_a_gpu) == [["gloo"] * 12] * 2


@pytest.mark.parametrize(("visible", "shown"), [("4,5", "4,5"), (None, "not set")])
def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch, visible, shown):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name, value in {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = rf"found 2 GPUs \(CUDA_VISIBLE_DEVICES: {shown}\), required one for each of the 4 ranks of this node"
    with pytest.raises(RuntimeError, match=message):
        r.start()


def find_problems() -> tuple[list[str | None], list[bool]]:
    rank = r.start().rank
    found = [r.common_problem(own, 30) for own in ("no folder", None, "no folder" if rank == 1 else None)]
    first = [r.is_first_to("speak")]
    r.stop()
    return found, first


def test_a_problem_is_told_with_the_ranks_that_have_it_and_by_one_of_them():
    zero, one = on_ranks(2, find_problems)
    assert zero[0] == one[0] == ["no folder", None, "rank 1: no folder"]
    assert sorted(zero[1] + one[1]) == [False, True]


def test_restarted_ranks_see_nothing_of_their_predecessors(monkeypatch):
    store = dist.HashStore()
    for name, value in (("USE_AGENT_STORE", "True"), ("MAX_RESTARTS", "3"), ("RESTART_COUNT", "0")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    r._without_earlier_starts(store, 8).set("address", "of a rank that has ended")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not r._without_earlier_starts(store, 8).check(["address"])
    with pytest.raises(RuntimeError, match="required TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        r._without_earlier_starts(store, 16)  # two nodes, whose numbers of restarts may differ
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert r._without_earlier_starts(store, 16) is store


def test_a_single_rank_needs_no_process_group():
    world = r.World(0, 1, torch.device("cpu"))
    assert world.from_first(lambda: 3) == 3
    assert world.everyones(4) == [4]
    world.wait()
    with pytest.raises(ConfigError):
        world.from_first(refuse)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 5, 6])
def test_interleaving_undoes_the_shares(size, count):
    items = list(range(count))
    assert r.interleaved([items[rank::size] for rank in range(size)]) == items
