"""What nvcc makes of csrc/ for sm_90a: no spills, registers and shared memory within budget, 16-byte accesses."""

from __future__ import annotations

import re
from pathlib import Path

import aot
import pytest

MAX_SHARED_BYTES = 48 * 1024  # what a block may have without asking
# Kernel -> most registers a thread. 65536 registers / 32 is full occupancy, / 64 half of it.
REGISTERS = {
    "fp8_cast.quantize_kernel": 128,  # 64 values a thread stay in registers between the maximum and the cast
    "fp8_cast.dequantize_kernel": 40,
    "moe_plan.count_kernel": 40,
    "moe_plan.scan_kernel": 40,
    "moe_plan.place_kernel": 48,
    "moe_permute_quant.spread_fp8_kernel": 64,
    "moe_permute_quant.transpose_fp8_kernel": 96,
    "moe_combine.combine_kernel": 64,
    "spread_kernel": 64,
    "zero_padding_kernel": 32,
    "moe_gate_topk.gate_kernelILi2": 64,
    "moe_gate_topk.gate_kernelILi8": 80,  # DeepSeek-V3's 256 experts
    "moe_gate_topk.gate_kernelILi32": 224,
    "moe_gate_backward.backward_kernelILi2": 48,
    "moe_gate_backward.backward_kernelILi8": 64,
    "moe_gate_backward.backward_kernelILi32": 144,
    "moe_gate_backward.sums_kernel": 48,
}
# Kernel (part of its mangled name) -> 16-byte loads and stores that its main path has at least.
WIDE = {
    "fp8_cast.quantize_kernelI13__nv_bfloat16Lb1ELb1E": (8, 4),  # 4 rows: 32 bytes in, 16 codes out
    "fp8_cast.quantize_kernelI13__nv_bfloat16Lb0ELb1E": (8, 4),
    "fp8_cast.dequantize_kernelI13__nv_bfloat16Lb0ELb1E": (4, 8),
    "moe_permute_quant.spread_fp8_kernelILb0ELb0E": (2, 1),
    "moe_permute_quant.spread_fp8_kernelILb1ELb0E": (1, 1),
    "moe_permute_quant.transpose_fp8_kernel": (8, 4),
    "moe_combine.combine_kernelILi8E": (8, 1),
    "spread_kernelILb1E": (2, 1),
    "moe_gate_topk.gate_kernelILi8ELb0E": (2, 0),
    "moe_gate_backward.backward_kernelILi8ELb0E": (0, 2),
}

pytestmark = pytest.mark.slow  # nvcc takes half a minute


@pytest.fixture(scope="module")
def kernels(compiled: Path) -> dict[str, aot.Compiled]:
    """file.kernel with its template arguments -> what came out; kernels of a header have no file."""
    pytest.importorskip("triton", reason="cuobjdump comes with triton")
    found = aot.read_cubin(compiled, ptx="")
    assert found, "cuobjdump found no kernel in the library"
    # _ZN49_GLOBAL__N__1b7f8163_16_moe_gate_topk_cu_1b7f816311gate_kernelI...: the hash is followed by a length.
    private = re.compile(r"_ZN\d+_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}\d+")
    return {re.sub(r"^_Z\d+", "", private.sub(r"\1.", name)): made for name, made in found.items()}


def test_nothing_spills_and_every_kernel_keeps_its_budget(kernels):
    for name, made in kernels.items():
        budgets = [registers for prefix, registers in REGISTERS.items() if name.startswith(prefix)]
        assert budgets, f"{name} has no budget of registers"
        assert made.spill_free, f"{name} uses {made.stack_bytes} + {made.local_bytes} bytes of local memory"
        assert made.registers <= max(budgets), f"{name} uses {made.registers} registers"
        assert made.shared_bytes <= MAX_SHARED_BYTES, f"{name} uses {made.shared_bytes} bytes of shared memory"
    assert {prefix for prefix in REGISTERS if not any(name.startswith(prefix) for name in kernels)} == set()


@pytest.mark.parametrize("prefix", WIDE)
def test_memory_is_accessed_16_bytes_at_a_time(kernels, prefix):
    (made,) = (made for name, made in kernels.items() if name.startswith(prefix))
    loads, stores = WIDE[prefix]
    assert made.count("LDG", "128") >= loads
    assert made.count("STG", "128") >= stores


def test_the_casts_are_the_hardwares(kernels):
    for name in ("fp8_cast.quantize_kernel", "moe_permute_quant.spread_fp8_kernelILb0E"):
        for made in (made for key, made in kernels.items() if key.startswith(name)):
            assert made.count("F2FP", "SATFINITE", "E4M3") >= 8  # two values each


def test_the_router_finds_the_best_by_one_instruction(kernels):
    # A maximum over 32 lanes in one REDUX; a round of shuffles would be ten instructions.
    assert all(made.count("REDUX", "MAX") for name, made in kernels.items() if "gate_kernel" in name)
