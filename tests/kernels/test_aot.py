"""The harness that compiles kernels for absent GPUs sees what it is for: rounding, wide loads, local memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import aot
import pytest

ROUND = f"{Path(__file__).with_name('test_triton_cast.py')}:round_kernel"
BLOCK = {"BLOCK": 1024}

CUDA = """
__global__ void wide(const float4* x, float4* out) { out[threadIdx.x] = x[threadIdx.x]; }
__global__ void local(const int* index, float* out) {
    float table[32];
    for (int i = 0; i < 32; i++) table[i] = out[i];
    for (int i = 0; i < 32; i++) table[index[i] & 31] += 1.0f;
    out[threadIdx.x] = table[index[threadIdx.x] & 31] + (float)(1.1 * (double)out[threadIdx.x]);
}
"""


@pytest.fixture(scope="module")
def compiled() -> list[aot.Compiled]:
    def kernel(dtype: str, arch: int, **options: object) -> aot.Kernel:
        return aot.Kernel(ROUND, {"x_ptr": "*fp32", "out_ptr": f"*{dtype}", "size": "i32"}, BLOCK, arch, **options)

    cases = [("bf16", 80), ("bf16", 90), ("fp8e4nv", 90), ("fp8e4nv", 100)]
    return aot.compile_triton([*(kernel(*case) for case in cases), kernel("bf16", 90, unaligned=("x_ptr", "size"))])


@pytest.mark.machine_code
def test_gpus_round_in_hardware(compiled):
    # What the interpreter is given integer routines for is one instruction, to nearest even, saturating for e4m3.
    bf16_80, bf16_90, e4m3_90, e4m3_100, _ = compiled
    assert "cvt.rn.bf16" in bf16_80.ptx
    assert "cvt.rn.bf16" in bf16_90.ptx
    assert "cvt.rn.satfinite.e4m3x2.f32" in e4m3_90.ptx
    assert "cvt.rn.satfinite.e4m3x2.f32" in e4m3_100.ptx
    assert [".target sm_90a" in c.ptx for c in compiled] == [False, True, True, False, True]


@pytest.mark.machine_code
def test_alignment_decides_the_width_of_loads(compiled):
    *aligned, unaligned = compiled
    assert all(c.count("LDG", "128") == 2 and c.count("LDG") == 2 for c in aligned)
    assert unaligned.count("LDG", "128") == 0
    assert unaligned.count("LDG") == 8
    assert all(c.spill_free and 0 < c.registers < 64 for c in compiled)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_reads_a_cubin_of_nvcc(tmp_path):
    source = tmp_path / "two.cu"
    source.write_text(CUDA)
    made = {
        name: kernel
        for mangled, kernel in aot.compile_cuda(source).items()
        for name in ("wide", "local")
        if name in mangled
    }
    assert made["wide"].spill_free
    assert made["wide"].count("LDG", "128") == 1
    assert not made["local"].spill_free
    assert made["local"].stack_bytes == 128
    assert ".f64" in made["local"].ptx


def test_a_kernel_that_does_not_compile_is_named():
    with pytest.raises(RuntimeError, match=r"(?s)compile_here on 1 ranks: .*round_kernel"):
        aot.compile_triton([aot.Kernel(ROUND, {"x_ptr": "*i32", "out_ptr": "*bf16", "size": "i32"}, BLOCK)])
