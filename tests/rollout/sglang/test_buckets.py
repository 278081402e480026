"""Weights on their way: bucket sizes, what may not part, and the form that SGLang reads."""

from __future__ import annotations

import base64
import dataclasses
import inspect
import io
import pickle
import uuid
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing import reductions

from r1engine.hf.formats import store
from r1engine.rollout.sglang.buckets import Bucket, _Pickler, buckets, flatten, order_by_alignment, payload
from r1kernels import fp8_quantize


def tensors(*sizes: int, dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.Tensor]]:
    return [(f"t{i}", torch.arange(size, dtype=dtype)) for i, size in enumerate(sizes)]


def test_no_bucket_is_larger_than_the_limit_and_nothing_is_lost():
    sent = tensors(10, 20, 30, 5, 5)
    found = list(buckets(iter(sent), 120))
    assert [b.names for b in found] == [["t0", "t1"], ["t2"], ["t3", "t4"]]
    assert all(b.num_bytes <= 120 for b in found)
    for (name, tensor), (sent_name, sent_tensor) in zip(
        [pair for b in found for pair in zip(b.names, b.tensors, strict=True)], sent, strict=True
    ):
        assert name == sent_name and torch.equal(tensor, sent_tensor)


def test_a_tensor_larger_than_the_limit_travels_alone():
    assert [b.names for b in buckets(iter(tensors(1, 100, 1)), 40)] == [["t0"], ["t1"], ["t2"]]


def test_a_bucket_holds_copies():
    # policy.weights() may reuse a buffer for the next tensor.
    buffer = torch.zeros(4)

    def reused():
        for i in range(3):
            buffer.fill_(i)
            yield f"t{i}", buffer

    (bucket,) = buckets(reused(), 1000)
    assert [int(t[0]) for t in bucket.tensors] == [0, 1, 2]


def test_the_latent_projections_of_a_layer_never_part():
    names = ["q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
    sent = [(f"model.layers.0.self_attn.{name}.weight", torch.zeros(10)) for name in names]
    sent.append(("model.layers.1.self_attn.q_a_proj.weight", torch.zeros(10)))
    found = list(buckets(iter(sent), 50))
    assert [len(b.names) for b in found] == [3, 1]


@dataclasses.dataclass
class FlattenedTensorMetadata:
    """The fields of SGLang's class of this name."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


class ServerSide(pickle.Unpickler):
    """Finds the class that the pickle names; SGLang allows an exact list of names."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata"):
            return FlattenedTensorMetadata
        assert not module.startswith("r1engine"), f"{module}.{name} does not exist on the server"
        return super().find_class(module, name)


@pytest.mark.parametrize("count", [1, 3])
def test_the_payload_rebuilds_every_tensor(count):
    sent = [
        ("a", torch.randn(3, 5, dtype=torch.bfloat16)),
        ("b", torch.randn(7)),
        ("c", torch.arange(5, dtype=torch.uint8)),
    ][:count]
    bucket = order_by_alignment(next(buckets(iter(sent), 10_000)))
    read = ServerSide(io.BytesIO(base64.b64decode(payload(bucket, flatten(bucket))))).load()
    flat = read["flattened_tensor"]
    assert {m.name for m in read["metadata"]} == {name for name, _ in sent}
    for meta in read["metadata"]:
        assert meta.start_idx % meta.dtype.itemsize == 0  # else the server's view of the bytes fails
        rebuilt = flat[meta.start_idx : meta.end_idx].view(meta.dtype).reshape(meta.shape)
        assert torch.equal(rebuilt, dict(sent)[meta.name])


def test_a_tensor_on_a_gpu_is_sent_with_the_gpus_uuid(monkeypatch):
    # As PyTorch would reduce it, if there were a GPU: the server's index of the same one may be another.
    parameters = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    arguments = [3 if name == "storage_device" else name for name in parameters]
    monkeypatch.setattr(reductions, "reduce_tensor", lambda _: (reductions.rebuild_cuda_tensor, tuple(arguments)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuid.UUID(int=index)))

    class OnGpu(torch.Tensor):
        is_cuda = True

    seen = {}
    monkeypatch.setattr(_Pickler, "dump", lambda self, sent: seen.update(self.dispatch_table))
    payload(Bucket([], []), torch.zeros(1).as_subclass(OnGpu))
    rebuild, sent = seen[torch.Tensor](torch.zeros(1))
    assert rebuild is reductions.rebuild_cuda_tensor  # the one name that SGLang allows
    assert dict(zip(parameters, sent, strict=True)) == {
        name: "00000000-0000-0000-0000-000000000003" if name == "storage_device" else name for name in parameters
    }


def test_of_shared_memory_the_payload_holds_a_handle_and_each_tensor_lies_where_it_was_said():
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        flat = torch.zeros(100_000, dtype=torch.uint8).share_memory_()
        values = flat[64:76].view(torch.float32).copy_(torch.tensor([1.0, 2.0, 3.0]))
        text = payload(Bucket(["a"], [values]), flat, [64])
        found = ServerSide(io.BytesIO(base64.b64decode(text))).load()
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    (meta,) = found["metadata"]
    assert len(text) < 2000 and (meta.start_idx, meta.end_idx) == (64, 76)
    flat[64:68] = 0  # the same memory
    assert found["flattened_tensor"][64:76].view(torch.float32).tolist() == [0.0, 2.0, 3.0]


def test_wider_elements_come_first():
    (bucket,) = buckets(iter([("odd", torch.zeros(3, dtype=torch.uint8)), ("wide", torch.ones(2))]), 100)
    ordered = order_by_alignment(bucket)
    assert ordered.names == ["wide", "odd"]
    assert torch.equal(flatten(ordered)[:8].view(torch.float32), torch.ones(2))


def test_fp8_matrices_and_their_scales_travel_together(folders):
    weights = folders["deepseek"][1].state_dict()
    stored = (pair for name, tensor in weights.items() for pair in store(name, tensor, "fp8"))
    found = list(buckets(stored, 1000))
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    (bucket,) = [b for b in found if name in b.names]
    assert name + "_scale_inv" in bucket.names and name.replace("kv_b", "q_a") in bucket.names
    values, scale = fp8_quantize(weights[name], block=(128, 128))
    assert torch.equal(bucket.tensors[bucket.names.index(name)].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(bucket.tensors[bucket.names.index(name + "_scale_inv")], scale)
    norms = [b.tensors[b.names.index("model.norm.weight")] for b in found if "model.norm.weight" in b.names]
    assert norms[0].dtype == torch.bfloat16
