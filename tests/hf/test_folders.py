"""Model folders and parallel sizes that cannot work are refused by name, before anything is built."""

import json
import shutil

import pytest
import torch
from model_folders import save_model
from safetensors.torch import load_file, save_file

from r1engine.config import Parallel
from r1engine.hf.architecture import read_architecture
from r1engine.hf.folder import Folder
from r1engine.hf.layout import check_layout, check_sizes
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.model.state.offload import Offloader


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


LAYOUTS = [
    ("qwen2", {"tensor": 3}, r"parallel.tensor: 3 does not divide the model's attention heads \(4\)"),
    ("qwen2", {"tensor": 4}, r"parallel.tensor: 4 does not divide the model's key/value heads \(2\)"),
    ("qwen2", {"pipeline": 3}, "parallel.pipeline: pipeline 3 does not divide the model's 4 layers"),
    ("qwen2", {"virtual": 2}, "parallel.virtual: found 2, required 1 with pipeline = 1"),
    ("qwen2", {"pipeline": 2, "virtual": 3}, "pipeline 2 x virtual 3 does not divide the model's 4 layers"),
    ("qwen2", {"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 2}, "= 3 do not leave the right number"),
    ("qwen2", {"pipeline": 3, "first_stage_layers": 1}, "2 stages between the ends does not divide the model's 3"),
    ("qwen2", {"first_stage_layers": 1}, "required null with pipeline = 1"),
    ("qwen2", {"expert": 2}, "parallel.expert: found 2, required 1: the model has no experts"),
    ("deepseek", {"expert": 3}, "parallel.expert: 3 does not divide the model's 8 experts"),
    ("deepseek", {"expert_tensor": 3}, r"the intermediate size of an expert \(20\)"),
    ("deepseek", {"tensor": 2, "sequence": False}, "parallel.sequence: found false"),
    ("moonlight", {"tensor": 16}, r"does not divide the model's attention heads \(4\)"),
]


@pytest.mark.parametrize(("family", "layout", "message"), LAYOUTS)
def test_layout_that_does_not_divide_the_model_is_refused(folders, family, layout, message):
    with pytest.raises(ValueError, match=message):
        check_layout(read_architecture(folders[family][0]), Parallel(**layout))


def test_sizes_that_do_not_fit_the_world_are_refused():
    with pytest.raises(ValueError, match=r"tensor=2 x pipeline=1 does not fit 3 processes"):
        check_sizes(3, Parallel(tensor=2))
    with pytest.raises(ValueError, match=r"x data=2 does not fit 8 processes"):
        check_sizes(8, Parallel(tensor=2, data=2))
    with pytest.raises(ValueError, match=r"tensor=2 x pipeline=1 x context=3 does not fit 8 .* --nproc-per-node 6 or"):
        check_sizes(8, Parallel(tensor=2, context=3))
    with pytest.raises(ValueError, match=r"expert=8 x expert_tensor=1 x pipeline=2 = 16 does not divide 8 processes"):
        check_sizes(8, Parallel(pipeline=2, expert=8))
    check_sizes(8, Parallel(tensor=2, pipeline=2, data=2, expert=4))


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
