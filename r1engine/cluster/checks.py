"""`r1engine doctor --cluster FOLDER`: what makes an expensive start fail late, found in a minute.

    srun torchrun --nnodes N --nproc-per-node 8 ... -m r1engine doctor --cluster FOLDER

Every rank of the later run takes part. What goes over the hosts' network comes first, NCCL last: it may hang.
"""

from __future__ import annotations

import importlib.metadata
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from r1engine.cluster import shared_folder
from r1engine.cluster.gpu import read_gpu
from r1engine.cluster.ports import unreached
from r1engine.ranks import World

PACKAGES = ("r1engine", "torch", "triton", "megatron-core", "transformer-engine", "flash-attn", "transformers")
MAX_CLOCK_SECONDS = 1.0  # between two hosts
LEAST_SHARE = 0.8  # of the median speed of the others
MIB = 2**20


@dataclass(frozen=True)
class Finding:
    """A line of the table."""

    what: str
    found: str
    todo: str = ""  # what to do about it; "": it is as it should be


def examine(world: World, folder: Path, ports: range | None) -> list[Finding]:
    """Every check, one after the other; all ranks find the same. Collective.

    Args:
        world:  of `ranks.start`.
        folder: that is there, on the file system of the later run.
        ports:  that the run's servers and its refresh will listen to; None: any free one is tried.
    """
    hosts = world.everyones(socket.gethostname())
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("versions", lambda: versions(world, hosts)),
        ("clocks", lambda: clocks(world, hosts)),
        ("GPUs", lambda: gpus(world, hosts)),
        ("files", lambda: files(world, hosts, folder)),
        ("ports", lambda: reachable(world, hosts, ports)),
        ("all-reduce", lambda: all_reduce(world, hosts)),
    ]
    found = []
    for name, check in checks:
        if world.is_first:
            print(f"doctor: {name} ...", file=sys.stderr, flush=True)
        found += check()
    return found


def versions(world: World, hosts: list[str]) -> list[Finding]:
    """Of Python, the packages, NCCL and the driver."""
    everyones = world.everyones(_versions())
    findings = []
    for name in everyones[0]:
        there = [versions[name] for versions in everyones]
        todo = "" if len(set(there)) == 1 else f"install one version of {name} on all nodes (constraints.txt)"
        findings.append(Finding(name, _by_value(there, hosts), todo))
    return findings


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    has_gpu = torch.cuda.is_available()
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if has_gpu else "none: gloo"
    return found | {"CUDA of torch": torch.version.cuda or "none", "driver": read_gpu().driver}


def clocks(world: World, hosts: list[str]) -> list[Finding]:
    """How far the hosts' clocks are from each other."""
    rounds = []
    for _ in range(5):
        world.everyones(None)  # all leave it within milliseconds
        rounds.append(world.everyones(time.time()))
    offsets = [statistics.median(times[rank] - times[0] for times in rounds) for rank in range(world.size)]
    first, last = (offsets.index(bound) for bound in (max(offsets), min(offsets)))
    spread = offsets[first] - offsets[last]
    is_far = spread > MAX_CLOCK_SECONDS
    todo = f"{hosts[first]} is {spread:.1f} s before {hosts[last]}: let chronyd or ntpd set both" if is_far else ""
    return [Finding("clocks", f"within {spread:.3f} s", todo)]


def gpus(world: World, hosts: list[str]) -> list[Finding]:
    """Their kinds and what their own counters say; on GPUs also the speed of a matrix product."""
    everyones = world.everyones(read_gpu())
    kinds = [gpu.kind for gpu in everyones]
    findings = [Finding("GPUs", _by_value(kinds, hosts), "" if len(set(kinds)) == 1 else "use GPUs of one kind")]
    for rank, gpu in enumerate(everyones):
        findings += [Finding(f"GPU of rank {rank}, {hosts[rank]}", *problem) for problem in gpu.problems()]
    if world.device.type == "cuda":
        speeds = world.everyones(_matmul_tflops(world.device))
        slow = slower(speeds)
        named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in slow)
        todo = f"look at power, heat and neighbours of {named}, or leave it out" if slow else ""
        found = f"{statistics.median(speeds):,.0f} TFLOP/s, the slowest {min(speeds):,.0f}"
        findings.append(Finding("matrix product (bf16)", found, todo))
    return findings


def slower(speeds: list[float]) -> list[int]:
    """Places of those below LEAST_SHARE of the median."""
    return [place for place, speed in enumerate(speeds) if speed < LEAST_SHARE * statistics.median(speeds)]


def _matmul_tflops(device: torch.device, size: int = 8192, repeats: int = 20) -> float:
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        left @ right
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        left @ right
    torch.cuda.synchronize(device)
    return 2 * size**3 * repeats / (time.perf_counter() - began) / 1e12


