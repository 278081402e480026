"""The order of a refresh. The server's side of the calls stands in for SGLang (edge of our code)."""

import threading
from collections.abc import Iterator

import pytest
import torch

from r1engine.hf.architecture import read_architecture
from r1engine.ranks import World
from r1engine.rollout.sglang.client import ServerError
from r1engine.rollout.sglang.delivery import ServerLayout
from r1engine.rollout.sglang.digest import CpuDigest
from r1engine.rollout.sglang.disk import WeightFolder
from r1engine.rollout.sglang.dispatch import Endpoint
from r1engine.rollout.sglang.refresh import Refresher

NAMES = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(4)] + ["model.norm.weight"]
COUNT = len(NAMES)


class Calls:
    """Notes the calls; a bucket is taken only when the trainer has begun to gather the next one."""

    url = "http://a:1"

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.gathered = [threading.Event() for _ in range(COUNT + 1)]

    def post(self, path: str, body: dict, *, seconds: float) -> dict:
        self.paths.append(path)
        if path == "/update_weights_from_tensor":
            number = self.paths.count(path)
            assert number == COUNT or self.gathered[number].wait(30.0), "nothing is gathered while a bucket travels"
        return {}

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, name in enumerate(NAMES):
            self.gathered[number].set()
            yield name, torch.full((100,), float(number))


def refresher(client, folders, tmp_path) -> Refresher:
    folder = folders["qwen2"][0]
    return Refresher(
        [Endpoint(client)],
        read_architecture(folder),
        World(rank=0, size=1, device=torch.device("cpu")),
        layout=ServerLayout((range(1),)),
        route="tensor",
        bucket_bytes=400,
        folder=WeightFolder(tmp_path, folder),
        digest=None,
    )


def test_a_bucket_is_gathered_while_another_travels(folders, tmp_path):
    calls = Calls()
    report = refresher(calls, folders, tmp_path).refresh(calls.weights(), 7)
    assert report.num_bytes == COUNT * 400
    begin, end = ["/pause_generation", "/begin_weight_update"], ["/end_weight_update", "/flush_cache"]
    assert calls.paths == [*begin, *["/update_weights_from_tensor"] * COUNT, *end, "/continue_generation"]


def test_a_server_that_fails_in_the_middle_is_left_out_and_gathering_goes_to_its_end(folders, tmp_path):
    class Dies(Calls):
        def post(self, path: str, body: dict, *, seconds: float) -> dict:
            if self.paths.count("/update_weights_from_tensor") == 2:
                raise ServerError("http://a:1: gone")
            return super().post(path, body, seconds=seconds)

    calls = Dies()
    with pytest.raises(RuntimeError, match="no server took weights 7: http://a:1: gone"):
        refresher(calls, folders, tmp_path).refresh(calls.weights(), 7)
    assert calls.gathered[COUNT - 1].is_set()  # other ranks take part in the gathering


NO_CHECKSUMS = [{}, [], {"ranks": 5}, {"ranks": [{}]}, {"ranks": [{"parallelism_info": [], "checksums": {}}]}]


@pytest.mark.parametrize("answer", NO_CHECKSUMS, ids=repr)
def test_a_server_that_does_not_tell_its_checksums_is_left_out(folders, tmp_path, answer):
    class Silent(Calls):
        def post(self, path: str, body: dict, *, seconds: float) -> dict:
            return answer if path == "/weights_checker" else super().post(path, body, seconds=seconds)

    calls = Silent()
    made = refresher(calls, folders, tmp_path)
    made.digest = CpuDigest
    with pytest.raises(RuntimeError, match="no server took weights 7: http://a:1/weights_checker: no checksums in "):
        made.refresh(calls.weights(), 7)
