"""Where a GPU's model lives. The device "meta" stands for the GPU: what is made anywhere else is on the host."""

import pytest
import torch

from r1engine.config import RlConfig
from r1engine.hf.architecture import read_architecture
from r1engine.model.layers.gpt import build
from r1engine.model.megatron_config import transformer_config


@pytest.mark.parametrize("experts", ["megatron", "fused"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe", "deepseek", "moonlight"])
def test_every_tensor_of_a_built_model_is_on_the_device(world, folders, monkeypatch, family, experts):
    arch = read_architecture(folders[family][0])
    if experts == "fused" and arch.moe is None:
        pytest.skip("has no experts")
    cfg = RlConfig(model={"path": folders[family][0], "experts": experts})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "meta")
    monkeypatch.setattr(torch.cuda, "Stream", lambda *arguments, **options: None)
    config = transformer_config(arch, cfg.model, cfg.parallel, dtype=torch.bfloat16, on_cpu=False)
    config.perform_initialization = False
    gpt = build(arch, config, 1.0, experts=experts)
    held = [*gpt.named_parameters(), *gpt.named_buffers()]
    assert [name for name, tensor in held if tensor.device.type != "meta"] == []
