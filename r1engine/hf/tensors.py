"""Names and shapes of a model's Hugging Face tensors: the one table that all who read or write weights go by.

The trainer's rules, the embedded generator, the servers' checksum, folders and the planner read it. Each structure has
its function, which gives the tensors of one such module under their names inside it, in the order of an export.
"""

from __future__ import annotations

from r1engine.hf.architecture import Architecture

Shapes = dict[str, tuple[int, ...]]  # name -> shape

SCORE = "score.weight"  # of a reward model, in place of the output matrix
SCORE_BIAS = "score.bias"  # written as 0 for servers whose class has one; nothing here trains one
EXPERT_BIAS = "e_score_correction_bias"  # of `mlp.gate`; takes part in the choice of experts only


def is_float32(name: str) -> bool:
    """Whether a tensor stays in float32 whatever the model's type: in bfloat16 other experts would be chosen."""
    return name.endswith("." + EXPERT_BIAS)


# ------------------------------------------------------------------ the whole model


def hf_shapes(arch: Architecture) -> Shapes:
    """Of every tensor of the model but its MTP modules, which are `mtp_shapes`."""
    matrix = (arch.vocab_size, arch.hidden_size)
    shapes: Shapes = {"model.embed_tokens.weight": matrix}
    for layer in range(arch.num_layers):
        shapes |= _inside(f"model.layers.{layer}", layer_shapes(arch, layer))
    shapes["model.norm.weight"] = (arch.hidden_size,)
    if arch.head == "score":
        shapes[SCORE] = (1, arch.hidden_size)
    elif not arch.is_tied:
        shapes["lm_head.weight"] = matrix
    return shapes


def mtp_shapes(arch: Architecture) -> Shapes:
    """Of every tensor of the MTP modules, which stand behind the last layer."""
    hidden, shapes = arch.hidden_size, Shapes()
    for layer in mtp_layers(arch):
        module = layer_shapes(arch, layer) | {
            "embed_tokens.weight": (arch.vocab_size, hidden),
            "shared_head.head.weight": (arch.vocab_size, hidden),
            "enorm.weight": (hidden,),
            "hnorm.weight": (hidden,),
            "shared_head.norm.weight": (hidden,),
            "eh_proj.weight": (hidden, 2 * hidden),
        }
        shapes |= _inside(f"model.layers.{layer}", module)
    return shapes


def mtp_layers(arch: Architecture) -> range:
    """The layer numbers under which the MTP modules stand."""
    return range(arch.num_layers, arch.num_layers + arch.num_mtp_layers)


def mtp_copies(arch: Architecture) -> dict[str, list[str]]:
    """Name of a matrix of the main model -> names of its copies in the MTP modules."""
    return {
        "model.embed_tokens.weight": [f"model.layers.{i}.embed_tokens.weight" for i in mtp_layers(arch)],
        "lm_head.weight": [f"model.layers.{i}.shared_head.head.weight" for i in mtp_layers(arch)],
    }


# ------------------------------------------------------------------ a layer and its parts


def layer_shapes(arch: Architecture, layer: int) -> Shapes:
    """Of the layer of this number (from 0), named inside `model.layers.N`."""
    attention = latent_attention_shapes(arch) if arch.mla else attention_shapes(arch)
    mlp = experts_shapes(arch) if arch.has_experts(layer) else mlp_shapes(arch, arch.intermediate_size)
    return {
        "input_layernorm.weight": (arch.hidden_size,),
        **_inside("self_attn", attention),
        "post_attention_layernorm.weight": (arch.hidden_size,),
        **_inside("mlp", mlp),
    }


def attention_shapes(arch: Architecture) -> Shapes:
    """Of attention with query heads in groups that share a key and a value head, named inside `self_attn`."""
    hidden, queries, keys = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    shapes: Shapes = {
        "q_proj.weight": (queries, hidden),
        "k_proj.weight": (keys, hidden),
        "v_proj.weight": (keys, hidden),
    }
    if arch.has_qkv_bias:
        shapes |= {"q_proj.bias": (queries,), "k_proj.bias": (keys,), "v_proj.bias": (keys,)}
    if arch.has_qk_norm:
        shapes |= {"q_norm.weight": (arch.head_dim,), "k_norm.weight": (arch.head_dim,)}
    shapes["o_proj.weight"] = (hidden, queries)
    if arch.has_output_bias:
        shapes["o_proj.bias"] = (hidden,)
    return shapes


def latent_attention_shapes(arch: Architecture) -> Shapes:
    """Of multi-head latent attention, named inside `self_attn`."""
    hidden, heads, mla = arch.hidden_size, arch.num_heads, arch.mla
    assert mla is not None
    queries = heads * (mla.nope_dim + mla.rope_dim)
    shapes: Shapes = {"q_proj.weight": (queries, hidden)}
    if mla.query_rank is not None:
        shapes = {
            "q_a_proj.weight": (mla.query_rank, hidden),
            "q_a_layernorm.weight": (mla.query_rank,),
            "q_b_proj.weight": (queries, mla.query_rank),
        }
    return shapes | {
        "kv_a_proj_with_mqa.weight": (mla.kv_rank + mla.rope_dim, hidden),
        "kv_a_layernorm.weight": (mla.kv_rank,),
        "kv_b_proj.weight": (heads * (mla.nope_dim + mla.value_dim), mla.kv_rank),
        "o_proj.weight": (hidden, heads * mla.value_dim),
    }


def mlp_shapes(arch: Architecture, size: int) -> Shapes:
    """Of an MLP of this intermediate size, named inside it."""
    hidden = arch.hidden_size
    return {"gate_proj.weight": (size, hidden), "up_proj.weight": (size, hidden), "down_proj.weight": (hidden, size)}


def experts_shapes(arch: Architecture) -> Shapes:
    """Of the router, the routed experts and the shared ones (one MLP, where there are any), named inside `mlp`."""
    moe = arch.moe
    assert moe is not None
    shapes: Shapes = {"gate.weight": (moe.num_experts, arch.hidden_size)}
    if moe.has_bias:
        shapes[f"gate.{EXPERT_BIAS}"] = (moe.num_experts,)
    for expert in range(moe.num_experts):
        shapes |= _inside(f"experts.{expert}", mlp_shapes(arch, moe.intermediate_size))
    if moe.shared_size:
        shapes |= _inside("shared_experts", mlp_shapes(arch, moe.shared_size))
    return shapes


def _inside(module: str, shapes: Shapes) -> Shapes:
    return {f"{module}.{name}": shape for name, shape in shapes.items()}
