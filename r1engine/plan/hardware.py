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
    network_gb_s: float  # to other nodes: one 400 Gb/s adapter a GPU, where nothing else is said
    watts: float  # limit of the board
    host_gb_s: float = 55.0  # PCIe 5.0 x16
    per_node: int = 8  # GPUs that NVLink joins
    per_host: int = 8  # GPUs that share CPUs and host memory
    host_memory_gib: float = 2048.0  # of a host
    has_fp8: bool = True  # in blocks of 128, as `model.fp8` and the fused experts take it


PCIE_4 = 27.0  # GB/s of 16 lanes, one direction
# NVIDIA's data sheets of H100 SXM, H200 SXM, H20, A100 SXM (DGX A100: an adapter of 200 Gb/s a GPU), L40S, HGX B200 and
# GB200 NVL72 (NVLink joins 72; a tray has four of them and two Grace of 480 GB, each NVLink-C2C is shared by two), and
# the white papers of Ada and of the RTX Blackwell (tensor cores that add up in FP32). H800 is the H100 with NVLink cut
# to 400 GB/s in both directions together (DeepSeek-V3 report, section 3.2). AMD's data sheet of the MI300X (seven links
# of 64 GB/s). Without NVLink a GPU's neighbours are behind PCIe. The network and the host memory of the boards without
# NVLink are assumptions: 200 and 100 Gb/s, 1 TiB and 256 GiB.
GPUS = {
    "h100": Gpu("h100", 79.6, 989, 3.35, 450, 50, 700),
    "h800": Gpu("h800", 79.6, 989, 3.35, 200, 50, 700),
    "h200": Gpu("h200", 139.8, 989, 4.8, 450, 50, 700),
    "h20": Gpu("h20", 95.6, 148, 4.0, 450, 50, 400),
    "b200": Gpu("b200", 179.1, 2250, 8.0, 900, 50, 1000),
    "gb200": Gpu("gb200", 185.0, 2500, 8.0, 900, 50, 1200, 225.0, per_node=72, per_host=4, host_memory_gib=894),
    "a100": Gpu("a100", 80.0, 312, 2.039, 300, 25, 400, PCIE_4, has_fp8=False),
    "l40s": Gpu("l40s", 45.0, 362, 0.864, PCIE_4, 25, 350, PCIE_4, host_memory_gib=1024, has_fp8=False),
    "rtx4090": Gpu("rtx4090", 24.0, 165.2, 1.008, PCIE_4, 12.5, 450, PCIE_4, host_memory_gib=256, has_fp8=False),
    "rtx5090": Gpu("rtx5090", 31.8, 209.5, 1.792, 55, 12.5, 575, host_memory_gib=256, has_fp8=False),
    "mi300x": Gpu("mi300x", 192.0, 1307, 5.3, 448, 50, 750, has_fp8=False),
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
    generator_gpus: float = 0.0  # GPUs of one generator; 0: as configured
    kv_pool_share: float = 0.85  # of GPU memory for weights and KV pool while generating (SGLang's mem-fraction)
    fill_share: float = 0.93  # of GPU memory that `--auto` fills, as long as there is such a layout
    runtime_gib: float = 3.5  # CUDA context, NCCL channels, allocator slack
    gpu_hour_price: float = 0.0  # in any currency; 0: unknown, and no price is told
    refresh_cards: float = 1.0  # network adapters from which a generator with GPUs of its own takes weights at once
    cpu_adam_gb_s: float = 100.0  # bytes of optimizer state that a node's CPUs update a second
