"""Exported folders: the same bytes whoever makes them, resumed where they stopped, read back bit for bit."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from r1engine.convert import convert
from r1engine.hf import export as hf_export
from r1engine.hf.export import Export, Stored

TENSORS = {f"t{i}": torch.arange(i, i + 30.0).view(5, 6) for i in range(6)} | {
    "half": torch.ones(3, dtype=torch.bfloat16),
    "single": torch.full((2,), 0.1),
}
STORED = {name: Stored(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(hf_export, "FILE_BYTES", 300)  # two tensors a file


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def export(source, target, names, *, identity=None) -> Export:
    made = Export(target, STORED, source, identity=identity or {"step": 1})
    for name in names:
        made.write(name, TENSORS[name])
    return made


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_files_are_read_by_safetensors_and_do_not_depend_on_the_order(source, tmp_path):
    export(source, tmp_path / "a", TENSORS).finish()
    export(source, tmp_path / "b", reversed(TENSORS)).finish()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(TENSORS)
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "a" / file)[name], TENSORS[name])
    assert (tmp_path / "a" / "tokenizer.json").is_file()
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "a", check=True)


def test_a_folder_holds_what_belongs_to_the_model_and_its_hashes_and_nothing_else(source, tmp_path):
    belongs = ["chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer_config.json", "vocab.json"]
    for name in [*belongs, "trainer_state.json", "notes.txt", "README.md", "LICENSE", "optimizer.pt"]:
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    export(source, tmp_path / "a", TENSORS).finish(card="a card")
    found = {str(file.relative_to(tmp_path / "a")) for file in (tmp_path / "a").rglob("*") if file.is_file()}
    own = {name for name in found if "safetensors" in name} | {"README.md", "SHA256SUMS"}
    assert found == {*belongs, *own, "config.json", "tokenizer.json", "additional_chat_templates/tools.jinja"}
    assert (tmp_path / "a" / "README.md").read_text() == "a card"
    listed = [line.split("  ")[1] for line in (tmp_path / "a" / "SHA256SUMS").read_text().splitlines()]
    assert {*listed, "SHA256SUMS"} == found
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "a", check=True)


def test_an_interrupted_export_goes_on(source, tmp_path):
    export(source, tmp_path / "whole", TENSORS).finish()
    interrupted = export(source, tmp_path / "b", ["t0", "t1", "t2"])
    assert interrupted.done == {"t0", "t1"}
    again = export(source, tmp_path / "b", [])
    assert again.done == {"t0", "t1"}
    for name in sorted(TENSORS.keys() - again.done):
        again.write(name, TENSORS[name])
    again.finish()
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")


def test_another_export_and_a_changed_file_start_again(source, tmp_path):
    export(source, tmp_path / "b", ["t0", "t1", "t2", "t3"])
    file = next((tmp_path / "b").glob("model-00001*"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert export(source, tmp_path / "b", []).done == {"t2", "t3"}
    assert export(source, tmp_path / "b", [], identity={"step": 2}).done == set()
    assert not list((tmp_path / "b").glob("*.safetensors"))


def test_tensors_that_did_not_come_are_named(source, tmp_path):
    with pytest.raises(ValueError, match=r"export: 6 tensors did not come \(half, single, t2"):
        export(source, tmp_path / "b", ["t0", "t1"]).finish()


def test_a_full_disk_is_named_and_the_export_can_go_on(source, tmp_path, monkeypatch):
    # The one fake: the operating system's answer on a full disk.
    def full(descriptor, data, offset):
        raise OSError(28, os.strerror(28))

    made = export(source, tmp_path / "b", ["t0", "t1"])
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="No space left on device; the files that"):
        patched.setattr(os, "pwrite", full)
        made.write("t2", TENSORS["t2"])
    assert export(source, tmp_path / "b", []).done == {"t0", "t1"}
    usage = shutil.disk_usage(tmp_path)._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RuntimeError, match=r"has 0\.00 GB free, but the files need"):
        export(source, tmp_path / "c", [])


FOREIGN = "old_experiment.safetensors"


@pytest.mark.parametrize("state", ["only it", "unfinished", "finished"])
def test_weights_that_no_export_wrote_are_not_removed(source, tmp_path, state):
    target = tmp_path / "b"
    target.mkdir()
    if state != "only it":
        made = export(source, target, TENSORS if state == "finished" else ["t0", "t1"])
        if state == "finished":
            made.finish()
    (target / FOREIGN).write_bytes(b"a month of work")
    before = contents(target)
    with pytest.raises(RuntimeError, match=f"holds {FOREIGN}, which no export wrote"):
        export(source, target, [], identity={"step": 2})
    assert contents(target) == before


def test_a_finished_export_is_replaced_by_the_next(source, tmp_path):
    export(source, tmp_path / "b", TENSORS).finish()
    export(source, tmp_path / "b", TENSORS, identity={"step": 2}).finish()
    export(source, tmp_path / "whole", TENSORS).finish()
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "files",
    [
        {FOREIGN: "x"},
        {"notes.txt": "x"},
        {"model.safetensors": "x", "config.json": "{}"},
        {"model.safetensors": "x", "SHA256SUMS": "0  model.safetensors\n"},
        {"export.json": "{}", FOREIGN: "x"},
        {"export.json": "[1]"},
        {".hidden": ""},
    ],
)
def test_convert_refuses_a_folder_that_holds_something(folders, tmp_path, files):
    target = tmp_path / "target"
    target.mkdir()
    for name, text in files.items():
        (target / name).write_text(text)
    with pytest.raises(
        ValueError, match=r"^convert: .*target holds .*; required is an empty folder, a new one, or"
    ) as caught:
        convert(folders["qwen2"][0], target, "bfloat16")
    assert all(name in str(caught.value) for name in files)
    assert {name: data.decode() for name, data in contents(target).items()} == files


def test_convert_refuses_its_own_finished_folder_and_a_file(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    convert(folders["qwen2"][0], tmp_path / "empty", "bfloat16")
    before = contents(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty holds SHA256SUMS, config\.json"):
        convert(folders["qwen3"][0], tmp_path / "empty", "bfloat16")
    assert contents(tmp_path / "empty") == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file holds no folder, but a file"):
        convert(folders["qwen2"][0], tmp_path / "file", "bfloat16")
