"""Weight refresh into a real SGLang server: seconds and bytes/s of each route, the cost of verifying, against a copy.

python benchmarks/bench_refresh.py --sglang-python .venv-sglang/bin/python      (CPU server; see `make sglang-cpu`)
python benchmarks/bench_refresh.py --smoke                                      (our side of it alone, no server)

Rows: `memcpy` (a copy of the same bytes in this process), `buckets` (cutting and pickling alone), and of each route the
send and the verification; at the end the same arithmetic for 671B on paper.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import timing
import torch
from step_model import Shape, make_folder

from r1engine.config import Model, RlConfig, Rollout, Sglang
from r1engine.hf.architecture import read_architecture
from r1engine.rollout.sglang import launch
from r1engine.rollout.sglang.buckets import buckets, flatten, payload
from r1engine.rollout.sglang.client import Client
from r1engine.rollout.sglang.digest import CpuDigest
from r1engine.rollout.sglang.disk import WeightFolder
from r1engine.rollout.sglang.dispatch import Endpoint
from r1engine.rollout.sglang.refresh import Refresher

SHAPES = {
    "3M": Shape(hidden=256, layers=4, heads=4, kv_heads=2, intermediate=704),
    "45M": Shape(hidden=768, layers=7, heads=12, kv_heads=4, intermediate=2048),
}
BUCKET = 64 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sglang-python", type=Path, help="Python of SGLang's environment; without it no server")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    device = timing.use_device("cpu")  # a server on a GPU is another process's; the weights start on the host here
    rounds = 2 if args.smoke else args.rounds
    for name, shape in list(SHAPES.items())[: 1 if args.smoke else None]:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, shape, Path(folder), args.sglang_python, rounds, device)
    on_paper(device)


def measure(name: str, shape: Shape, folder: Path, python: Path | None, rounds: int, device: torch.device) -> None:
    """Rows of one model size."""
    make_folder(folder / "model", shape)
    tensors = {n: p.detach() for n, p in load(folder / "model").items()}
    num_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    targets = {n: torch.empty_like(t) for n, t in tensors.items()}

    def copy() -> None:
        for n, tensor in tensors.items():
            targets[n].copy_(tensor)

    def pickle_all() -> None:
        for bucket in buckets(iter(tensors.items()), BUCKET):
            payload(bucket, flatten(bucket))

    def row(what: str, values: list[float], **more: float) -> None:
        stats = timing.summary(values)
        more["gb_s"] = num_bytes / stats["median"] / 1e9
        timing.emit("refresh", f"{name} {what}", device, stats | {"bytes": num_bytes} | more)

    taken = timing.interleaved(
        {
            "memcpy": lambda: timing.seconds(copy, device),
            "buckets": lambda: timing.seconds(pickle_all, device),
        },
        rounds=rounds,
        warmup=1,
    )
    for what, values in taken.items():
        row(what, values)
    if python is None:
        timing.note("refresh: no --sglang-python, so no server and no routes")
        return
    settings = Sglang(python=python, cpu_tokens=4096)
    cfg = RlConfig(
        run_dir=folder, model=Model(path=folder / "model"), rollout=Rollout(engine="sglang", sglang=settings)
    )
    server = launch.start(cfg, name="server", host="127.0.0.1", port=None, devices=None, dtype="float32")
    try:
        server.wait_ready(600.0)
        for route in ("tensor", "distributed", "disk"):
            sent, verified = refreshes(server.client, folder, tensors, route, rounds)
            memcpy = timing.summary(taken["memcpy"])["median"]
            row(f"{route} send", sent, over_memcpy=timing.summary(sent)["median"] / memcpy)
            share = timing.summary(verified)["median"] / timing.summary(sent)["median"]
            row(f"{route} verify", verified, share_of_send=share)
    finally:
        server.stop()


def load(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder that has one file."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def refreshes(client: Client, folder: Path, tensors: dict, route: str, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of sending and of verifying, each round with other weights."""
    refresher = Refresher(
        [Endpoint(client)],
        read_architecture(folder / "model"),
        ranks=1,
        route=route,
        bucket_bytes=BUCKET,
        folder=WeightFolder(folder / "weights", folder / "model"),
        digest=CpuDigest,
    )
    sent, verified = [], []
    for round_number in range(-1, rounds):
        changed = {n: t + 0.001 * round_number for n, t in tensors.items()}
        report = refresher.refresh(
            iter(changed.items()),
            round_number + 2,
        )
        if round_number >= 0:
            sent.append(report.seconds["send"])
            verified.append(report.seconds["verify"])
    refresher.close()
    return sent, verified


def on_paper(device: torch.device) -> None:
    """671B, what a network card allows (docs/sglang.md), beside what others publish (their hardware, not ours)."""
    gigabytes, network, cards = 2 * 671.03, 50.0 * 0.7, 8  # GB/s of a card at 70 %, cards of a node
    timing.emit(
        "refresh",
        "671B on paper",
        device,
        {
            "seconds_first_rank_sends_bf16": gigabytes / network,
            "seconds_first_rank_sends_fp8": gigabytes / 2 / network,
            "seconds_a_node_gathers_its_eighth_bf16": gigabytes / cards / network,
            "published_nemo_rl_nccl_reshard_671b_disaggregated": [2.39, 2.83],
            "published_slime_355b_colocated_bf16": 48.0,
            "published_slime_355b_colocated_fp8": 100.0,
        },
    )


if __name__ == "__main__":
    main()
