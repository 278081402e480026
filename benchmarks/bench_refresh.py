"""Weight refresh into a real SGLang server: seconds and bytes/s of each route, the cost of verifying, against a copy.

python benchmarks/bench_refresh.py --sglang-python .venv-sglang/bin/python      (CPU server; see `make sglang-cpu`)
torchrun --nproc-per-node 2 benchmarks/bench_refresh.py --sglang-python ...     (each rank sends its share)
python benchmarks/bench_refresh.py --smoke                                      (our side of it alone, no server)

Rows: `memcpy` (a copy of the same bytes in this process), `buckets` (cutting and pickling alone), and of each route the
send, with the bytes of the busiest rank of the trainer and those into a rank of the server, and the verification; at
the end the same arithmetic for 671B on paper.
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
from r1engine.model.state.dealing import Lot, deal
from r1engine.ranks import World, start, stop
from r1engine.rollout.sglang import launch
from r1engine.rollout.sglang.buckets import ATTENTION_BLOCK, buckets, flatten, payload
from r1engine.rollout.sglang.client import Client
from r1engine.rollout.sglang.delivery import ServerLayout
from r1engine.rollout.sglang.digest import CpuDigest
from r1engine.rollout.sglang.disk import WeightFolder
from r1engine.rollout.sglang.dispatch import Endpoint
from r1engine.rollout.sglang.key import key_of, run_key
from r1engine.rollout.sglang.refresh import Refresher, Report
from r1engine.rollout.sglang.server import free_ports

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
    world = start(30)
    for name, shape in list(SHAPES.items())[: 1 if args.smoke else None]:
        with tempfile.TemporaryDirectory() as own:
            folder = Path(world.from_first(lambda own=own: own))
            world.from_first(lambda folder=folder, shape=shape: make_folder(folder / "model", shape))
            measure(name, folder, args.sglang_python, rounds, device, world)
            world.wait()  # the first rank's folder goes last
    if world.is_first:
        on_paper(device)
    stop()


def measure(name: str, folder: Path, python: Path | None, rounds: int, device: torch.device, world: World) -> None:
    """Rows of one model size."""
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
        if not world.is_first:
            return
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
    processes = []
    if world.is_first:
        place = {"name": "server", "host": "127.0.0.1", "devices": None}
        processes = [launch.start(cfg, **place, port=None, dtype="float32")]
        processes += launch.start_receivers(cfg, **place, ports=free_ports(1))
    try:
        for process in processes:
            process.wait_ready(900.0)
        urls = world.from_first(lambda: [process.client.url for process in processes])
        server, receiver = (Client(url, stall_seconds=60.0, key=key_of(run_key(folder))) for url in urls)
        for route in ("tensor", "distributed", "receivers", "disk"):
            reports = refreshes(Endpoint(server, receivers=[receiver]), folder, tensors, route, rounds, world)
            sent, verified = ([report.seconds[part] for report in reports] for part in ("send", "verify"))
            memcpy = timing.summary(taken["memcpy"])["median"]
            busiest = max(report.most_bytes for report in reports)
            over = timing.summary(sent)["median"] / memcpy
            into = max(report.most_received for report in reports)
            own = {"bytes_of_busiest_rank": busiest, "bytes_into_busiest_server_rank": into, "ranks": world.size}
            row(f"{route} send", sent, over_memcpy=over, **own)
            both = [a + b for a, b in zip(sent, verified, strict=True)]
            share = timing.summary(verified)["median"] / timing.summary(both)["median"]
            row(f"{route} verify", verified, share_of_refresh=share)
    finally:
        for process in processes:
            process.stop()


def load(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder that has one file."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def refreshes(
    endpoint: Endpoint, folder: Path, tensors: dict[str, torch.Tensor], route: str, rounds: int, world: World
) -> list[Report]:
    """Reports of refreshes, each round with other weights; this rank sends its share."""
    refresher = Refresher(
        [endpoint],
        read_architecture(folder / "model"),
        world,
        layout=ServerLayout((range(1),)),
        route=route,
        bucket_bytes=BUCKET,
        folder=WeightFolder(folder / "weights", folder / "model"),
        digest=CpuDigest,
    )
    lots: dict[str, Lot] = {}
    for name, tensor in tensors.items():
        block = match[1] if (match := ATTENTION_BLOCK.match(name)) else name.split("_proj")[0].removesuffix(".up")
        lot = lots.setdefault(block.removesuffix(".gate"), Lot([], list(range(world.size))))
        lot.names.append(name)
        lot.size += tensor.numel()
    own = [lot for lot, rank in zip(lots.values(), deal(list(lots.values())), strict=True) if rank == world.rank]
    found = []
    for number in range(-1, rounds):
        changed = {name: tensors[name] + 0.001 * number for lot in own for name in lot.names}
        world.wait()
        found.append(refresher.refresh(iter(changed.items()), number + 2))
    refresher.close()
    return found[1:]


def on_paper(device: torch.device) -> None:
    """671B on 256 + 256 GPUs (docs/sglang.md), beside what others publish (their hardware, not ours). Not measured."""
    model, card, cards = 2 * 671.03, 50.0 * 0.7, 8  # GB in bf16; GB/s of a network adapter at 70 %; adapters of a node
    h800, h100 = 200.0 * 0.7, 450.0 * 0.7  # GB/s of NVLink, one direction, at 70 %
    timing.emit(
        "refresh",
        "671B on paper",
        device,
        {
            "gigabytes_of_busiest_rank_bf16": model / 256,
            "seconds_a_broadcast_at_a_time_bf16": model / card,
            "seconds_a_broadcast_at_a_time_fp8": model / 2 / card,
            "seconds_all_cards_of_a_node_h100_fp8": max(model / 2 / cards / card, model / 2 / h100),
            "seconds_all_cards_of_a_node_h800_fp8": max(model / 2 / cards / card, model / 2 / h800),
            "seconds_receivers_h800_bf16": receivers(2, card, h800),
            "seconds_receivers_h800_fp8": receivers(1, card, h800),
            "published_nemo_rl_nccl_reshard_671b_disaggregated": [2.39, 2.83],
            "published_slime_355b_colocated_bf16": 48.0,
            "published_slime_355b_colocated_fp8": 100.0,
        },
    )


def receivers(size: int, card: float, links: float) -> float:
    """Of equal shares: experts to the 16 GPUs of a server, all else once to each node of 8 and there passed on."""
    experts, others = size * 653.9, size * 17.13  # GB
    return (experts / 16 + others / 8) / card + others * 7 / 8 / links


if __name__ == "__main__":
    main()
