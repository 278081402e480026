"""How the ranks meet, and what is said when they cannot."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from r1engine.config import Parallel
from r1engine.model.parallel import join, leave


def join_and_count() -> list[int]:
    """The threads of this process after each of two layouts, one after the other."""
    from megatron.core import parallel_state as ps

    threads, layouts = [], (Parallel(tensor=2), Parallel(pipeline=2))
    for layout in layouts:
        join(layout)
        group = ps.get_tensor_model_parallel_group()
        assert ps.get_context_parallel_group() is ps.get_data_parallel_group()  # of this rank alone
        x = torch.ones(1)
        dist.all_reduce(x, group=group)
        assert x.item() == layout.tensor
        threads.append(len(os.listdir("/proc/self/task")))
        ps.destroy_model_parallel()
    leave()
    return threads


@pytest.mark.skipif(torch.cuda.is_available(), reason="NCCL's groups start when they are used")
def test_groups_of_the_same_ranks_are_one_gloo_group():
    first, second = on_ranks(2, join_and_count)[0]
    assert first == second  # nothing is left over, nothing is made anew
    assert first < 20  # three a group; Megatron asks for more than twenty groups


def join_where_nobody_answers(port: int) -> str:
    os.environ |= {"WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    with pytest.raises(RuntimeError) as caught:
        join(Parallel())
    return str(caught.value)


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (said,) = on_ranks(1, join_where_nobody_answers, port)
    assert said.startswith(f"parallel: the 2 ranks cannot meet at 127.0.0.1:{port}")
    assert "choose another one with torchrun --master-port or MASTER_PORT" in said
