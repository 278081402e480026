"""The folder of the disk route: everything at first, then what changed, attention blocks in one piece."""

import pytest
import torch
from safetensors.torch import load_file

from r1engine.rollout.sglang.disk import WeightFolder

MLA = "model.layers.0.self_attn."


@pytest.fixture
def folder(folders, tmp_path):
    return WeightFolder(tmp_path / "weights", folders["deepseek"][0])


@pytest.fixture
def weights(folders):
    return {name: tensor.detach().clone() for name, tensor in folders["deepseek"][1].state_dict().items()}


def write(folder: WeightFolder, weights: dict, *, everything: bool = False) -> tuple[int, dict]:
    folder.clear()
    num_bytes = folder.write(iter(weights.items()), limit=20_000, everything=everything)
    files = sorted(folder.folder.glob("*.safetensors"))
    return num_bytes, {name: tensor for file in files for name, tensor in load_file(file).items()}


def size(tensors: dict) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_the_first_refresh_has_everything_and_the_model_beside_it(folder, weights, folders):
    num_bytes, found = write(folder, weights)
    assert num_bytes == size(weights) and found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert len(list(folder.folder.glob("*.safetensors"))) > 1  # files of bounded size
    source = folders["deepseek"][0]
    assert (folder.folder / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_then_only_what_changed(folder, weights):
    write(folder, weights)
    assert write(folder, weights) == (0, {})
    weights["model.norm.weight"][3] += 1e-6
    num_bytes, found = write(folder, weights)
    assert list(found) == ["model.norm.weight"] and num_bytes == size(found)
    assert write(folder, weights)[0] == 0
    assert write(folder, weights, everything=True)[0] == size(weights)


def test_an_attention_block_comes_all_or_not_at_all(folder, weights):
    write(folder, weights)
    weights[MLA + "q_a_proj.weight"][0, 0] += 1e-6
    _, found = write(folder, weights)
    assert found.keys() == {name for name in weights if name.startswith(MLA)}
