"""Other projects' kernels, beside which ours are measured where they are installed; where not, a note says so."""

from __future__ import annotations

from collections.abc import Callable

import timing
import torch

Op = Callable[..., torch.Tensor]
Loader = Callable[[], Op]  # imports the package: ImportError where it is not installed


def _flash_attn() -> Op:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda x, y: -cross_entropy_loss(x, y, inplace_backward=True)[0]


def _liger() -> Op:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda x, y: -liger_cross_entropy(x, y, reduction="none")


def _quack() -> Op:
    from quack.cross_entropy import cross_entropy

    return lambda x, y: -cross_entropy(x, y, reduction="none", inplace_backward=True)


def _transformer_engine() -> Op:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return lambda x, y: -parallel_cross_entropy(x[None], y[None], 0.0, False, None)[0]


def _trl() -> Op:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return lambda x, y: selective_log_softmax_and_entropy(x, y)[0]


def _liger_linear() -> Op:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda x, w, y: -liger_fused_linear_cross_entropy(x, w, y, reduction="none")


def _liger_linear_scaled() -> Op:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def call(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        found = LigerFusedLinearScaledCrossEntropyFunction.apply(x, w, y, 1.0)
        return -(found[0] if isinstance(found, tuple) else found)

    return call


def _cut_cross_entropy() -> Op:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, w, y: -linear_cross_entropy(x, w, y, reduction="none")


def _quack_linear() -> Op:
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return lambda x, w, y: -linear_cross_entropy_func(x, w, None, y, reduction="none", inplace_backward=True)


def _verl_linear() -> Op:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda x, w, y: linear_cross_entropy(x, w, y, 1.0, "none", None)[0]


def _trl_linear() -> Op:
    from trl.kernels import ChunkedLogProbFunction

    return lambda x, w, y: ChunkedLogProbFunction.apply(x, w, None, y, 1.0, 8192, None, 1.0, ())[0]


def _liger_grpo() -> Op:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def call(logits, labels, old_logp, ref_logp, advantage, *, clip_eps, clip_eps_high, kl_coef):
        """[B, L + 1, V] logits; [B, L] labels, old_logp, ref_logp; [B] advantage; the mean over all tokens."""
        options = {"temperature": 1.0, "beta": kl_coef, "eps_low": clip_eps, "eps_high": clip_eps_high}
        tensors = logits, old_logp, ref_logp, labels, advantage
        return triton_grpo_loss(*tensors, inplace=True, loss_type="bnpo", reduce=True, **options)[0]

    return call


def _sglang_gate() -> Op:
    from sglang.kernels.ops.moe.moe_fused_gate import moe_fused_gate

    scaled = {"routed_scaling_factor": 2.5, "apply_routed_scaling_factor_on_output": True}
    return lambda x, bias: moe_fused_gate(x, bias, 8, num_expert_group=8, topk_group=4, **scaled)[0]


def _sglang_quantize() -> Op:
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_group_quant_fp8

    return lambda x: sglang_per_token_group_quant_fp8(x, 128)[0]


def _transformer_engine_grouped() -> Op:
    from transformer_engine.pytorch import GroupedLinear

    layers: dict[tuple[int, ...], torch.nn.Module] = {}

    def call(rows: torch.Tensor, weight: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """[R, H] rows of experts one after another, [E, I, H] weight (its shape counts), rows of each expert."""
        if tuple(weight.shape) not in layers:
            experts, inner, hidden = weight.shape
            options = {"bias": False, "params_dtype": weight.dtype, "device": weight.device}
            layers[tuple(weight.shape)] = GroupedLinear(experts, hidden, inner, **options)
        with torch.no_grad():
            return layers[tuple(weight.shape)](rows, sizes)

    return call


def _flash_attn_paged() -> Op:
    from flash_attn import flash_attn_with_kvcache

    page = 256  # tokens, the fewest that it takes

    def call(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """[N, heads, D] query; [N, tokens, kv_heads, D] keys and values, tokens a multiple of 256; [N] lengths."""
        pages = keys.shape[1] // page
        table = torch.arange(len(query) * pages, device=query.device, dtype=torch.int32).view(-1, pages)
        cache = [x.reshape(-1, page, *x.shape[2:]) for x in (keys, values)]
        return flash_attn_with_kvcache(query[:, None], *cache, cache_seqlens=lengths, block_table=table)

    return call


# From logits [T, V] and labels [T], or from hidden states [T, H], weight [V, H] and labels: log-probabilities [T].
LOGP = {"flash-attn": _flash_attn, "Liger": _liger, "QuACK": _quack, "Transformer Engine": _transformer_engine}
LOGP |= {"TRL": _trl}
LINEAR_LOGP = {"Liger": _liger_linear, "Liger scaled": _liger_linear_scaled, "cut-cross-entropy": _cut_cross_entropy}
LINEAR_LOGP |= {"QuACK": _quack_linear, "verl": _verl_linear, "TRL": _trl_linear}
LOGITS_GRPO = {"Liger": _liger_grpo}
GATE = {"SGLang": _sglang_gate}  # of DeepSeek-V3: logits [T, 256], bias [256] -> weights [T, 8]
QUANTIZE = {"SGLang": _sglang_quantize}  # [T, H] -> float8 in blocks of 1x128
PAGED_ATTENTION = {"flash-attn": _flash_attn_paged}
GROUPED = {"Transformer Engine": _transformer_engine_grouped}
ON_CPU = {"TRL"}


def installed(loaders: dict[str, Loader], device: torch.device) -> dict[str, Op]:
    """Those that can be imported, and that have code for this kind of device."""
    found: dict[str, Op] = {}
    for name, load in loaders.items():
        if device.type == "cpu" and name not in ON_CPU:
            continue
        try:
            found[name] = load()
        except ImportError as error:
            timing.note(f"peers: {name} is left out: {error}")
    return found


def working(calls: dict[str, Callable[[], object]], loaders: dict[str, Loader]) -> dict[str, Callable[[], object]]:
    """The calls without those peers that fail on this device or shape: their failure must not cost our figures."""
    found = {}
    for name, call in calls.items():
        if name in loaders:
            try:
                call()
            except Exception as error:
                timing.note(f"peers: {name} is left out, it raised {type(error).__name__}: {str(error)[:300]}")
                continue
        found[name] = call
    return found
