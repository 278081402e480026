"""Every parallel layout equals one rank: losses, gradient norm and updated weights (float32, gloo, torchrun)."""

import json
from pathlib import Path

import pytest
import torch
from ranks import torchrun
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def one_rank(folders, tmp_path_factory):
    """(the folder of all models, what one rank makes of them)"""
    root = folders["qwen2"][0].parent
    out = tmp_path_factory.mktemp("one-rank")
    done = torchrun(1, WORKER, 1, 1, root, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, out


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data"),
    [
        pytest.param(2, 1, 1, id="tp2"),
        pytest.param(1, 2, 1, id="pp2"),
        pytest.param(1, 1, 2, id="dp2"),
        pytest.param(2, 1, 2, id="tp2-dp2"),
        pytest.param(2, 2, 1, id="tp2-pp2"),
    ],
)
def test_layout_equals_one_rank(one_rank, tmp_path, tensor, pipeline, data):
    root, reference = one_rank
    done = torchrun(tensor * pipeline * data, WORKER, tensor, pipeline, root, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for expected_file in sorted(reference.glob("*.json")):
        family = expected_file.stem
        expected, found = json.loads(expected_file.read_text()), json.loads((tmp_path / expected_file.name).read_text())
        for a, b in zip(found["stats"], expected["stats"], strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-6), family
        if data == 1:
            assert found["logp"] == pytest.approx(expected["logp"], rel=1e-5), family
        weights = load_file(reference / f"{family}.safetensors")
        for name, tensor_found in load_file(tmp_path / f"{family}.safetensors").items():
            torch.testing.assert_close(tensor_found, weights[name], atol=1e-6, rtol=1e-5)
