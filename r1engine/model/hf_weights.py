"""Hugging Face names <-> Megatron parameters: one rule a parameter, exact in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from r1engine.architecture import Architecture

SHARD_BYTES = 5 * 2**30  # size of an exported safetensors file


@dataclass(frozen=True)
class Rule:
    """How one Megatron parameter is made of Hugging Face tensors.

    merge: full HF tensors, this rank's index and the number of tensor-parallel ranks -> this rank's shard.
    split: the shards of all ranks, in rank order -> the full HF tensors.
    """

    hf: tuple[str, ...]
    merge: Callable[[list[torch.Tensor], int, int], torch.Tensor]
    split: Callable[[list[torch.Tensor]], list[torch.Tensor]]


def _sharded(name: str, dim: int) -> Rule:
    return Rule((name,), lambda hf, rank, ranks: hf[0].chunk(ranks, dim)[rank], lambda s: [torch.cat(s, dim)])


def _replicated(name: str) -> Rule:
    return Rule((name,), lambda hf, rank, ranks: hf[0], lambda s: [s[0]])


def _gate_up(prefix: str) -> Rule:
    """Each rank holds its part of gate, then its part of up: the halves are split, never the whole."""

    def merge(hf: list[torch.Tensor], rank: int, ranks: int) -> torch.Tensor:
        return torch.cat([t.chunk(ranks)[rank] for t in hf])

    def split(shards: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(halves) for halves in zip(*(s.chunk(2) for s in shards), strict=True)]

    return Rule((f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"), merge, split)


def _qkv(prefix: str, kind: str, model: Architecture) -> Rule:
    """Megatron keeps, for every key-value head, its query heads, its key and its value together."""
    groups, per_group, head = model.num_kv_heads, model.num_heads // model.num_kv_heads, model.head_dim

    def merge(hf: list[torch.Tensor], rank: int, ranks: int) -> torch.Tensor:
        rest = hf[0].shape[1:]
        fused = torch.cat([t.reshape(groups, -1, *rest) for t in hf], dim=1)
        return fused.reshape(-1, *rest).chunk(ranks)[rank]

    def split(shards: list[torch.Tensor]) -> list[torch.Tensor]:
        fused = torch.cat(shards)
        rest = fused.shape[1:]
        parts = fused.view(groups, -1, *rest).split([per_group * head, head, head], dim=1)
        return [p.reshape(-1, *rest) for p in parts]

    return Rule(tuple(f"{prefix}.{x}_proj.{kind}" for x in "qkv"), merge, split)


def rules(model: Architecture) -> dict[str, Rule]:
    """Megatron parameter name -> Rule for the whole model, with global layer numbers, in HF order."""
    table = {"embedding.word_embeddings.weight": _sharded("model.embed_tokens.weight", 0)}
    for i in range(model.num_layers):
        ours, hf = f"decoder.layers.{i}", f"model.layers.{i}"
        table[f"{ours}.input_layernorm.weight"] = _replicated(f"{hf}.input_layernorm.weight")
        table[f"{ours}.self_attention.linear_qkv.weight"] = _qkv(f"{hf}.self_attn", "weight", model)
        if model.has_qkv_bias:
            table[f"{ours}.self_attention.linear_qkv.bias"] = _qkv(f"{hf}.self_attn", "bias", model)
        if model.has_qk_norm:
            for x in "qk":
                table[f"{ours}.self_attention.{x}_layernorm.weight"] = _replicated(f"{hf}.self_attn.{x}_norm.weight")
        table[f"{ours}.self_attention.linear_proj.weight"] = _sharded(f"{hf}.self_attn.o_proj.weight", 1)
        table[f"{ours}.pre_mlp_layernorm.weight"] = _replicated(f"{hf}.post_attention_layernorm.weight")
        table[f"{ours}.mlp.linear_fc1.weight"] = _gate_up(f"{hf}.mlp")
        table[f"{ours}.mlp.linear_fc2.weight"] = _sharded(f"{hf}.mlp.down_proj.weight", 1)
    table["decoder.final_layernorm.weight"] = _replicated("model.norm.weight")
    if not model.is_tied:
        table["output_layer.weight"] = _sharded("lm_head.weight", 0)
    return table


def hf_shapes(model: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor of the model."""
    h, q, kv = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (model.vocab_size, h),
        "lm_head.weight": (model.vocab_size, h),
    }
    shapes |= {"q_proj.weight": (q, h), "k_proj.weight": (kv, h), "v_proj.weight": (kv, h), "o_proj.weight": (h, q)}
    shapes |= {"q_proj.bias": (q,), "k_proj.bias": (kv,), "v_proj.bias": (kv,)}
    shapes |= {"q_norm.weight": (model.head_dim,), "k_norm.weight": (model.head_dim,)}
    shapes |= {f"{x}_proj.weight": (model.intermediate_size, h) for x in ("gate", "up")}
    shapes["down_proj.weight"] = (h, model.intermediate_size)
    names = [name for rule in rules(model).values() for name in rule.hf]
    return {name: shapes.get(".".join(name.rsplit(".", 2)[-2:]), (h,)) for name in names}


