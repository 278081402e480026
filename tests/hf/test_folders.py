"""Model folders and parallel sizes that cannot work are refused by name, before anything is built."""

import json
import shutil

import pytest
import torch
from model_folders import save_model
from safetensors.torch import load_file, save_file

from r1engine.config import Parallel
from r1engine.convert import convert
from r1engine.hf.architecture import read_architecture
from r1engine.hf.folder import Folder
from r1engine.hf.layout import check_layout
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
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "rope_type 'longrope'"),
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


BUFFERS = [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.3.self_attn.rotary_emb.cos_cached",
    "model.rotary_emb.inv_freq",
    "model.rotary_emb.original_inv_freq",
]


@pytest.mark.parametrize("family", ["llama", "moonlight"])
def test_stored_rotary_buffers_are_not_read(folders, tmp_path, family):
    folder = shutil.copytree(folders[family][0], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.ones(4, dtype=torch.int64) for name in BUFFERS}, folder / "model.safetensors")
    assert Folder(folder, read_architecture(folder))._files.keys() == tensors.keys()
    convert(folder, tmp_path / "out", "bfloat16")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


def write(folder, files: dict[str, dict], *, index: dict[str, dict] | None = None):
    """Replace the weights of a folder by these files; `index` as model.safetensors.index.json has it."""
    (folder / "model.safetensors").unlink()
    for name, tensors in files.items():
        save_file(tensors, folder / name, {"format": "pt"})
    if index is not None:
        weight_map = {name: file for file, tensors in index.items() for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def halves(folder) -> tuple[dict, dict, dict]:
    """All tensors of a folder, and each half of them."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    half = len(names) // 2
    return tensors, {n: tensors[n] for n in names[:half]}, {n: tensors[n] for n in names[half:]}


def second_sets(folder) -> dict[str, tuple[dict, dict | None, tuple[str, str]]]:
    """files, index, and the two that must be named."""
    whole, first, second = halves(folder)
    shards, name = dict(zip(SHARDS, (first, second), strict=True)), min(first)
    zeros, other = {n: torch.zeros_like(t) for n, t in whole.items()}, "model-00001-of-00003.safetensors"
    bare = {n.removeprefix("model."): t for n, t in whole.items()}
    return {
        "older shards in the index": (shards | {"model.safetensors": zeros}, shards, ("model.safetensors", SHARDS[0])),
        "other names": (shards | {"model.safetensors": bare}, shards, ("model.safetensors", SHARDS[0])),
        "no index": (shards | {"model.safetensors": whole}, None, (SHARDS[0], "model.safetensors")),
        "a shard of other sizes": (shards | {other: zeros}, shards, (SHARDS[0], other)),
        "a tensor in both": (shards | {SHARDS[1]: second | {name: zeros[name]}}, shards, (name, SHARDS[1])),
        "an index of the whole": (shards | {"model.safetensors": whole}, {"model.safetensors": whole}, SHARDS[:1] * 2),
    }


@pytest.mark.parametrize("case", range(6))
def test_two_sets_of_weights_are_refused_and_both_named(folder, case):
    files, index, named = list(second_sets(folder).values())[case]
    write(folder, files, index=index)
    with pytest.raises(ValueError, match="holds two sets of weights: ") as caught:
        Folder(folder, read_architecture(folder))
    assert all(name in str(caught.value) for name in named)


def test_files_beside_the_weights_that_the_index_does_not_name_are_left_alone(folder):
    whole, first, second = halves(folder)
    shards = dict(zip(SHARDS, (first, second), strict=True))
    adapter = {"base_model.model.lora_A.weight": torch.ones(2, 2)}
    write(folder, shards | {"adapter_model.safetensors": adapter}, index=shards)
    read = Folder(folder, read_architecture(folder))
    assert read._files.keys() == whole.keys()
    assert all(torch.equal(read.read(name), tensor) for name, tensor in whole.items())


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
    for sizes, ranks, message in (
        (
            {"tensor": 2},
            3,
            r"2 x pipeline 1 = 2 does not divide the world size 3; start with torchrun --nproc-per-node 2",
        ),
        ({"tensor": 2, "data": 2}, 8, r"data: found 2, required 4 = world size 8 / \(tensor 2 x pipeline 1\)"),
        ({"tensor": 2, "context": 3}, 8, r"tensor 2 x pipeline 1 x context 3 = 6 does not divide the world size 8"),
        (
            {"pipeline": 2, "expert": 8},
            8,
            r"expert 8 x expert_tensor 1 x pipeline 2 = 16 does not divide the world size",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Parallel(**sizes).data_ranks(ranks)
    assert Parallel(tensor=2, pipeline=2, data=2, expert=4).data_ranks(8) == 2


def test_offloading_frees_storages_and_restores_every_view(monkeypatch):
    flat = torch.arange(6.0)
    views = [flat[:2], flat[2:]]
    monkeypatch.setattr(Offloader, "DEVICE_TYPES", {"cpu"})
    scratch = torch.ones(5)
    offloader = Offloader(
        lambda: [*views, torch.empty(0)], torch.device("cpu"), is_on=True, scratch=lambda: [scratch, views[0]]
    )
    offloader.offload()
    assert flat.untyped_storage().nbytes() == scratch.untyped_storage().nbytes() == 0
    offloader.restore()
    assert torch.equal(scratch, torch.zeros(5))  # nobody wants what it had
    assert torch.equal(flat, torch.arange(6.0))
    assert views[1].data_ptr() == flat[2:].data_ptr()


def test_saved_models_have_distinct_norms(tmp_path):
    # The parity tests would not see two norms exchanged if all of them were ones.
    norms = [t for n, t in save_model(tmp_path, "qwen3").state_dict().items() if "norm" in n]
    assert not torch.equal(norms[0], norms[1])
