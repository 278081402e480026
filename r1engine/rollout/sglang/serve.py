"""`r1engine serve`: the servers of a disaggregated run on one machine, kept alive and announced to the trainer."""

from __future__ import annotations

import contextlib
import json
import socket
import time

import torch

from r1engine.config import RlConfig
from r1engine.rollout.sglang import launch
from r1engine.rollout.sglang.server import Server


def serve(cfg: RlConfig, servers: int, host: str | None) -> None:
    """Starts `servers` servers, announces each in the run folder, and starts again what ends. Returns on Ctrl-C.

    Args:
        cfg:     the run's; its run_dir is on a file system that the trainer sees.
        servers: on this machine; each takes the next `rollout.sglang.tensor` GPUs.
        host:    address that the trainer reaches this machine by; None: its name.

    Raises:
        ValueError: fewer GPUs than the servers need, or no usable SGLang.
        RuntimeError: a server does not start.
    """
    s, on_gpu = cfg.rollout.sglang, torch.cuda.is_available()
    if on_gpu and servers * s.tensor > torch.cuda.device_count():
        raise ValueError(
            f"serve: {servers} servers of {s.tensor} GPUs need {servers * s.tensor}, this machine has "
            f"{torch.cuda.device_count()}"
        )
    host = host or (socket.gethostname() if on_gpu else "127.0.0.1")
    folder = launch.registry(cfg)
    folder.mkdir(parents=True, exist_ok=True)

    def begin(index: int, port: int | None) -> Server:
        devices = list(range(index * s.tensor, (index + 1) * s.tensor)) if on_gpu else None
        dtype = "bfloat16" if on_gpu else "float32"
        return launch.start(cfg, name=f"{host}-{index}", host=host, port=port, devices=devices, dtype=dtype)

    running = [begin(index, None) for index in range(servers)]
    files = [folder / f"{host}-{index}.json" for index in range(servers)]
    try:
        for server, file in zip(running, files, strict=True):
            server.wait_ready(s.start_seconds)
            file.write_text(json.dumps({"url": server.client.url}))
            print(f"{server.client.url} is ready", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(2.0)
                for index, server in enumerate(running):
                    if not server.is_running:
                        print(f"{server.client.url} ended; it is started again", flush=True)
                        server.stop()
                        running[index] = begin(index, int(server.client.url.rsplit(":", 1)[1]))
    finally:
        for server, file in zip(running, files, strict=True):
            file.unlink(missing_ok=True)
            server.stop()