class Folder:
    """The tensors of a local Hugging Face folder, opened lazily and checked against the model first."""

    def __init__(self, path: Path, model: Architecture) -> None:
        self.path = path
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ValueError(f"model.path: {path} has no *.safetensors file")
        self._file_of: dict[str, Path] = {}
        found: dict[str, tuple[int, ...]] = {}
        for file in files:
            with safe_open(file, "pt") as f:
                for name in f.keys():  # noqa: SIM118 (safe_open is no dict)
                    self._file_of[name] = file
                    found[name] = tuple(f.get_slice(name).get_shape())
        if model.is_tied:
            found.pop("lm_head.weight", None)  # some exporters write the tied copy as well
        check_tensors(f"model.path: {path}", found, hf_shapes(model))

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._file_of[name], "pt") as f:
            return f.get_tensor(name)


def check_tensors(who: str, found: dict[str, tuple[int, ...]], required: dict[str, tuple[int, ...]]) -> None:
    """Compare tensor names and shapes with what the model needs.

    Raises:
        ValueError: naming every missing, unexpected and misshaped tensor (the first five of each).
    """
    missing, extra = sorted(required.keys() - found.keys()), sorted(found.keys() - required.keys())
    shaped = [f"{n} is {found[n]}, required {s}" for n, s in required.items() if n in found and found[n] != s]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for what, names in (("missing", missing), ("unexpected", extra), ("misshaped", shaped))
        if names
    ]
    if problems:
        raise ValueError(f"{who}: tensors do not fit config.json: {'; '.join(problems)}")


def export_folder(weights: Iterable[tuple[str, torch.Tensor]], source: Path, target: Path, is_writer: bool) -> None:
    """Write a Hugging Face folder: the weights as safetensors, the other files copied from `source`.

    Args:
        weights:   full tensors under their HF names; every rank must consume them (gathering is collective).
        source:    folder whose config.json and tokenizer files are copied.
        target:    folder to write; files of the same name are replaced.
        is_writer: whether this rank writes.
    """
    target.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, tensor in weights:
        if not is_writer:
            continue
        nbytes = tensor.numel() * tensor.element_size()
        if size and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().to("cpu", copy=True).contiguous()
        size, total = size + nbytes, total + nbytes
    if not is_writer:
        return
    for stale in target.glob("*.safetensors*"):
        stale.unlink()
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for file, shard in zip(names, shards, strict=True):
        save_file(shard, target / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {n: f for f, s in zip(names, shards, strict=True) for n in s},
        }
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for file in source.iterdir():
        if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja") and "safetensors" not in file.name:
            (target / file.name).write_bytes(file.read_bytes())


def iterate(folder: Folder, model: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, full tensor) of every tensor of the folder, in the model's order."""
    for name in hf_shapes(model):
        yield name, folder[name]
