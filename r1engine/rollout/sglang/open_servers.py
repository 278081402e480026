"""SGLang servers that speak OpenAI's interface for a folder: for evaluations, and for harnesses of others.

A training run's servers have no tokenizer and take token ids alone; these have the folder's, with its chat template.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from r1engine.hf.architecture import YarnScaling, read_architecture
from r1engine.rollout.sglang.key import NAME, is_local, private_file
from r1engine.rollout.sglang.server import Server, check_environment, free_port, url_of, visible_gpus

KEY_VARIABLE = "SGLANG_API_KEY"  # environment variable with the key that they ask for; without it they ask for none


@dataclass(frozen=True)
class OpenServers:
    """Which servers to start."""

    folder: Path  # of the model
    python: Path  # interpreter of the environment that sglang is installed in
    log: Path  # folder of their logs
    servers: int = 1
    tensor: int = 1  # GPUs of one
    memory_fraction: float = 0.85  # of GPU memory, for weights and KV pool
    reasoning: str = ""  # SGLang's parser that takes thoughts out of the text; "": they stay in it
    host: str = "127.0.0.1"
    port: int | None = None  # of the first; None: free ones
    start_seconds: float = 900.0
    args: list[str] = field(default_factory=list)

    def command(self, port: int, *, on_gpu: bool) -> list[str]:
        """Command line of a server."""
        options: dict[str, object] = {
            "--model-path": self.folder,
            "--served-model-name": self.folder.resolve().name,
            "--host": self.host,
            "--port": port,
            "--tp-size": self.tensor,
            "--dtype": "bfloat16" if on_gpu else "float32",
        }
        flags = ["--skip-server-warmup"]
        if on_gpu:
            options["--mem-fraction-static"] = self.memory_fraction
        else:
            options |= {"--device": "cpu", "--attention-backend": "torch_native", "--sampling-backend": "pytorch"}
            options |= {"--grammar-backend": "none", "--max-total-tokens": 16_384}
            flags.append("--sleep-on-idle")  # an idle scheduler spins a core without it
        arch = read_architecture(self.folder)
        if isinstance(arch.rope_scaling, YarnScaling):
            options["--context-length"] = arch.max_positions
        if self.reasoning:
            options["--reasoning-parser"] = self.reasoning
        words = [str(word) for option in options.items() for word in option]
        return [str(self.python), "-m", "sglang.launch_server", *words, *flags, *self.args]

    def environment(self, index: int, *, on_gpu: bool) -> dict[str, str]:
        """Variables of a server: its GPUs, or what makes SGLang run on CPUs."""
        common = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}  # YaRN, where the folder gives the original one
        if not on_gpu:
            return common | {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
        own = range(index * self.tensor, (index + 1) * self.tensor)
        return common | {"CUDA_VISIBLE_DEVICES": visible_gpus(own)}

    def _key(self) -> str:
        """That they ask for; "": none."""
        key = os.environ.get(KEY_VARIABLE, "")
        if not key and not is_local(self.host):
            raise ValueError(
                f"serve: found host {self.host} and no key, required one in the environment variable {KEY_VARIABLE}: "
                "whoever reaches a server without a key commands it"
            )
        return key

    def start(self, note: Callable[[str], None]) -> list[Server]:
        """Starts the servers and waits until each answers.

        Raises:
            ValueError: fewer GPUs than they need, no usable SGLang, a port that is taken, or no key for servers that
                other machines reach.
            RuntimeError: one does not start; the others are stopped.
        """
        on_gpu = torch.cuda.is_available()
        if on_gpu and self.servers * self.tensor > torch.cuda.device_count():
            raise ValueError(
                f"sglang: {self.servers} servers of {self.tensor} GPUs need {self.servers * self.tensor}, this machine "
                f"has {torch.cuda.device_count()}"
            )
        key = self._key()
        check_environment(self.python)
        asks = ["--config", str(private_file(self.log / NAME, key))] if key else []
        started: list[Server] = []
        try:
            for index in range(self.servers):
                port = self.port + index if self.port is not None else free_port(self.host)
                started.append(
                    Server(
                        [*self.command(port, on_gpu=on_gpu), *asks],
                        self.environment(index, on_gpu=on_gpu),
                        url=url_of(self.host, port),
                        log=self.log / f"server{index}.log",
                        stall_seconds=60.0,
                        key=key,
                    )
                )
            for server in started:
                server.wait_ready(self.start_seconds)
                note(f"{server.client.url} is ready (log: {server.log})")
        except BaseException:
            for server in started:
                server.stop()
            raise
        return started


def serve_folder(wanted: OpenServers, note: Callable[[str], None] = print) -> None:
    """Runs the servers until Ctrl-C, and says how harnesses are pointed at them.

    Raises:
        ValueError, RuntimeError: see `OpenServers.start`; or a server ends.
    """
    servers = wanted.start(note)
    name, url = wanted.folder.resolve().name, f"{servers[0].client.url}/v1"
    has_key = KEY_VARIABLE in os.environ
    held, asks = (f"${KEY_VARIABLE}", f" endpoint.key_variable={KEY_VARIABLE}") if has_key else ("none", "")
    note(f"r1engine evaluate {url} SUITE.yaml endpoint.model={name}{asks}")
    note(
        f"lm_eval --model local-chat-completions --apply_chat_template --tasks TASKS "
        f"--model_args model={name},base_url={url}/chat/completions,num_concurrent=64"
    )
    note(f"OPENAI_BASE_URL={url} OPENAI_API_KEY={held} simple-evals or inspect eval TASK --model openai/{name}")
    try:
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(2.0)
                for server in servers:
                    server.rotate_log()
                    if not server.is_running:
                        raise RuntimeError(f"{server.client.url} ended; the reason is in {server.log}")
    finally:
        for server in servers:
            server.stop()
