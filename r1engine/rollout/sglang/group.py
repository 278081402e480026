"""A broadcast group of a rank of the trainer and all ranks of the servers (NCCL between GPUs, gloo otherwise)."""

from __future__ import annotations

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from r1engine.rollout.sglang.client import Client, ServerError
from r1engine.rollout.sglang.key import is_local
from r1engine.rollout.sglang.server import free_port

JOIN_SECONDS = 120.0


class BroadcastGroup:
    """Rank 0 sends; server i's ranks follow in order."""

    def __init__(self, clients: list[Client], ranks: int, sender: int, ports: range | None = None) -> None:
        """Meets the servers.

        Args:
            clients: of the servers.
            ranks:   tensor-parallel size of each.
            sender:  number of this rank of the trainer.
            ports:   of which this rank listens on one; None: any.

        Raises:
            ServerError: a server does not join.
            RuntimeError: PyTorch cannot make the group.
        """
        self.clients = clients
        are_local = all(is_local(urlsplit(c.url).hostname or "") for c in clients)
        host = "127.0.0.1" if are_local else socket.gethostname()
        port = free_port(host if are_local else "0.0.0.0", ports)
        self.name = f"r1engine-{sender}-{port}"
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        size = 1 + ranks * len(clients)
        common = {
            "master_address": host,
            "master_port": port,
            "world_size": size,
            "group_name": self.name,
            "backend": backend,
        }
        path = "/init_weights_update_group"
        with ThreadPoolExecutor(len(clients)) as pool:
            joining = [
                pool.submit(c.post, path, common | {"rank_offset": 1 + i * ranks}, seconds=JOIN_SECONDS)
                for i, c in enumerate(clients)
            ]
            try:
                self._group: dist.ProcessGroup | None = _new_group(backend, host, port, size, self.name)
            finally:
                for future in joining:
                    future.result()  # a server that says why it does not join says more than PyTorch

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send a tensor to every server rank."""
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        assert self._group is not None  # it is not closed
        self._group.broadcast([tensor], options).wait()

    def close(self) -> None:
        """Take the group apart on the servers that still answer."""

        def leave(client: Client) -> None:
            with contextlib.suppress(ServerError):  # a server that is gone has left the group
                client.post("/destroy_weights_update_group", {"group_name": self.name}, seconds=30.0)

        with ThreadPoolExecutor(len(self.clients)) as pool:
            list(pool.map(leave, self.clients))
        self._group = None


def _new_group(backend: str, host: str, port: int, size: int, name: str) -> dist.ProcessGroup:
    """A process group outside the default one, as SGLang's ranks build theirs; PyTorch has no public call for it."""
    from torch.distributed.distributed_c10d import PrefixStore, _new_process_group_helper

    timeout = timedelta(seconds=JOIN_SECONDS)
    # Not by a rendezvous: under torchrun that waits for a store of torchrun's at this address.
    store = dist.TCPStore(host, port, size, is_master=True, timeout=timeout)
    group, _ = _new_process_group_helper(
        size,
        0,
        [],
        dist.Backend(backend),
        PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]  # newer PyTorch has a type of its own for this text
        timeout=timeout,
    )
    return group
