"""A checkpoint whose pickles name functions is refused before one of them runs."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from policies import policy_of
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from r1engine.config import RlConfig


class Hostile:
    """When it is unpickled, a file is there."""

    def __init__(self, ran: Path) -> None:
        self._ran = ran

    def __reduce__(self):
        return Path.touch, (self._ran,)


@pytest.fixture(scope="module")
def policy(world, folders):
    return policy_of(RlConfig(model={"path": folders["qwen2"][0]}), world)


@pytest.fixture
def saved(policy, tmp_path):
    (tmp_path / "model").mkdir()
    policy.save(tmp_path / "model", None)
    return tmp_path / "model"


def test_what_was_written_is_read(policy, saved):
    policy.load(saved, False)


def test_metadata_that_names_a_function_is_refused(policy, saved, tmp_path):
    path = saved / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = Hostile(tmp_path / "ran")
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"\.metadata: found no plain description of a checkpoint \(it names pathlib"):
        policy.load(saved, False)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"\.metadata: found no plain description"):
        policy.load(saved, False)
    assert not (tmp_path / "ran").exists()


def test_an_object_in_the_place_of_a_tensor_does_not_run(policy, saved, tmp_path):
    path = saved / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    name = "decoder.final_layernorm.weight"
    size = metadata.state_dict_metadata[name].size
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    metadata.state_dict_metadata[name].size = size  # which Megatron compares
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == name)
    metadata.storage_data[MetadataIndex(name)] = place
    stream = io.BytesIO()
    torch.save(Hostile(tmp_path / "ran"), stream)
    file = saved / place.relative_path
    place.offset, place.length = file.stat().st_size, len(stream.getvalue())
    file.write_bytes(file.read_bytes() + stream.getvalue())
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(BaseException, match=r"Weights only load failed"):  # CheckpointException is one
        policy.load(saved, False)
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
