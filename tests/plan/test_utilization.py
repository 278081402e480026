"""The work of a training step is what PyTorch counts of transformers' models; a utilization is over known peaks."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from r1engine.hf.architecture import read_architecture
from r1engine.plan.utilization import training_flops, utilization


def counted(model: torch.nn.Module, length: int) -> int:
    """Operations of a forward and a backward pass, by PyTorch; attention over all pairs of tokens."""
    counter = FlopCounterMode(display=False)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # PyTorch does not count grouped products
    with counter:
        model(torch.arange(length)[None]).logits.sum().backward()
    model.zero_grad()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3-moe", "deepseek", "moonlight"])
def test_the_work_is_what_pytorch_counts(folders, family):
    folder, model = folders[family]
    arch = read_architecture(folder)
    # a n + b n^2; the embedding is looked up and its gradient is not a product.
    short, long = counted(model, 8), counted(model, 16)
    square = (long - 2 * short) / (16**2 - 2 * 8**2)
    each = (short - square * 8**2) / 8
    # Causal: a token has half of the pairs, and itself.
    for lengths in ([8], [16, 3]):
        expected = sum(each * n + square * n * (n + 1) / 2 for n in lengths)
        assert training_flops(arch, lengths) == pytest.approx(expected, rel=1e-9)


def test_a_utilization_is_over_the_peak_of_the_data_sheet():
    # 989 TFLOP/s: two GPUs that did 989e12 operations in two seconds were used to a quarter.
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H800"):
        assert utilization(989e12, 2.0, 2, name) == pytest.approx(0.25)
    for name, tflops in {"NVIDIA H20": 148, "NVIDIA B200": 2250, "NVIDIA A100-SXM4-40GB": 312}.items():
        assert utilization(tflops * 1e12, 1.0, 1, name) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["", "NVIDIA H200 MIG 1g.18gb", "NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090"])
def test_a_device_without_a_known_peak_has_none(name):
    assert utilization(1e12, 1.0, 1, name) is None
