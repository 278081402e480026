"""Checkpoints in DeepSeek-V3's FP8 format: read, trained on, written again; MTP modules kept; damage named."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from model_folders import save_model
from policies import policy_of
from safetensors.torch import load_file, save_file

from r1engine.config import RlConfig
from r1engine.convert import convert
from r1engine.hf import export as hf_export
from r1engine.hf.architecture import is_fp8_folder, read_architecture
from r1engine.hf.folder import Folder
from r1engine.hf.formats import QUANTIZED
from r1engine.hf.headers import INDEX, SCALE
from r1engine.hf.tensors import mtp_shapes

# Larger than a block of 128, and no multiple of it.
SIZES = {"hidden_size": 144, "moe_intermediate_size": 136, "num_hidden_layers": 2, "n_routed_experts": 4, "n_group": 2}
SIZES |= {"num_experts_per_tok": 2, "topk_group": 1, "kv_lora_rank": 130, "q_lora_rank": 132}


def quantized(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values that use the whole range in every block, and power-of-two scales: exact in bfloat16."""
    random = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=random) * 60).clamp(-448, 448)
    values[::128, ::128] = 448.0
    scales = 2.0 ** torch.randint(-14, -8, tuple(-(-n // 128) for n in shape), generator=random)
    return values.to(torch.float8_e4m3fn), scales


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a folder in the official format with one MTP module, its values in float32)"""
    folder = tmp_path_factory.mktemp("fp8")
    save_model(folder, "deepseek", **SIZES, num_nextn_predict_layers=1)
    tensors = load_file(folder / "model.safetensors")
    arch = read_architecture(folder)
    for name, shape in mtp_shapes(arch).items():
        tensors[name] = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
    exact = {}
    for seed, (name, tensor) in enumerate(sorted(tensors.items())):
        if QUANTIZED.search(name):
            tensors[name], tensors[name + SCALE] = quantized(tuple(tensor.shape), seed)
            rows, columns = (torch.arange(n) // 128 for n in tensor.shape)  # the block of each
            exact[name] = tensors[name].float() * tensors[name + SCALE][rows[:, None], columns]
        else:
            tensors[name] = tensor if name.endswith("bias") else tensor.bfloat16()
            exact[name] = tensors[name].float()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, exact


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_read_trained_values_and_written_again_byte_for_byte(world, made, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_export, "FILE_BYTES", 200_000)
    folder, exact = made
    policy = policy_of(RlConfig(model={"path": folder}), world)
    for name, tensor in policy.weights():
        assert torch.equal(tensor, exact[name]), name
    policy.export(tmp_path / "fp8", precision="fp8")
    policy.export(tmp_path / "bf16", precision="bfloat16")
    files = {kind: [load_file(f) for f in (tmp_path / kind).glob("*.safetensors")] for kind in ("fp8", "bf16")}
    assert len(files["fp8"]) > 1
    again = {name: t for file in files["fp8"] for name, t in file.items()}
    before = load_file(folder / "model.safetensors")
    assert again.keys() == before.keys()
    for name, tensor in before.items():
        assert again[name].dtype == tensor.dtype, name
        assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name
    plain = {name: t for file in files["bf16"] for name, t in file.items()}
    assert plain.keys() == exact.keys()
    assert all(torch.equal(plain[name].float(), tensor) for name, tensor in exact.items())
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["fmt"] == "e4m3"


def test_convert_goes_on_where_it_stopped(made, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_export, "FILE_BYTES", 200_000)
    folder, exact = made
    written = []
    write = hf_export.Export.write

    def interrupted(self, name, tensor):
        if len(written) == 40:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, tensor)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(hf_export.Export, "write", interrupted)
        convert(folder, tmp_path / "out", "bfloat16")
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.safetensors")}
    assert kept
    convert(folder, tmp_path / "out", "bfloat16")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert all(file.stat().st_mtime_ns == kept[file.name] for file in files if file.name in kept)
    plain = {name: t for file in files for name, t in load_file(file).items()}
    assert plain.keys() == exact.keys()
    assert all(torch.equal(plain[name].float(), tensor) for name, tensor in exact.items())
    with pytest.raises(ValueError, match="required two folders"):
        convert(folder, folder, "bfloat16")


def test_convert_writes_every_family_with_its_hashes(folders, tmp_path):
    for family, (source, _) in folders.items():
        target = tmp_path / family
        convert(source, target, "float32")
        found, expected = (load_file(folder / "model.safetensors") for folder in (target, source))
        if read_architecture(source).is_tied:
            expected.pop("lm_head.weight", None)
        assert found.keys() == expected.keys(), family
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), family
        digest = hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
        assert (target / hf_export.HASHES).read_text().startswith(f"{digest}  model.safetensors\n")
        assert (target / "tokenizer.json").is_file()


@pytest.mark.parametrize("index", [(), (slice(100, 140),), (slice(0, 144), slice(130, 140)), (slice(140, 140),)])
def test_a_slice_is_that_of_the_whole_tensor(made, index):
    folder = Folder(made[0], read_architecture(made[0]))
    name = "model.layers.1.self_attn.o_proj.weight"
    name = next(n for n in made[1] if n.endswith("experts.2.gate_proj.weight")) if index != () else name
    assert torch.equal(folder.read(name, index), made[1][name][index])


NAME = "model.layers.1.self_attn.o_proj.weight"


def drop_scale(tensors):
    del tensors[NAME + SCALE]


def whole_numbers(tensors):
    tensors[NAME] = tensors[NAME].view(torch.int8)
    del tensors[NAME + SCALE]


def short_scale(tensors):
    tensors[NAME + SCALE] = tensors[NAME + SCALE][:1].contiguous()


def half_scale(tensors):
    tensors[NAME + SCALE] = tensors[NAME + SCALE].half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_scale, f"1 in FP8 without {SCALE} ({NAME})"),
        (whole_numbers, f"1 of a type other than F32, F16, BF16, F8_E4M3 with F32 scales ({NAME} is I8)"),
        (short_scale, f"1 misshaped ({NAME}{SCALE} is (1, 1), required (2, 1))"),
        (half_scale, f"({NAME}{SCALE} is F16)"),
    ],
)
def test_bad_tensors_are_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=re.escape(message)):
        Folder(folder, read_architecture(folder))


def test_other_block_sizes_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"weight_block_size is \[64, 64\].*required is \[128, 128\]"):
        Folder(folder, read_architecture(folder))


@pytest.mark.parametrize("has_fp8", [True, False])
def test_a_config_that_says_other_than_the_tensors_is_refused(folder, folders, tmp_path, has_fp8):
    if not has_fp8:
        folder = Path(shutil.copytree(folders["deepseek"][0], tmp_path / "plain"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = None if has_fp8 else {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    assert is_fp8_folder(folder) != has_fp8
    found, holds = ("None", "FP8") if has_fp8 else ("'fp8'", "no FP8")
    with pytest.raises(ValueError, match=f"quant_method is {found}, and the folder has {holds} weights; required is"):
        Folder(folder, read_architecture(folder))


def test_a_cut_off_file_and_a_missing_one_are_named(folder):
    file = folder / "model.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file.name, "b": "model-2.safetensors"}}))
    with pytest.raises(ValueError, match=rf"{INDEX} names 1 missing files \(model-2\.safetensors\)"):
        Folder(folder, read_architecture(folder))
    (folder / INDEX).unlink()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"model\.safetensors of {file.stat().st_size} bytes is no whole"):
        Folder(folder, read_architecture(folder))


def test_loading_takes_the_memory_of_one_tensor(world, tmp_path):
    sizes = {"hidden_size": 256, "vocab_size": 16_384, "num_hidden_layers": 6, "intermediate_size": 2048}
    save_model(tmp_path, "qwen2", **sizes)
    policy = policy_of(RlConfig(model={"path": tmp_path}), world)

    def status(key: str) -> int:
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    policy._load()
    growth, largest = status("VmHWM") - before, 16_384 * 256 * 4
    total = (tmp_path / "model.safetensors").stat().st_size
    assert total > 4.5 * largest
    assert growth < 2.5 * largest  # the tensor in its file and in memory
