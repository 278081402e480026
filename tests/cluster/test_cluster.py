"""`r1engine doctor --cluster`: a good cluster passes, and each fault is found, with the host that has it."""

import importlib.metadata
import os
import re
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.cluster.checks import Finding, print_findings, slower
from r1engine.cluster.gpu import GpuState, read_gpu

HOSTS = ("localhost", "127.0.0.1")  # two names of this machine


def examined(folder: Path, ports: range | None, faults: bool) -> list[Finding]:
    """Of two ranks, each on a host of its own; the second one has every fault."""
    from r1engine import ranks
    from r1engine.cluster.checks import examine

    world = ranks.start(timeout_minutes=2)
    host = HOSTS[world.rank]
    if faults:
        os.chdir(folder / str(world.rank))
        folder = Path("run")  # another one on each
        if world.rank == 1:
            break_rank()
            host = "no-such-host.invalid"
    socket.gethostname = lambda: host
    found = examine(world, folder, ports)
    ranks.stop()
    return found


def commanded(folder: Path) -> tuple[int, str]:
    """Status and words of the command."""
    done = CliRunner().invoke(app, ["doctor", "--cluster", str(folder)])
    return done.exit_code, done.stdout


def break_rank() -> None:
    """Another version, a wrong clock, a link that changes a bit."""
    version, now, reduce = importlib.metadata.version, time.time, dist.all_reduce
    importlib.metadata.version = lambda name: "2.12.0" if name == "torch" else version(name)
    time.time = lambda: now() - 100

    def flipped(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
        reduce(tensor, group=group)
        tensor[1000] ^= 1

    dist.all_reduce = flipped


def test_a_good_cluster_passes(tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        ports = range(port, port + 9)
        found, again = on_ranks(2, examined, tmp_path, ports, False)
    assert found == again
    assert [finding for finding in found if finding.todo] == []
    told = {finding.what: finding.found for finding in found}
    assert told["torch"] == torch.__version__
    assert told["ports"] == f"{port}-{port + 8}: each host reaches each of 2"
    assert told["all-reduce (gloo)"].startswith("right; ")
    assert list(tmp_path.iterdir()) == []  # nothing is left


def test_each_fault_is_found_with_its_host(tmp_path):
    for rank in "01":
        (tmp_path / rank / "run").mkdir(parents=True)
    found = on_ranks(2, examined, tmp_path, None, True)[0]
    told = {finding.what: (finding.found, finding.todo) for finding in found if finding.todo}
    assert set(told) == {"torch", "clocks", "files", "ports", "all-reduce (gloo)"}
    assert told["torch"][0] == f"{torch.__version__} on localhost; 2.12.0 on no-such-host.invalid"
    assert re.match(r"localhost is (99|100)\.\d s before no-such-host\.invalid: let ", told["clocks"][1])
    assert "does not see what rank 0 wrote in run" in told["files"][0]
    assert "no-such-host.invalid does not reach no-such-host.invalid port " in told["ports"][0]
    assert told["all-reduce (gloo)"][0] == "rank 1 on no-such-host.invalid: 1 sums over all ranks are wrong"


def test_the_command_ends_with_what_to_do(tmp_path, capsys):
    print_findings([Finding("torch", "2.13.0"), Finding("clocks", "within 9 s", "start chronyd on [node7]")])
    shown = capsys.readouterr().out
    assert "ok" in shown and "clocks: start chronyd on [node7]\n" in shown
    for arguments, said in [
        (["--cluster"], "required a folder on the file system of the later run"),
        (["--ports", "1-2"], "required --cluster with it"),
        (["--cluster", str(tmp_path), "--ports", "x"], "found x, required FIRST-LAST"),
    ]:
        done = CliRunner().invoke(app, ["doctor", *arguments])
        assert done.exit_code == 2 and said in done.stderr
    status, shown = on_ranks(1, commanded, tmp_path / "none")[0]  # it leaves torch.distributed, which other tests use
    assert status == 1 and "take a folder that every rank can write in" in shown


def test_a_slow_one_is_below_four_fifths_of_the_median():
    assert slower([100.0, 99.0, 79.0, 101.0]) == [2]
    assert slower([100.0, 81.0]) == []


def test_the_counters_of_a_gpu_are_read_and_judged(monkeypatch):
    class NotSupported(Exception):
        pass

    def no_nvlink(handle: object, link: int) -> int:
        if link > 1:
            raise NotSupported
        return 1 - link

    errors = {"NVMLError_LibraryNotFound": OSError, "NVMLError_DriverNotLoaded": OSError}
    nvml = SimpleNamespace(
        **errors, NVMLError_NoPermission=OSError, NVMLError=NotSupported, NVML_CLOCK_SM=1, NVML_NVLINK_MAX_LINKS=18,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1, NVML_VOLATILE_ECC=0, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: "gpu", nvmlDeviceGetName=lambda handle: b"H100",
        nvmlSystemGetDriverVersion=lambda: "570.1", nvmlDeviceGetMaxClockInfo=lambda handle, kind: 1980,
        nvmlDeviceGetNvLinkState=no_nvlink, nvmlDeviceGetCurrPcieLinkWidth=lambda handle: 8,
        nvmlDeviceGetMaxPcieLinkWidth=lambda handle: 16, nvmlDeviceGetTotalEccErrors=lambda handle, kind, since: 3,
        nvmlDeviceGetRemappedRows=lambda handle: (1, 1, 1, 0),
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x40 | 0x4,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=9e9),
    )  # fmt: skip
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    from r1engine.observe.metrics import nvml_device

    nvml_device.cache_clear()
    gpu = read_gpu()
    nvml_device.cache_clear()
    assert gpu == GpuState("H100", "570.1", 1980, 1, 8, 16, 3, True, False, 0x44, 9.0)
    assert gpu.kind == "H100, 1980 MHz, 1 NVLinks"
    assert [found for found, _ in gpu.problems()] == [
        "3 uncorrected ECC errors",
        "a row of its memory waits to be remapped",
        "slowed by heat (hardware)",
        "8 of 16 lanes of PCIe",
        "9.0 GB of its memory in use",
    ]


@pytest.mark.parametrize("state", [GpuState(), GpuState("L40S", pcie_width=16, max_pcie_width=16, slowed_by=0x5)])
def test_what_a_gpu_does_not_say_is_no_fault(state):
    assert state.problems() == []
