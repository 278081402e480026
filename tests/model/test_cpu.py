"""The CPU stand-ins for CUDA: needed, sufficient (the other tests), and gone outside of `on_cpu`."""

import subprocess
import sys

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from r1engine.model import cpu
from r1engine.model.cpu import on_cpu, runs_on_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are active only without CUDA")


def test_cuda_means_cpu_inside_and_nothing_is_left_outside():
    before = (torch.cuda.current_device, torch.cuda.synchronize, megatron_random._get_cuda_rng_state)
    with on_cpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(2).cuda().device.type == "cpu"
        assert torch.cuda.current_device() == "cpu"
    assert torch.zeros(2).type() == "torch.FloatTensor"
    assert before == (torch.cuda.current_device, torch.cuda.synchronize, megatron_random._get_cuda_rng_state)
    with pytest.raises(AssertionError, match="CUDA"):
        torch.zeros(2, device="cuda")


def test_megatron_comes_without_inductor():
    code = "import sys, r1engine.model.policy; print('torch._inductor.lowering' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_an_error_inside_restores_too():
    before = torch.cuda.current_device

    @runs_on_cpu
    def broken():
        raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert torch.cuda.current_device is before


@pytest.mark.parametrize("name", ["current_device"])
def test_megatron_still_needs_the_stand_in(world, folders, monkeypatch, name):
    # When this fails after a Megatron upgrade, the entry in cpu.py can go.
    from policies import policy_of

    from r1engine.config import RlConfig

    kept = [entry for entry in cpu._patches() if entry[1] != name]
    monkeypatch.setattr(cpu, "_patches", lambda: kept)
    with pytest.raises((AssertionError, RuntimeError)):
        policy_of(RlConfig(model={"path": folders["qwen2"][0]}), world)
