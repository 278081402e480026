"""RMSNorm and SwiGLU on the CPU against their formulas in float64, and memory that malloc keeps."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import on_ranks

from r1engine.model.cpu import keep_freed_memory
from r1engine.model.layers import pointwise as fused
from r1kernels import cpu_lib

ROWS, SIZE = 700, 192  # several blocks and a part of one


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_same(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max()))


def exact_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def exact_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def test_rms_norm_and_its_gradients_are_those_of_the_formula() -> None:
    x, weight = torch.randn(ROWS, 1, SIZE, requires_grad=True), torch.randn(SIZE, requires_grad=True)
    grad = torch.randn(ROWS, 1, SIZE)
    out = fused.rms_norm(x, weight, 1e-3)
    gradients = torch.autograd.grad(out, (x, weight), grad)
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in (x, weight))
    exact = exact_rms_norm(*exact_inputs, 1e-3)
    assert_same((out, *gradients), (exact, *torch.autograd.grad(exact, exact_inputs, grad.double())))
    with torch.no_grad():
        torch.testing.assert_close(fused.rms_norm(x, weight, 1e-3), out)


def test_rms_norm_takes_gradients_that_are_not_contiguous() -> None:
    x, weight = torch.randn(ROWS, SIZE, requires_grad=True), torch.ones(SIZE, requires_grad=True)
    grad = torch.randn(SIZE, ROWS).t()
    (got,) = torch.autograd.grad(fused.rms_norm(x, weight, 1e-6), x, grad)
    (wanted,) = torch.autograd.grad(fused.rms_norm(x, weight, 1e-6), x, grad.contiguous())
    if cpu_lib.takes():
        assert torch.equal(got, wanted)
    torch.testing.assert_close(got, wanted)  # PyTorch's own norm sums in another order


def test_swiglu_and_its_gradient_are_those_of_the_formula() -> None:
    gate_up = (4 * torch.randn(ROWS, 1, 2 * SIZE)).requires_grad_()
    grad = torch.randn(ROWS, 1, SIZE)
    out = fused.swiglu(gate_up)
    exact_input = gate_up.detach().double().requires_grad_()
    exact = exact_swiglu(exact_input)
    assert_same(
        (out, *torch.autograd.grad(out, gate_up, grad)),
        (exact, *torch.autograd.grad(exact, exact_input, grad.double())),
    )


def test_no_tokens_are_no_error() -> None:
    x, gate_up = torch.empty(0, 1, SIZE, requires_grad=True), torch.empty(0, 1, 2 * SIZE, requires_grad=True)
    weight = torch.ones(SIZE, requires_grad=True)
    (fused.rms_norm(x, weight, 1e-6).sum() + fused.swiglu(gate_up).sum()).backward()
    assert x.grad.shape == x.shape and gate_up.grad.shape == gate_up.shape and not weight.grad.any()


def late_page_faults(is_kept: bool) -> int:
    """Of allocating 36 MiB, above every limit of glibc's own heap policy, and freeing it, four times."""
    if is_kept:
        keep_freed_memory()

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.ones(9 * 2**20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    for _ in range(8):  # aligned blocks do not fit their own holes at first: the heap grows by a few of them
        faults()
    return faults()


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults by getrusage of Linux")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    (kept,), (by_default,) = (on_ranks(1, late_page_faults, is_kept) for is_kept in (True, False))
    assert kept * 10 < by_default, (kept, by_default)


def test_the_heap_has_large_pages_where_the_system_gives_them() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no transparent huge pages")
    script = """
import torch
from r1engine.model.cpu import keep_freed_memory
keep_freed_memory()
kept = torch.ones(64 * 2**20)
print(next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 64 * 2**10  # kB, of 256 MiB: the system may be short of large pages
