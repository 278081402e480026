"""The Triton kernels with the types, constants and warps of their launches on a GPU, to be compiled ahead of time."""

from __future__ import annotations

from dataclasses import replace

import aot

from r1kernels.logits_grpo_loss.triton_impl import MAX_REGISTERS
from r1kernels.logprob_entropy.triton_impl import GRADIENT_REGISTERS
from r1kernels.moe_swiglu_quant import triton_impl as swiglu
from r1kernels.paged_attention.triton_impl import NUM_STAGES, NUM_WARPS, PARTS, constants

# ---- logprob_entropy -------------------------------------------------------------------------------------------

ROW = {"logits_ptr": "*bf16", "labels_ptr": "*i64", "stride_outer": "i64"}
ROW |= dict.fromkeys(("stride_inner", "num_inner", "vocab", "ignore_index", "vocab_start"), "i32")
ROW |= dict.fromkeys(("scale", "softcap", "pre_scale"), "fp32")
COMMON = {"stride_column": 1, "mask_ptr": None, "temperature_ptr": None, "keep_ids_ptr": None, "keep_offsets_ptr": None}
SHAPE = {"SOFTCAP": False, "REPEAT": 4, "THREADS": 256, "WIDTH": 8}
LENGTHS = ("num_inner", "num_rows", "ignore_index", "vocab_start")
ROWS = "r1kernels.logprob_entropy.triton_kernels"


def forward(arch: int, dtype: str = "bf16", width: int = 8, **flags: object) -> aot.Kernel:
    """The sums of each row of logits."""
    constants = COMMON | SHAPE | {"WIDTH": width, "ENTROPY": True, "SQUARES": True} | flags
    signature = ROW | {"logits_ptr": f"*{dtype}", "out_ptr": "*fp32", "num_rows": "i32"}
    return aot.Kernel(f"{ROWS}:partials_kernel", signature, constants, arch, num_warps=8, unaligned=LENGTHS)


def backward(arch: int, entropy: bool = False, per_row: bool = False, **flags: object) -> aot.Kernel:
    """The gradient of each row; with a gradient of the entropy, or with a mask and a temperature a row."""
    sums = ("top_ptr", "log_total_ptr", "grad_logp_ptr", *(("entropy_ptr", "grad_entropy_ptr") if entropy else ()))
    signature = ROW | dict.fromkeys(sums, "*fp32") | {"out_ptr": "*bf16", "out_outer": "i64", "out_inner": "i32"}
    absent = {} if entropy else {"entropy_ptr": None, "grad_entropy_ptr": None}
    constants = COMMON | SHAPE | {"out_column": 1} | absent | flags
    if per_row:
        signature |= {"mask_ptr": "*i1", "temperature_ptr": "*fp32"}
        constants = {name: value for name, value in constants.items() if name not in signature}
    options = {"num_warps": 8, "max_registers": GRADIENT_REGISTERS, "unaligned": LENGTHS}
    return aot.Kernel(f"{ROWS}:gradient_kernel", signature, constants, arch, **options)


# ---- logits_grpo_loss ------------------------------------------------------------------------------------------

POINTERS = "old_logp advantage weight ref_logp rollout_logp logp entropy partial loss metrics"
SCALARS = "clip_low clip_high dual_clip sapo_tau sapo_tau_negative kl_coef entropy_coef tis_low tis_high"


