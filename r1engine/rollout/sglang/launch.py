"""Where a run's servers come from: started beside the trainer, started by `r1engine serve`, or given by URL."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from r1engine.config import RlConfig, Sglang
from r1engine.hf.architecture import YarnScaling, read_architecture
from r1engine.rollout.sglang.client import Client, ServerError
from r1engine.rollout.sglang.key import key_of, run_key
from r1engine.rollout.sglang.server import Server, check_environment, free_port, url_of, visible_gpus


def command(cfg: RlConfig, *, host: str, port: int, dtype: str, on_gpu: bool) -> list[str]:
    """Command line of one server of `cfg`."""
    s = cfg.rollout.sglang
    assert s.python is not None
    options = {
        "--model-path": cfg.model.folder,
        "--host": host,
        "--port": port,
        "--tp-size": s.tensor,
        "--ep-size": s.expert,
        "--dtype": dtype,
        "--stream-interval": s.stream_interval,
        "--random-seed": cfg.seed,
    }
    flags = ["--skip-tokenizer-init", "--skip-server-warmup", "--incremental-streaming-output", "--weight-version=none"]
    if on_gpu:
        options["--mem-fraction-static"] = s.memory_fraction
        if s.mode == "colocated":
            # Without the copy on the host, weights that were given back come back without content.
            flags += ["--enable-memory-saver", "--enable-weights-cpu-backup"]
    else:
        options |= {"--device": "cpu", "--attention-backend": "torch_native", "--sampling-backend": "pytorch"}
        options |= {"--grammar-backend": "none", "--max-total-tokens": s.cpu_tokens}
        options["--max-running-requests"] = cfg.rollout.slots
        flags.append("--sleep-on-idle")  # an idle scheduler spins a core without it
    arch = read_architecture(cfg.model.folder)
    if isinstance(arch.rope_scaling, YarnScaling):
        options["--context-length"] = arch.max_positions
    if cfg.model.routing_replay and arch.moe is not None:
        flags.append("--enable-return-routed-experts")
    if s.deterministic:
        flags.append("--enable-deterministic-inference")
    words = [str(word) for option in options.items() for word in option]
    return [str(s.python), "-m", "sglang.launch_server", *words, *flags, *s.args]


def environment(s: Sglang, *, devices: list[int] | None) -> dict[str, str]:
    """Variables of a server: its GPUs, or what makes SGLang run on CPUs.

    Args:
        s:       settings of the servers.
        devices: its GPUs as PyTorch numbers them in this process; None for CPUs.
    """
    # YaRN's context is longer than the max_position_embeddings of folders that give the original one.
    common = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    if devices is not None:
        if s.mode == "colocated":  # else /health generates a token, also while the memory for it is given back
            common["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
        return common | {"CUDA_VISIBLE_DEVICES": visible_gpus(devices)}
    env = common | {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    if s.tensor > 1:
        env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(core) for core in range(s.tensor))
    return env


def start(cfg: RlConfig, *, name: str, host: str, port: int | None, devices: list[int] | None, dtype: str) -> Server:
    """Start one server of `cfg`; see Server.

    Args:
        name:    of its log file in the run folder.
        host:    to listen on.
        port:    None picks a free one.
        devices: its GPUs; None for CPUs.
        dtype:   of its weights.
    """
    s = cfg.rollout.sglang
    assert s.python is not None
    check_environment(s.python)
    port = port or free_port(host, s.port_range)
    key = run_key(cfg.run_dir)
    return Server(
        [*command(cfg, host=host, port=port, dtype=dtype, on_gpu=devices is not None), "--config", str(key)],
        environment(s, devices=devices),
        url=url_of(host, port),
        log=cfg.run_dir / "sglang" / f"{name}.log",
        stall_seconds=s.stall_seconds,
        key=key_of(key),
    )


def start_receivers(
    cfg: RlConfig, *, name: str, host: str, ports: list[int], devices: list[int] | None
) -> list[Server]:
    """Start the processes beside the ranks of one server (route: receivers).

    Args:
        name:    of the server's log file; theirs are NAME-receiver0.log and so on.
        host:    to listen on.
        ports:   one a rank.
        devices: the ranks' GPUs; None for CPUs.
    """
    s = cfg.rollout.sglang
    key = run_key(cfg.run_dir)
    started = []
    for place, port in enumerate(ports):
        command = [sys.executable, "-m", "r1engine.rollout.sglang.receiver", "--host", host, "--port", str(port)]
        started.append(
            Server(
                [*command, "--key", str(key)],
                {"OMP_NUM_THREADS": "1"} if devices is None else environment(s, devices=[devices[place]]),
                url=url_of(host, port),
                log=cfg.run_dir / "sglang" / f"{name}-receiver{place}.log",
                stall_seconds=s.stall_seconds,
                key=key_of(key),
            )
        )
    return started


def check_server(client: Client, cfg: RlConfig, *, dtype: str | None) -> dict:
    """That a server serves this model with enough context; its /server_info.

    Args:
        client: of the server.
        cfg:    of the run.
        dtype:  of the trainer's weights; None: not known.

    Raises:
        ValueError: unreachable, another version of SGLang, another model, tokenizer, precision or layout, or too short
            a context.
    """
    s = cfg.rollout.sglang
    model_path, longest, tensor = cfg.model.folder, cfg.longest_sequence, s.tensor
    try:
        info = client.get("/server_info")
        model = client.get("/model_info")
    except ServerError as error:
        raise ValueError(f"rollout.sglang.urls: {error}; required a running server") from error
    served = Path(str(model.get("model_path")))
    if not _is_same_model(served, model_path):
        raise ValueError(f"rollout.sglang: {client.url} serves {served}, required is model.path = {model_path}")
    tokenizer = Path(str(info.get("tokenizer_path") or served))
    if not info.get("skip_tokenizer_init") and not _is_same_file(tokenizer, model_path, "tokenizer.json"):
        raise ValueError(f"rollout.sglang: {client.url} has the tokenizer of {tokenizer}, required is {model_path}'s")
    if (ranks := info.get("tp_size", tensor)) != tensor:
        raise ValueError(
            f"rollout.sglang: {client.url} has {ranks} tensor-parallel ranks, required are {tensor} "
            "(rollout.sglang.tensor)"
        )
    if (groups := info.get("ep_size", s.expert)) != s.expert:
        raise ValueError(
            f"rollout.sglang: {client.url} spreads experts over {groups} groups, required are {s.expert} "
            "(rollout.sglang.expert)"
        )
    if s.route == "receivers" and (info.get("enable_eplb") or info.get("ep_num_redundant_experts")):
        raise ValueError(
            f"rollout.sglang: {client.url} moves or doubles experts (--enable-eplb, --ep-num-redundant-experts), "
            "required with rollout.sglang.route receivers are experts in their places"
        )
    if dtype is not None and (found := info.get("dtype", "auto")) not in ("auto", dtype):
        raise ValueError(f"rollout.sglang: {client.url} computes in {found}, required is the trainer's {dtype}")
    context = info.get("context_length") or info.get("max_req_input_len") or longest
    if context < longest:
        raise ValueError(
            f"rollout.sglang: {client.url} takes {context} tokens, required are {longest} "
            "(data.max_prompt_tokens + rollout.max_tokens)"
        )
    if not info.get("incremental_streaming_output"):
        raise ValueError(f"rollout.sglang: {client.url} was started without --incremental-streaming-output")
    return info


def _is_same_model(served: Path, required: Path) -> bool:
    """The same folder, or another one of the same architecture: the disk route leaves a server with such a folder."""
    if _is_same_file(served, required, "config.json"):
        return True
    return (served / "config.json").is_file() and read_architecture(served) == read_architecture(required)


def _is_same_file(folder: Path, other: Path, name: str) -> bool:
    if os.path.realpath(folder) == os.path.realpath(other):
        return True
    files = folder / name, other / name
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()