def files(world: World, hosts: list[str], folder: Path) -> list[Finding]:
    """Whether each rank reads what each other writes in the folder, locks it, and how fast the hosts write and read."""
    seen = shared_folder.examine(world, hosts, folder)
    if seen.problems:
        return [Finding("files", text, todo) for text, todo in seen.problems]
    speeds = [
        f"{what} {min(per_host.values()):,.0f} MB/s a host at least"
        for what, per_host in (("write", seen.write_mb_s), ("read", seen.read_mb_s))
    ]
    found = f"{folder}: every rank reads every other's; {', '.join(speeds)}; {seen.free_gb:,.0f} GB free"
    return [Finding("files", found)]


def reachable(world: World, hosts: list[str], ports: range | None) -> list[Finding]:
    """Whether each host reaches a port of each other by its name."""
    missed = unreached(world, hosts, ports)
    which = f"{ports[0]}-{ports[-1]}" if ports else "any"
    if not missed:
        return [Finding("ports", f"{which}: each host reaches each of {len(set(hosts))}")]
    todo = "let the hosts' names stand for their addresses in the cluster, and open the ports between them"
    return [Finding("ports", text, todo) for text in missed[:8]]


def all_reduce(world: World, hosts: list[str]) -> list[Finding]:
    """Whether a sum over all ranks is right, and how fast it is: over all, and over the ranks of each host."""
    backend = dist.get_backend()
    own = [rank for rank in range(world.size) if hosts[rank] == hosts[world.rank]]
    rows: list[tuple[str, float, int]] = []  # which ranks, GB/s, sums that are wrong
    problem = ""
    try:
        groups = {host: dist.new_group([r for r, h in enumerate(hosts) if h == host]) for host in dict.fromkeys(hosts)}
        rows = [("all ranks", *_reduced(world, None, list(range(world.size))))]
        if len(groups) > 1 and len(own) > 1:
            rows.append((hosts[world.rank], *_reduced(world, groups[hosts[world.rank]], own)))
    except RuntimeError as error:  # torch's errors of ranks that do not answer are of this kind
        problem = str(error).strip().splitlines()[0]
    wrong = "; ".join(f"{count:,} sums over {name} are wrong" for name, _, count in rows if count)
    everyones = world.everyones((rows, problem or wrong))
    failed = [f"rank {rank} on {hosts[rank]}: {text}" for rank, (_, text) in enumerate(everyones) if text]
    if failed:
        todo = "start it with NCCL_DEBUG=INFO; look at the links (ibstat, nvidia-smi topo -m) of these hosts"
        return [Finding(f"all-reduce ({backend})", text, todo) for text in failed[:8]]
    speeds = {name: speed for per_rank, _ in reversed(everyones) for name, speed, _ in per_rank}
    within = {name: speed for name, speed in speeds.items() if name != "all ranks"}
    slow = [list(within)[place] for place in slower(list(within.values()))] if within else []
    todo = f"look at the links within {', '.join(slow)} (nvidia-smi nvlink -s)" if slow else ""
    found = f"right; {speeds['all ranks']:,.2f} GB/s of bus over all ranks" if world.size > 1 else "one rank: none"
    if within:
        found += f", {min(within.values()):,.2f} to {max(within.values()):,.2f} within a host"
    return [Finding(f"all-reduce ({backend})", found, todo)]


def _reduced(world: World, group: dist.ProcessGroup | None, ranks: list[int]) -> tuple[float, int]:
    """GB/s (median of five) and the sums of one round that are wrong, on the ranks of a group.

    The bytes are those that a ring sends over each link, 2 (n - 1) / n of the tensor.

    Raises:
        RuntimeError: the ranks do not meet.
    """
    on_gpu = world.device.type == "cuda"
    values = torch.arange((256 if on_gpu else 4) * MIB // 4, device=world.device, dtype=torch.int32) % 1024
    expected, seconds, wrong = values * sum(rank + 1 for rank in ranks), [], 0
    for _ in range(6):
        tensor = values * (world.rank + 1)
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        wrong = max(wrong, int((tensor != expected).sum()))
    size = 2 * (len(ranks) - 1) / len(ranks) * values.nbytes
    return size / statistics.median(seconds[1:]) / 1e9, wrong  # the first one connects


def _by_value(values: list[str], hosts: list[str]) -> str:
    """ "2.13.0", or "2.13.0 on node1; 2.12.0 on node2"."""
    there: dict[str, list[str]] = {}
    for value, host in zip(values, hosts, strict=True):
        if host not in there.setdefault(value, []):
            there[value].append(host)
    if len(there) == 1:
        return values[0]
    return "; ".join(
        f"{value} on {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for value, names in there.items()
    )


def print_findings(findings: list[Finding]) -> None:
    """One table, and below it what is to be done."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "check", "found", title="r1engine doctor --cluster")
    for finding in findings:
        table.add_row("[red]x[/red]" if finding.todo else "ok", escape(finding.what), escape(finding.found))
    console = Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "160")))
    console.print(table)
    for finding in findings:
        if finding.todo:
            console.print(f"{finding.what}: {finding.todo}", markup=False, highlight=False, soft_wrap=True)
