"""Model folders and parallel sizes that cannot work are refused by name, before anything is built."""

import json
import shutil

import pytest
import torch
from model_folders import save_model
from safetensors.torch import load_file, save_file

from r1engine.architecture import check_layout, load_tokenizer, read_architecture
from r1engine.model.hf_weights import Folder, export_folder, hf_shapes
from r1engine.model.offload import Offloader
from r1engine.model.parallel import check_sizes


@pytest.fixture
def folder(folders, tmp_path):
    return shutil.copytree(folders["qwen2"][0], tmp_path / "model")


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel', required is one of Qwen2ForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', required is 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type 'yarn'"),
    ],
)
def test_unsupported_model_is_named(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_architecture(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        read_architecture(tmp_path / "nowhere")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no"):
        Folder(folder, read_architecture(folder))


def test_missing_unexpected_and_misshaped_tensors_are_all_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.bias"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        Folder(folder, read_architecture(folder))
    for part in ("1 missing (model.norm.weight)", "1 unexpected (model.norm.bias)", "lm_head.weight is (2, 2)"):
        assert part in str(error.value)


def test_shapes_are_those_of_transformers(folders):
    for folder, model in folders.values():
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        arch = read_architecture(folder)
        if arch.is_tied:
            del expected["lm_head.weight"]
        assert hf_shapes(arch) == expected


@pytest.mark.parametrize(
    ("tensor", "pipeline", "message"),
    [
        (3, 1, r"parallel.tensor: 3 does not divide the model's attention heads \(4\)"),
        (4, 1, r"parallel.tensor: 4 does not divide the model's key/value heads \(2\)"),
        (1, 3, "parallel.pipeline: 3 does not divide the model's 4 layers"),
    ],
)
def test_layout_that_does_not_divide_the_model_is_refused(folders, tensor, pipeline, message):
    with pytest.raises(ValueError, match=message):
        check_layout(read_architecture(folders["qwen2"][0]), tensor=tensor, pipeline=pipeline)


def test_sizes_that_do_not_fit_the_world_are_refused():
    with pytest.raises(ValueError, match=r"tensor=2 x pipeline=1 does not fit 3 processes"):
        check_sizes(3, 2, 1, None)
    with pytest.raises(ValueError, match=r"x data=2 does not fit 8 processes"):
        check_sizes(8, 2, 1, 2)
    check_sizes(8, 2, 2, 2)


def test_large_export_is_sharded_with_an_index(folders, tmp_path, monkeypatch):
    folder, model = folders["qwen2"]
    monkeypatch.setattr("r1engine.model.hf_weights.SHARD_BYTES", 20_000)
    export_folder(iter(model.state_dict().items()), folder, tmp_path / "out", is_writer=True)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    again = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_offloading_frees_storages_and_restores_every_view():
    flat = torch.arange(6.0)
    views = [flat[:2], flat[2:]]
    offloader = Offloader(lambda: [*views, torch.empty(0)], is_on=True)
    offloader.offload()
    assert flat.untyped_storage().nbytes() == 0
    offloader.restore()
    assert torch.equal(flat, torch.arange(6.0))
    assert views[1].data_ptr() == flat[2:].data_ptr()


def test_saved_models_have_distinct_norms(tmp_path):
    # The parity tests would not see two norms exchanged if all of them were ones.
    norms = [t for n, t in save_model(tmp_path, "qwen3").state_dict().items() if "norm" in n]
    assert not torch.equal(norms[0], norms[1])
