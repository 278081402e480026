"""A refresh by all ranks of a trainer: each sends its share. The servers are stand-ins (weight_server.py); real ones
are in test_real_moe.py."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch
from model_folders import save_model
from ranks import on_ranks
from safetensors.torch import load_file
from weight_server import WeightServer

from r1engine.config import RlConfig
from r1engine.hf.architecture import read_architecture
from r1engine.model.parallel import join, leave
from r1engine.model.policy import Policy
from r1engine.rollout import BrokenOff
from r1engine.rollout.sglang.client import Client
from r1engine.rollout.sglang.delivery import ServerLayout
from r1engine.rollout.sglang.digest import CpuDigest
from r1engine.rollout.sglang.disk import WeightFolder
from r1engine.rollout.sglang.dispatch import Endpoint
from r1engine.rollout.sglang.refresh import Refresher, Report

SERVER_RANKS = 2
ROUTES = ("tensor", "distributed", "disk")


@pytest.fixture
def model(tmp_path) -> Path:
    save_model(tmp_path / "model", "deepseek")
    return tmp_path / "model"


@pytest.fixture
def servers(model):
    started = [WeightServer(read_architecture(model), SERVER_RANKS) for _ in range(3 * 2)]
    yield started
    for server in started:
        server.close()


def refreshes(folder: Path, urls: dict[str, list[str]], out: Path, count: int) -> dict[str, list]:
    """What a rank tells of `count` refreshes by each route to its servers: (report, versions of the servers)."""
    # Of two ranks: each has half of the dense part and half of the experts, which are one parameter of each matrix.
    cfg = RlConfig(model={"path": folder, "experts": "fused"}, parallel={"tensor": 2, "expert": 2})
    world = join(cfg.parallel)
    policy = Policy(cfg.model, cfg.parallel, cfg.optimizer, world)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # as under torchrun: groups have their own
    told: dict[str, list] = {}
    for route, own in urls.items():
        refresher = Refresher(
            [Endpoint(Client(url, stall_seconds=30.0)) for url in own],
            read_architecture(folder),
            world,
            layout=ServerLayout((range(SERVER_RANKS),)),
            route=route,
            bucket_bytes=20_000,
            folder=WeightFolder(out, folder),
            digest=CpuDigest,
        )
        for version in range(1, count + 1):
            report = _refresh(refresher, policy, version)
            told.setdefault(route, []).append((report, [e.version for e in refresher.endpoints]))
        refresher.close()
    leave()
    return told


def _refresh(refresher: Refresher, policy: Policy, version: int) -> Report:
    while True:
        with contextlib.suppress(BrokenOff):
            return refresher.refresh(policy.weights(dealt=True), version)


def num_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_each_rank_sends_its_share_and_the_servers_hold_the_whole(model, servers, tmp_path):
    whole = load_file(model / "model.safetensors")
    of_route = {route: servers[2 * i : 2 * i + 2] for i, route in enumerate(ROUTES)}
    urls = {route: [server.url for server in own] for route, own in of_route.items()}
    told = on_ranks(2, refreshes, model, urls, tmp_path / "weights", 2)
    for server in servers:
        assert server.problems == []
        assert server.tensors.keys() == whole.keys()
        assert all(torch.equal(server.tensors[name], tensor) for name, tensor in whole.items())
        assert server.calls["/weights_checker"] == 2 and not server.groups
    for route in ROUTES:
        for own in told:
            first, second = (report for report, _ in own[route])
            assert first.num_bytes == num_bytes(whole)
            assert first.most_bytes < 0.51 * first.num_bytes
            assert second.num_bytes == (0 if route == "disk" else first.num_bytes)
            assert [versions for _, versions in own[route]] == [[1, 1], [2, 2]]


@pytest.mark.rotating
def test_a_server_that_ends_in_a_broadcast_is_left_out_and_the_other_gets_the_weights(model, servers, tmp_path):
    whole = load_file(model / "model.safetensors")
    left, ends = servers[:2]
    ends.fault = lambda path, number: path == "/update_weights_from_distributed" and number >= 5
    told = on_ranks(2, refreshes, model, {"distributed": [left.url, ends.url]}, tmp_path / "weights", 2)
    assert all(torch.equal(left.tensors[name], tensor) for name, tensor in whole.items())
    for own in told:
        assert [versions for _, versions in own["distributed"]] == [[1, None], [2, None]]
    assert left.calls["/continue_generation"] == 2  # never with half of the weights
