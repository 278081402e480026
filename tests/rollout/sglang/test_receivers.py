"""The route `receivers`: every rank of a trainer sends to a process beside each rank of a server. The servers are
stand-ins (weight_server.py), the processes are the real ones; real servers are in test_real_receivers.py."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from model_folders import save_model
from ranks import beside, on_ranks
from real import KEY
from safetensors.torch import load_file
from weight_server import WeightServer

from r1engine.config import RlConfig
from r1engine.hf.architecture import read_architecture
from r1engine.model.parallel import join, leave
from r1engine.model.policy import Policy
from r1engine.rollout import BrokenOff
from r1engine.rollout.sglang.client import Client, ServerError
from r1engine.rollout.sglang.delivery import ServerLayout
from r1engine.rollout.sglang.digest import CpuDigest
from r1engine.rollout.sglang.disk import WeightFolder
from r1engine.rollout.sglang.dispatch import Endpoint
from r1engine.rollout.sglang.receiver import receiving
from r1engine.rollout.sglang.refresh import Refresher
from r1engine.rollout.sglang.server import free_ports


def receiver(port: int) -> None:
    receiving("127.0.0.1", port, KEY, torch.device("cpu")).serve_forever()


@contextlib.contextmanager
def receivers(count: int) -> Iterator[tuple[list[str], list[BaseProcess]]]:
    """URLs and processes."""
    ports = free_ports(count)
    with beside(receiver, [(port,) for port in ports]) as processes:
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        for url in urls:
            while not Client(url, stall_seconds=5.0).answers():
                time.sleep(0.05)
        yield urls, processes


def refreshes(folder: Path, urls: list[tuple[str, list[str]]], sizes: dict, expert: int, count: int) -> list:
    """What a rank tells of `count` refreshes: (report, versions of the servers)."""
    cfg = RlConfig(model={"path": folder}, parallel=sizes)
    world = join(cfg.parallel)
    policy = Policy(cfg.model, cfg.parallel, cfg.optimizer, world)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # as under torchrun: groups have their own
    arch = read_architecture(folder)
    ends = [
        Endpoint(
            Client(url, stall_seconds=60.0, key=KEY), receivers=[Client(u, stall_seconds=60.0, key=KEY) for u in own]
        )
        for url, own in urls
    ]
    layout = ServerLayout((range(len(ends[0].receivers)),), arch.moe.num_experts if arch.moe else 0, expert)
    refresher = Refresher(
        ends,
        arch,
        world,
        layout=layout,
        route="receivers",
        bucket_bytes=100_000,
        folder=WeightFolder(folder / "unused", folder),
        digest=CpuDigest,
    )
    told = []
    for version in range(1, count + 1):
        while True:
            with contextlib.suppress(BrokenOff):
                report = refresher.refresh(policy.weights(dealt=True), version)
                break
        told.append((report, [e.version for e in ends]))
    refresher.close()
    leave()
    return told


@pytest.fixture
def servers():
    started: list[WeightServer] = []
    yield started
    for server in started:
        server.close()


@pytest.mark.parametrize(
    ("family", "sizes", "ranks", "expert"),
    [
        ("deepseek", {"tensor": 2, "expert": 2}, 2, 2),
        ("qwen3-moe", {"pipeline": 2}, 2, 2),
        ("qwen2", {"tensor": 2}, 2, 1),
    ],
)
def test_every_server_rank_gets_what_it_serves_and_the_network_carries_it_once(
    tmp_path, servers, family, sizes, ranks, expert
):
    save_model(tmp_path, family)
    arch = read_architecture(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    servers += [WeightServer(arch, ranks, expert=expert) for _ in range(2)]
    with receivers(ranks * len(servers)) as (urls, _):
        ends = [(s.url, urls[ranks * i : ranks * (i + 1)]) for i, s in enumerate(servers)]
        told = on_ranks(2, refreshes, tmp_path, ends, sizes, expert, 2)
    layout = ServerLayout((range(ranks),), arch.moe.num_experts if arch.moe else 0, expert)
    for server in servers:
        assert server.problems == []
        for rank, held in enumerate(server.held):
            assert held.keys() == {name for name in whole if rank in layout.holders(name)}
            assert all(torch.equal(held[name], whole[name]) for name in held)
        assert server.calls["/update_weights_from_tensor"] >= 4 and server.calls["/weights_checker"] == 2
    num_bytes = sum(t.numel() * t.element_size() for t in whole.values())
    for own in told:
        for version, (report, versions) in enumerate(own, 1):
            assert versions == [version, version] and report.num_bytes == num_bytes
            assert report.most_bytes < 0.6 * num_bytes and report.most_received < 0.6 * num_bytes


@pytest.mark.rotating
def test_a_receiver_that_ends_takes_its_server_out_and_no_other(tmp_path, servers):
    save_model(tmp_path, "deepseek")
    whole = load_file(tmp_path / "model.safetensors")
    servers += [WeightServer(read_architecture(tmp_path), 2, expert=2) for _ in range(2)]
    with receivers(4) as (urls, processes):

        def fault(path: str, number: int) -> bool:
            if path == "/update_weights_from_tensor" and number == 2:
                os.kill(processes[3].pid, signal.SIGKILL)
            return False

        servers[1].fault = fault
        ends = [(servers[0].url, urls[:2]), (servers[1].url, urls[2:])]
        told = on_ranks(2, refreshes, tmp_path, ends, {"tensor": 2, "expert": 2}, 2, 2)
    for own in told:
        assert [versions for _, versions in own] == [[1, None], [2, None]]
    assert all(torch.equal(servers[0].tensors[name], tensor) for name, tensor in whole.items())
    assert servers[0].calls["/continue_generation"] == 2  # never with half of the weights
    assert servers[1].calls["/continue_generation"] == 0


def test_a_receiver_obeys_nobody_without_the_key():
    with receivers(1) as ((url,), _):
        for key in ("", "another"):
            with pytest.raises(ServerError, match="401"):
                Client(url, stall_seconds=5.0, key=key).post("/leave", {})
        Client(url, stall_seconds=5.0, key=KEY).post("/leave", {})
        with pytest.raises(ServerError, match="is in no group"):
            Client(url, stall_seconds=5.0, key=KEY).post(
                "/receive", {"round": 0, "first": 1, "place": 0, "parcels": []}
            )
