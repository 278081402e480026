"""What the parallel sizes must divide: the model, and the matrices that FP8 products take."""

from __future__ import annotations

from pathlib import Path

from r1engine.config import ConfigError, Model, Parallel
from r1engine.hf.architecture import Architecture, Head

MATRIX_SIDE = 16  # both sides of a weight on each rank: 16-byte rows for the tensor cores (cuBLAS)
GATHERED_SIDE = 128  # width of what sequence parallelism gathers: whole scaled parts (Transformer Engine asserts it)


def check_trained(folder: Path, arch: Architecture, model: Model, layout: Parallel, head: Head = "tokens") -> None:
    """Refuse a model that the trainer does not compute, or not in this layout. What the machine has is not looked at.

    Args:
        folder: of the model, for messages.
        arch:   what its config.json says.
        model:  how it is to be computed.
        layout: parallel sizes.
        head:   that is to be trained. A score may begin on a language model, but no output matrix on a score.

    Raises:
        ValueError: naming the key or the size, what was found and what is required.
    """
    if head == "tokens" and arch.head == "score":
        raise ValueError(f"model.path: {folder} is a reward model, required is a language model")
    if head == "score" and model.mtp_loss_weight > 0:
        found = f"model.mtp_loss_weight: found {model.mtp_loss_weight}"
        raise ValueError(f"{found}, required 0: a reward model has no MTP modules")
    if arch.has_output_bias:
        raise ValueError(f"{folder}: attention_bias is true; the trainer computes o_proj without bias only")
    check_layout(arch, layout)
    if arch.moe is not None and model.experts != "megatron" and layout.expert_tensor > 1:
        raise ValueError(f"model.experts: found {model.experts}, required megatron with parallel.expert_tensor > 1")
    if arch.moe is not None and model.experts == "fused_fp8":
        sizes = arch.hidden_size, arch.moe.intermediate_size
        if any(size % GATHERED_SIDE for size in sizes):
            raise ValueError(
                f"model.experts: found fused_fp8, but hidden_size and moe_intermediate_size are {sizes}, required "
                f"multiples of {GATHERED_SIDE}"
            )
    if model.fp8:
        is_parallel = layout.is_sequence_parallel
        if problem := fp8_problem(arch, layout.tensor, model.experts, is_sequence_parallel=is_parallel):
            raise ValueError(problem)


def check_limits(
    folder: Path, arch: Architecture, limits: dict[int, int], prompt: int = 1, of: str = "a prompt"
) -> None:
    """Refuse limits of completions that run past the model's context.

    Args:
        folder: of the model, for messages.
        arch:   what its config.json says.
        limits: optimizer step from which it holds -> largest completion (tokens).
        prompt: tokens in front of a completion.
        of:     which prompt that is, for messages.

    Raises:
        ValueError: naming every such limit and the largest that fits.
    """
    context = f"the model's context is {arch.max_positions} (max_position_embeddings in {folder / 'config.json'})"
    largest = arch.max_positions - prompt
    if largest < 1:
        raise ValueError(f"{of} has {prompt} tokens, required < {arch.max_positions}: {context}")
    problems = [
        f"rollout.max_tokens: found {limit}{f' from step {step} on' if len(limits) > 1 else ''}, required <= {largest} "
        f"behind {of} ({prompt} tokens): {context}"
        for step, limit in sorted(limits.items())
        if limit > largest
    ]
    if problems:
        raise ConfigError(problems)


def check_layout(arch: Architecture, layout: Parallel) -> None:
    """Refuse parallel sizes that do not divide the model.

    Raises:
        ValueError: naming the size, what it does not divide, and both numbers.
    """
    sizes = {"attention heads": arch.num_heads, "intermediate size": arch.intermediate_size}
    if arch.mla is None:
        sizes["key/value heads"] = arch.num_kv_heads
    else:
        sizes["kv_lora_rank + qk_rope_head_dim"] = arch.mla.kv_rank + arch.mla.rope_dim
        if arch.mla.query_rank is not None:
            sizes["q_lora_rank"] = arch.mla.query_rank
    if arch.moe is not None and arch.moe.shared_size:
        sizes["intermediate size of the shared experts"] = arch.moe.shared_size
    for what, size in sizes.items():
        if size % layout.tensor:
            raise ValueError(f"parallel.tensor: {layout.tensor} does not divide the model's {what} ({size})")
    _check_experts(arch, layout)
    _check_stages(arch.num_layers, layout)


