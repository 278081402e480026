"""Where a GPU's model lives. The device "meta" stands for the GPU: what is made anywhere else is on the host."""

import pytest
import torch
from policies import policy_of

from r1engine.config import RlConfig
from r1engine.hf.architecture import read_architecture
from r1engine.model.layers.gpt import build
from r1engine.model.megatron_config import transformer_config
from r1engine.ranks import World


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


def test_float32_on_a_gpu_is_refused(folders):
    cfg = RlConfig(model={"path": folders["qwen3"][0], "dtype": "float32"})
    with pytest.raises(ValueError, match=r"model\.dtype: found float32 on a GPU, required bfloat16"):
        policy_of(cfg, World(rank=0, size=1, device=torch.device("cuda", 0)))
