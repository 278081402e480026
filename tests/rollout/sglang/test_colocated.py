"""Servers that share their GPU with the trainer: who has the memory when. The server is a stand-in with SGLang's rules
about released memory (tests/support/sleeping_server.py), the device is called cuda and is none."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sleeping_server
import torch
from ranks import on_ranks

from r1engine.batch import PackedBatch, Prompt
from r1engine.config import RlConfig, Sglang
from r1engine.data.question import Question
from r1engine.ranks import World, start, stop
from r1engine.rollout.draft import Sampling, new_drafts
from r1engine.rollout.sglang import launch
from r1engine.rollout.sglang.generator import SglangGenerator

GPU = World(rank=0, size=1, device=torch.device("cuda", 0))


def config(folders, tmp_path: Path) -> RlConfig:
    sglang = {"python": sys.executable, "start_seconds": 60, "stall_seconds": 30}
    # With experts no digests are asked for, which only a GPU computes.
    model = {"path": folders["qwen3-moe"][0], "routing_replay": False}
    data, rollout = {"max_prompt_tokens": 32}, {"engine": "sglang", "sglang": sglang, "max_tokens": 8}
    return RlConfig(run_dir=tmp_path, model=model, data=data, rollout=rollout)


@pytest.fixture
def generator(folders, tmp_path, monkeypatch) -> Iterator[SglangGenerator]:
    command = launch.command
    server = [sys.executable, sleeping_server.__file__]
    monkeypatch.setattr(launch, "command", lambda *a, **options: [*server, *command(*a, **options)[3:]])
    monkeypatch.setattr(launch, "check_environment", lambda python: "0.5.23")
    monkeypatch.setattr(PackedBatch, "to", lambda row, device: row)
    made = SglangGenerator(config(folders, tmp_path), GPU, dtype=torch.bfloat16, note=print)
    try:
        yield made
    finally:
        made.close()


def state(generator: SglangGenerator) -> tuple[list[str], list[str]]:
    """The faults of the server so far, and what it has given back."""
    answer = generator.endpoints[0].client.get("/faults")
    return answer["faults"], answer["released"]


def refresh(generator: SglangGenerator, weights: dict[str, torch.Tensor]) -> None:
    generator.load_weights(iter(weights.items()))
    generator.verify(lambda rows: [row.rollout_logp for row in rows], row_multiple=1)


def draw(generator: SglangGenerator) -> list[list[int]]:
    drafts = new_drafts([Prompt(0, [5, 6, 7], "", Question(""))], num_samples=2, step=0, max_tokens=4)
    with generator.awake():
        generator.draw(drafts, Sampling())
    return [draft.tokens for draft in drafts]


@pytest.fixture
def weights(folders) -> dict[str, torch.Tensor]:
    return {"model.norm.weight": torch.ones(8), "model.embed_tokens.weight": torch.ones(8, 4)}


def test_a_server_computes_only_with_all_of_its_memory_and_with_weights(generator, weights):
    everything = ["cuda_graph", "kv_cache", "weights"]
    assert state(generator) == ([], everything)  # before the policy is built
    for _ in range(2):
        refresh(generator, weights)
        assert state(generator) == ([], everything)
        assert draw(generator) == draw(generator)  # an evaluation, then a rollout, without a refresh between them
        assert state(generator) == ([], everything)


def test_a_server_that_failed_is_back_before_the_policy_needs_the_memory(generator, weights):
    refresh(generator, weights)
    fleet = generator._fleet
    with pytest.raises(RuntimeError, match="no server"), generator.awake():
        os.killpg(fleet._server.process.pid, signal.SIGKILL)
        fleet._server.process.wait()
        generator.draw(new_drafts([Prompt(0, [5], "", Question(""))], num_samples=1, step=0, max_tokens=4), Sampling())
    started = fleet._server.process.pid
    assert state(generator) == ([], ["cuda_graph", "kv_cache", "weights"])
    refresh(generator, weights)  # the policy is awake: nothing may start now
    assert fleet._server.process.pid == started
    assert len(draw(generator)) == 2
    assert state(generator)[0] == []


def test_servers_over_several_nodes_are_refused_before_one_starts(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    world = World(rank=8, size=16, device=torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"found colocated with 8 of 16 ranks on this node, required a single node"):
        SglangGenerator(config(folders, tmp_path), world, dtype=torch.bfloat16, note=print)


def start_on_two_nodes(cfg: RlConfig) -> str:
    """Two ranks of a launcher that says nothing of nodes."""
    world = start()
    del os.environ["LOCAL_WORLD_SIZE"]
    socket.gethostname = lambda: f"node{world.rank}"
    try:
        SglangGenerator(cfg, world, dtype=torch.bfloat16, note=print)
    except ValueError as error:
        return str(error)
    finally:
        stop()
    return "started"


def test_nodes_are_told_apart_by_their_names_where_no_launcher_does(folders, tmp_path):
    for message in on_ranks(2, start_on_two_nodes, config(folders, tmp_path)):
        assert "found colocated with 1 of 2 ranks on this node, required a single node" in message


@pytest.mark.parametrize(
    ("visible", "devices", "given"),
    [
        (None, [0, 1], "0,1"),
        ("4,5,6,7", [2, 3], "6,7"),
        ("4, 5", [0, 1], "4,5"),
        ("GPU-8a,GPU-3f", [1], "GPU-3f"),
        ("MIG-1c,MIG-GPU-8a/1/0", [1], "MIG-GPU-8a/1/0"),
        ("2,3,-1,4", [0, 1], "2,3"),
    ],
)
def test_a_server_gets_the_gpus_that_the_trainer_means(monkeypatch, visible, devices, given):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launch.environment(Sglang(), devices=devices)["CUDA_VISIBLE_DEVICES"] == given


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("4,5", 2), ("4,-1,5", 1), (" ", 0)])
def test_a_server_gets_no_gpu_that_the_trainer_does_not_see(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=rf"'{visible}' with {count} GPUs, required 3 for the trainer and its servers"):
        launch.environment(Sglang(), devices=[1, 2])