def _check_experts(arch: Architecture, layout: Parallel) -> None:
    if arch.moe is None:
        for key, size in (("expert", layout.expert), ("expert_tensor", layout.expert_tensor)):
            if size > 1:
                raise ValueError(f"parallel.{key}: found {size}, required 1: the model has no experts")
        return
    if arch.moe.num_experts % layout.expert:
        raise ValueError(f"parallel.expert: {layout.expert} does not divide the model's {arch.moe.num_experts} experts")
    if arch.moe.intermediate_size % layout.expert_tensor:
        raise ValueError(
            f"parallel.expert_tensor: {layout.expert_tensor} does not divide the intermediate size of an expert "
            f"({arch.moe.intermediate_size})"
        )
    if layout.tensor > 1 and layout.sequence is False:
        raise ValueError("parallel.sequence: found false, required null or true: experts with tensor > 1 need it")


def _check_stages(num_layers: int, layout: Parallel) -> None:
    if layout.virtual > 1 and layout.pipeline == 1:
        raise ValueError(f"parallel.virtual: found {layout.virtual}, required 1 with pipeline = 1")
    ends = [n for n in (layout.first_stage_layers, layout.last_stage_layers) if n is not None]
    if ends and layout.pipeline == 1:
        raise ValueError("parallel.first_stage_layers, last_stage_layers: required null with pipeline = 1")
    between, stages = num_layers - sum(ends), layout.pipeline - len(ends)
    if between < 0 or (stages == 0 and between):
        raise ValueError(
            f"parallel: first_stage_layers + last_stage_layers = {sum(ends)} do not leave the right number of the "
            f"model's {num_layers} layers to {stages} stages"
        )
    if stages and between % (stages * layout.virtual):
        each = f"pipeline {stages}" if not ends else f"{stages} stages between the ends"
        raise ValueError(
            f"parallel.pipeline: {each}{f' x virtual {layout.virtual}' if layout.virtual > 1 else ''} does not divide "
            f"the model's {between} layers"
        )
    if any(n % layout.virtual for n in ends):
        raise ValueError(f"parallel.virtual: {layout.virtual} does not divide the layers of an end stage ({ends})")


def fp8_problem(arch: Architecture, tensor: int, experts: str, *, is_sequence_parallel: bool) -> str | None:
    """Which matrix the FP8 products do not take, or which setting; None for a model that can be trained.

    Args:
        arch:                 the model.
        tensor:               ranks that a matrix is split over.
        experts:              `model.experts`.
        is_sequence_parallel: whether these ranks share the tokens between the layers.
    """
    if arch.moe is not None and experts == "megatron":
        return "model.experts: found megatron with model.fp8, required fused or fused_fp8"
    for what, size in _fp8_sides(arch, tensor).items():
        if size % MATRIX_SIDE:
            ranks = f"each of {tensor} tensor-parallel ranks" if tensor > 1 else "the only tensor-parallel rank"
            return f"model.fp8: {what} is {size} on {ranks}, required a multiple of {MATRIX_SIDE}"
    gathered = {"hidden size": arch.hidden_size}
    if arch.mla is not None:
        gathered |= {"q_lora_rank": arch.mla.query_rank or 0, "kv_lora_rank": arch.mla.kv_rank}
    for what, size in gathered.items() if is_sequence_parallel and tensor > 1 else ():
        if size % GATHERED_SIDE:
            required = f"a multiple of {GATHERED_SIDE} with sequence parallelism (parallel.sequence)"
            return f"model.fp8: the {what} is {size}, required {required}"
    return None


def _fp8_sides(arch: Architecture, tensor: int) -> dict[str, int]:
    """The sides of the matrices in FP8 as one rank holds them."""
    heads, mla = arch.num_heads // tensor, arch.mla
    sides = {"the hidden size": arch.hidden_size, "the intermediate size": arch.intermediate_size // tensor}
    if mla is None:
        sides["the width of queries, keys and values"] = (
            (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim // tensor
        )
        sides["the width of attention's output"] = heads * arch.head_dim
    else:
        sides["the width of queries"] = heads * arch.head_dim
        sides["q_lora_rank"] = (mla.query_rank or 0) // tensor
        sides["kv_lora_rank"] = mla.kv_rank
        sides["the width of keys and values"] = heads * (mla.nope_dim + mla.value_dim)
        sides["the width of attention's output"] = heads * mla.value_dim
    if arch.moe is not None:
        sides["the intermediate size of the shared experts"] = arch.moe.shared_size // tensor
    return sides
