"""Files of a model folder that are cut off, missing, of other types or no files: a line that begins with their name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from r1engine.config import TinyConfig
from r1engine.hf.architecture import read_architecture
from r1engine.hf.headers import INDEX, Headers
from r1engine.hf.tokenizer import load_tokenizer, stop_tokens

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 7\n"
CUT = '{"architectures": ["Qwen2ForCausalLM"], "ini'
NEWER = '{"version": "9.9", "model": {"type": "Unheard"}}'


@pytest.fixture(scope="module", params=["qwen2", "deepseek_v3"])
def whole(request, tmp_path_factory) -> Path:
    from r1engine.demo.tiny import write_model

    folder = tmp_path_factory.mktemp("whole")
    write_model(folder, TinyConfig(family=request.param, hidden_size=32, layers=2, heads=2, kv_heads=2))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1]}')
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def read_all(folder: Path) -> None:
    """Everything that a run reads of a folder, but the weights themselves."""
    tokenizer = load_tokenizer(folder)
    Headers(folder, read_architecture(folder))
    stop_tokens(folder, tokenizer)


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_all(folder)
    return str(caught.value).removeprefix("model.path: ").replace(f"{folder}/", "")


def changed(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_whole_folders_are_read(folder):
    read_all(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "Git LFS pointer, required is the file itself: run `git lfs pull` there"),
        (CUT, ""),
        ("", ""),
        ("[1]", ""),
        ("[" * 100_000, ""),
        (b"\xff\xfe{}", "not UTF-8 text"),
        (None, "cannot be read: Is a directory"),
    ],
)
def test_a_broken_json_file_is_named(folder, name, content, message):
    path = folder / name
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal(folder).startswith(f"{name}: ")
    assert message in refusal(folder)
    assert "\n" not in refusal(folder)


def test_a_tokenizer_of_another_version_is_named(folder):
    (folder / "tokenizer.json").write_text(NEWER)
    assert refusal(folder).startswith("tokenizer.json: cannot be read by tokenizers ")
    assert "install the version that wrote it" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "values", "required"),
    [
        ("hidden_size", ["32", 0, -4, 32.0, True, [32], {}], "a whole number of at least 1"),
        ("num_hidden_layers", ["2", 0], "a whole number of at least 1"),
        ("num_key_value_heads", ["2", -1], "a whole number of at least 0"),
        ("vocab_size", [1.5, "many"], "a whole number of at least 1"),
        ("max_position_embeddings", ["256"], "a whole number of at least 1"),
        ("rms_norm_eps", ["1e-6", 0, -1.0, float("nan"), float("inf")], "a number above 0"),
        ("tie_word_embeddings", ["false", 0], "true or false"),
        ("rope_scaling", ["yarn", 3], "an object"),
        ("quantization_config", ["fp8"], "an object"),
        ("architectures", ["Qwen2ForCausalLM", [3], {}], "a list of names"),
    ],
)
def test_a_value_of_another_type_in_config_json_is_named(folder, key, values, required):
    for value in values:
        changed(folder / "config.json", **{key: value})
        assert refusal(folder).startswith(f"config.json: {key} is {value!r:.60}, required is {required}"), value


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"])
def test_null_in_config_json_is_absent(folder, key):
    changed(folder / "config.json", **{key: None})
    assert refusal(folder).startswith(f"config.json: key '{key}' is missing, required by ")


def test_numbers_of_the_rotary_embedding_are_numbers(folder):
    changed(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": "1e4"})
    assert refusal(folder) == "config.json: rope_parameters.rope_theta is '1e4', required is a number"


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["1", [1, None], -1, True, 1.0])
def test_an_end_token_is_a_token_id(folder, name, value):
    changed(folder / name, eos_token_id=value)
    assert refusal(folder).startswith(f"{name}: eos_token_id is {value!r}, required is a token id or a list of them")


@pytest.mark.parametrize("value", [3, {"content": 3}, ["<|end|>"]])
def test_the_text_of_an_end_token_is_a_text(folder, value):
    changed(folder / "tokenizer_config.json", eos_token=value)
    assert refusal(folder).startswith("tokenizer_config.json: eos_token is ")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', CUT, POINTER])
def test_a_broken_index_is_named(folder, content):
    (folder / INDEX).write_text(content)
    assert refusal(folder).startswith(f"{INDEX}: ")


@pytest.mark.parametrize("content", [b"", b'\x08\0\0\0\0\0\0\0{"a": 3}', POINTER.encode(), None])
def test_a_broken_file_of_weights_is_named(folder, content):
    path = folder / "model.safetensors"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    assert refusal(folder).startswith("model.safetensors ")
    assert "\n" not in refusal(folder)


def test_more_experts_a_token_than_there_are_is_refused(folder):
    if "n_routed_experts" in json.loads((folder / "config.json").read_text()):
        changed(folder / "config.json", num_experts_per_tok=16, n_group=1, topk_group=1)
        assert refusal(folder) == "config.json: num_experts_per_tok is 16, required <= 8 experts"


def test_weights_that_are_pickles_are_named_and_not_loaded(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"no \*\.safetensors file, only pytorch_model\.bin: loading a pickle runs what"
    ):
        read_all(folder)
