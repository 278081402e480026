"""What a GPU offers, from its data sheet, and the share of it that real code is assumed to reach."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One accelerator and its links; rates are peaks, one direction, for each GPU."""

    name: str
    memory_gib: float  # what the driver reports as total
    bf16_tflops: float  # dense
    hbm_tb_s: float
    nvlink_gb_s: float
    network_gb_s: float  # to other nodes: one 400 Gb/s adapter a GPU
    host_gb_s: float = 55.0  # PCIe 5.0 x16
    per_node: int = 8
    host_memory_gib: float = 2048.0  # of a node


# NVIDIA's data sheets of H100 SXM, H200 SXM and H20. H800 is the H100 with NVLink cut to 400 GB/s in both directions
# together (DeepSeek-V3 report, section 3.2).
GPUS = {
    "h100": Gpu("h100", 79.6, 989, 3.35, 450, 50),
    "h800": Gpu("h800", 79.6, 989, 3.35, 200, 50),
    "h200": Gpu("h200", 139.8, 989, 4.8, 450, 50),
    "h20": Gpu("h20", 95.6, 148, 4.0, 450, 50),
}


@dataclass(frozen=True)
class Assumed:
    """Shares and fixed costs that no data sheet gives. Printed with every plan; change them with `--assume`."""

    dense_efficiency: float = 0.55  # of bf16 peak: attention, dense MLP and output matrix
    expert_efficiency: float = 0.35  # of bf16 peak: grouped GEMMs of routed experts
    fp8_gain: float = 1.4  # speed of a linear in FP8 over bf16, with the casts (model.fp8); the peak is 2
    small_row_tokens: float = 2048  # rows of this many tokens reach half of either efficiency
    bandwidth_efficiency: float = 0.7  # of HBM, NVLink, network and PCIe
    expert_imbalance: float = 1.2  # the busiest expert-parallel rank over the mean
    decode_layer_us: float = 300.0  # launches and synchronisation of one layer of one decoded token
    layer_ms: float = 3.0  # the same of one layer's forward pass of one micro-batch in training
    reduce_us: float = 25.0  # latency of one all-reduce or all-to-all within a node
    reduce_across_us: float = 100.0  # and across nodes
    mean_length_share: float = 0.25  # mean completion over the longest, unless mean_tokens is given
    mean_tokens: float = 0.0  # mean completion; 0: mean_length_share of the longest
    generator_gpus: float = 0.0  # GPUs of one generator; 0: the smallest that keeps half of its memory for KV
    kv_pool_share: float = 0.85  # of GPU memory for weights and KV pool while generating (SGLang's mem-fraction)
    runtime_gib: float = 3.5  # CUDA context, NCCL channels, allocator slack
    cpu_adam_gb_s: float = 100.0  # bytes of optimizer state that a node's CPUs update a second
