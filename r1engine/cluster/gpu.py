"""What the driver says of the GPU of this process: its kind, and the counters of its health. Through nvidia-ml-py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from r1engine.observe.metrics import nvml_device

Value = TypeVar("Value")
# nvml.h, nvmlClocksEventReasons: what lowers the clocks other than idling, settings and the limit of power.
SLOWING = {0x8: "hardware slowdown", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power brake (hardware)"}
IN_USE_GB = 4.0  # a context of our own takes less than 1


@dataclass(frozen=True)
class GpuState:
    """None: the device does not say."""

    name: str = "none"
    driver: str = "none"
    max_sm_mhz: int | None = None
    nvlinks: int | None = None  # that are up
    pcie_width: int | None = None
    max_pcie_width: int | None = None
    ecc_errors: int | None = None  # that could not be corrected, since the last reset
    is_remapping_pending: bool | None = None  # of rows of memory
    has_remapping_failed: bool | None = None
    slowed_by: int | None = None  # bits of SLOWING and others
    used_gb: float | None = None

    @property
    def kind(self) -> str:
        """What the GPUs of a run have in common."""
        clock = f", {self.max_sm_mhz} MHz" if self.max_sm_mhz else ""
        return self.name + clock + (f", {self.nvlinks} NVLinks" if self.nvlinks is not None else "")

    def problems(self) -> list[tuple[str, str]]:
        """(what was found, what to do)."""
        found = []
        if self.ecc_errors:
            found.append(
                (f"{self.ecc_errors} uncorrected ECC errors", "reset it (nvidia-smi -r); if they return, drain")
            )
        if self.has_remapping_failed:
            found.append(("a row of its memory could not be remapped", "drain the node: the board is replaced"))
        if self.is_remapping_pending:
            found.append(("a row of its memory waits to be remapped", "reset it (nvidia-smi -r)"))
        if slowed := [text for bit, text in SLOWING.items() if (self.slowed_by or 0) & bit]:
            found.append((f"slowed by {', '.join(slowed)}", "look at cooling and power of the node"))
        if self.pcie_width is not None and self.max_pcie_width is not None and self.pcie_width < self.max_pcie_width:
            found.append((f"{self.pcie_width} of {self.max_pcie_width} lanes of PCIe", "reseat it, or drain the node"))
        if (self.used_gb or 0.0) > IN_USE_GB:
            found.append((f"{self.used_gb:.1f} GB of its memory in use", "end what runs there (nvidia-smi)"))
        return found


def read_gpu() -> GpuState:
    """Of this process; that of a machine without a driver or nvidia-ml-py is none, with a name that says so."""
    import torch

    handle = nvml_device()
    if handle is None:
        is_there = torch.cuda.is_available()
        name = torch.cuda.get_device_name() if is_there else "none"
        return GpuState(name, "unknown without nvidia-ml-py" if is_there else "none")
    import pynvml as nvml

    def told(read: Callable[[], Value]) -> Value | None:
        with suppress(nvml.NVMLError):  # not of this device, or not for this user
            return read()
        return None

    remapped = told(lambda: nvml.nvmlDeviceGetRemappedRows(handle))  # corrected, not corrected, pending, failed
    return GpuState(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        driver=_text(nvml.nvmlSystemGetDriverVersion()),
        max_sm_mhz=told(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        nvlinks=_nvlinks(nvml, handle),
        pcie_width=told(lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)),
        max_pcie_width=told(lambda: nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
        ecc_errors=told(
            lambda: nvml.nvmlDeviceGetTotalEccErrors(
                handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            )
        ),
        is_remapping_pending=None if remapped is None else bool(remapped[2]),
        has_remapping_failed=None if remapped is None else bool(remapped[3]),
        slowed_by=told(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        used_gb=told(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / 1e9),
    )


def _nvlinks(nvml: Any, handle: Any) -> int | None:
    """Those that are up; None where the device has none."""
    states = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            states.append(nvml.nvmlDeviceGetNvLinkState(handle, link))
        except nvml.NVMLError:
            break
    return sum(states) if states else None


def _text(value: str | bytes) -> str:
    """Older versions of nvidia-ml-py return bytes."""
    return value.decode() if isinstance(value, bytes) else value