def logits_grpo(arch: int, entropy: bool = False, dtype: str = "bf16", num_warps: int = 16) -> aot.Kernel:
    """Loss and gradient of each row of logits; long rows take 16 warps, short ones 8."""
    signature = {f"{name}_ptr": "*fp32" for name in POINTERS.split()} | dict.fromkeys(SCALARS.split(), "fp32")
    signature |= {"logits_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "labels_ptr": "*i64", "counter_ptr": "*i32"}
    signature |= dict.fromkeys(("stride_outer", "out_outer"), "i64") | dict.fromkeys(("scale", "softcap"), "fp32")
    signature |= dict.fromkeys(("stride_inner", "out_inner", "num_inner", "vocab", "num_rows"), "i32")
    constexprs = {
        "stride_column": 1, "out_column": 1, "temperature_ptr": None, "SOFTCAP": False, "ENTROPY_GRAD": entropy,
        "LOSS": "clip", "KL": "k3", "KL_GRAD": "k3", "KL_IMPORTANCE": False, "TIS": "truncate",
        "REPEAT": 4, "THREADS": 32 * num_warps, "WIDTH": 8 if dtype == "bf16" else 4,
    }  # fmt: skip
    return aot.Kernel(
        "r1kernels.logits_grpo_loss.triton_kernels:logits_grpo_kernel",
        signature | {"pre_scale": "fp32"},
        constexprs,
        arch,
        num_warps=num_warps,
        max_registers=MAX_REGISTERS,
        unaligned=("num_inner", "num_rows", "counter_ptr", "metrics_ptr"),
    )


# ---- moe_swiglu_quant ------------------------------------------------------------------------------------------

FP8 = {"values_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
TRANSPOSED = {"values_t_ptr": "*fp8e4nv", "scale_t_ptr": "*fp32"}
WIDE = {"wide_grad_ptr": "*bf16", "wide_act_ptr": "*bf16"}
SOURCES = {"h_ptr": "*bf16", "weights_ptr": "*fp32", "slot_of_ptr": "*i32"}
PLACES = {"expert_of_ptr": "*i32", "offsets_ptr": "*i32"}
SIZES = {"num_rows": "i32", "num_columns": "i32", "rows_in_use_ptr": "*i32"}
FORWARD = SOURCES | PLACES | SIZES
BACKWARD = SOURCES | SIZES | {"grad_ptr": "*bf16", "grad_weights_ptr": "*fp32"}
ACROSS = SOURCES | PLACES | TRANSPOSED | {"act_t_ptr": "*fp8e4nv", "act_scale_t_ptr": "*fp32", "grad_ptr": "*bf16"}
ACROSS |= {"num_columns": "i32", "rows_in_use_ptr": "*i32"}


def _swiglu(
    name: str, signature: dict[str, str], absent: list[str], rows: int, num_warps: int, columns: int = 128
) -> aot.Kernel:
    return aot.Kernel(
        f"r1kernels.moe_swiglu_quant.triton_impl:{name}",
        signature,
        {"ROWS": rows, "COLUMNS": columns} | dict.fromkeys(absent),
        num_warps=num_warps,
        unaligned=("rows_in_use_ptr",),
    )


FEW, ONE_WARP = (swiglu.FORWARD_ROWS, swiglu.FORWARD_WARPS), (swiglu.BACKWARD_ROWS, swiglu.BACKWARD_WARPS)
ALL = 128, swiglu.TRANSPOSED_WARPS, swiglu.TRANSPOSED_COLUMNS
SWIGLU = {
    "swiglu": _swiglu("_forward_kernel", FORWARD | {"act_ptr": "*bf16"}, [*FP8, *TRANSPOSED], *FEW),
    "quant": _swiglu("_forward_kernel", FORWARD | FP8, ["act_ptr", *TRANSPOSED], *FEW),
    "dual": _swiglu("_forward_kernel", FORWARD | FP8 | TRANSPOSED, ["act_ptr"], 128, swiglu.DUAL_WARPS),
    "backward": _swiglu("_backward_kernel", BACKWARD | WIDE, [*FP8], *ONE_WARP),
    "quant backward": _swiglu("_backward_kernel", BACKWARD | FP8, [*WIDE], *ONE_WARP),
    "wide quant backward": _swiglu("_backward_kernel", BACKWARD | WIDE | FP8, [], *ONE_WARP),
    "transposed backward": _swiglu("_backward_transposed_kernel", ACROSS, [], *ALL),
}

# ---- paged_attention -------------------------------------------------------------------------------------------

POOL = ("query_ptr", "keys_ptr", "values_ptr")
PLACES_OF_TOKENS = {"table_ptr": "*i32", "lengths_ptr": "*i32", "sums_ptr": "*fp32", "scales_ptr": "*fp32"}
STRIDES = "max_pages query_row key_page key_head key_token value_page value_head value_token"


def paged_attention(group: int = 7, head_dim: int = 128, dtype: str = "bf16", rows: int = 64) -> aot.Kernel:
    """Parts of the attention of rows over pages of 64 tokens; `group`: query heads of a key head."""
    signature = dict.fromkeys(POOL, f"*{dtype}") | PLACES_OF_TOKENS | dict.fromkeys(STRIDES.split(), "i32")
    return aot.Kernel(
        "r1kernels.paged_attention.triton_impl:attention_kernel",
        signature | {"num_rows": "i32", "scale": "fp32"},
        constants(group, 64, head_dim, head_dim, False, rows, 4 if dtype == "fp32" else 2),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        unaligned=("num_rows", "max_pages"),
    )


def latent_attention(heads: int = 16, dtype: str = "bf16") -> aot.Kernel:
    """The same over DeepSeek's latents: an entry of 512 + 64 numbers a token for all heads."""
    shape = constants(heads, 64, 576, 512, True, 64, 4 if dtype == "fp32" else 2)
    return replace(paged_attention(heads, dtype=dtype), constexprs=shape)


def combined_attention(dtype: str = "bf16", value_dim: int = 128) -> aot.Kernel:
    """Parts become rows."""
    shape = constants(7, 64, value_dim, value_dim, False, 64, 2)
    return aot.Kernel(
        "r1kernels.paged_attention.triton_impl:combine_kernel",
        PLACES_OF_TOKENS | {"out_ptr": f"*{dtype}", "num_rows": "i32", "num_programs": "i32"},
        {name: shape[name] for name in ("TILE", "VALUE_DIM", "VALUE_BLOCK", "ROWS")} | {"PARTS": PARTS},
        unaligned=("num_rows", "num_programs"),
    )
