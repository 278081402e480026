"""The digests that a server must report: SGLang's fused and split tensors, made here from Hugging Face names."""

from __future__ import annotations

import hashlib

import pytest
import torch

from r1engine.hf.architecture import read_architecture
from r1engine.rollout.sglang.checksum import Expected
from r1engine.rollout.sglang.digest import CudaDigest, digest


@pytest.fixture
def arch(folders):
    return read_architecture(folders["qwen2"][0])  # 4 heads, 2 key/value heads of 8; hidden 32


def expected(arch, ranks: int, tensors: dict[str, torch.Tensor]) -> list[dict[str, str]]:
    collector = Expected(arch, ranks)
    for name, tensor in tensors.items():
        collector.add(name, tensor)
    return collector.digests


def test_a_digest_is_the_start_of_sha256_over_the_bytes():
    tensor = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    assert digest(tensor) == hashlib.sha256(bytes.fromhex("803f00c0")).hexdigest()[:16]


def words_of(tensor: torch.Tensor) -> list[int]:
    data = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
    data += b"\0" * (-len(data) % 4)
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


def cuda_hash_by_hand(tensor: torch.Tensor) -> str:
    """SGLang's hash of a CUDA tensor, a word at a time in Python's whole numbers."""
    bits = 2**32 - 1

    def fmix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x85EBCA6B & bits
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & bits
        return x ^ (x >> 16)

    words, total = words_of(tensor), 0
    seeds = 0x243F6A88, (0x243F6A88 * 0x9E3779B1 ^ 0xDEADBEEF) & bits
    for start in range(0, len(words), 8192):
        halves = []
        for seed, multiplier, turn in zip(seeds, (0x27D4EB2D, 0x165667B1), (15, 13), strict=True):
            added = 0
            for i, word in enumerate(words[start : start + 8192], start):
                rotated = (i << turn | i >> (32 - turn)) & bits
                added += fmix(word ^ ((i * multiplier + seed) & bits) ^ rotated)
            halves.append(fmix((added & bits) ^ (4 * len(words) & bits)))
        total += halves[0] << 32 | halves[1]
    x = total & 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 2**64 - 1
    return f"{x ^ x >> 31:016x}"


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (8192,), (5, 4099)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hash_of_a_cuda_tensor(shape, dtype, monkeypatch):
    monkeypatch.setattr("r1engine.rollout.sglang.digest.TILES_AT_ONCE", 1)
    torch.manual_seed(0)
    tensor = torch.randn(shape).to(dtype)
    assert digest(tensor, CudaDigest) == (cuda_hash_by_hand(tensor) if tensor.numel() else "0" * 16)


def test_the_hash_of_a_cuda_tensor_is_what_sglangs_kernel_answers():
    # Recorded from sglang 0.5.23's Triton kernels (kernels/ops/memory/gpu_tensor_hash.py), run by the interpreter.
    assert digest(torch.arange(10, dtype=torch.float32), CudaDigest) == "3015603431603089"
    noise = torch.randn(20001, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert digest(noise, CudaDigest) == "f484367ed5557975"


def qkv() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    sizes = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    return {f"model.layers.0.self_attn.{name}.weight": torch.randn(rows, 32) for name, rows in sizes.items()}


def test_queries_keys_and_values_are_one_matrix(arch):
    tensors = qkv()
    (rank,) = expected(arch, 1, tensors)
    assert rank == {"model.layers.0.self_attn.qkv_proj.weight": digest(torch.cat(list(tensors.values())))}


def test_ranks_hold_their_heads(arch):
    q, k, v = qkv().values()
    ranks = expected(arch, 2, qkv())
    assert ranks[1]["model.layers.0.self_attn.qkv_proj.weight"] == digest(torch.cat([q[16:], k[8:], v[8:]]))


def test_more_ranks_than_key_heads_share_them(arch):
    q, k, v = qkv().values()
    ranks = expected(arch, 4, qkv())
    assert ranks[1]["model.layers.0.self_attn.qkv_proj.weight"] == digest(torch.cat([q[8:16], k[:8], v[:8]]))
    assert ranks[2]["model.layers.0.self_attn.qkv_proj.weight"] == digest(torch.cat([q[16:24], k[8:], v[8:]]))


def test_rows_columns_and_copies(arch):
    torch.manual_seed(0)
    down, gate, up, norm = torch.randn(32, 48), torch.randn(48, 32), torch.randn(48, 32), torch.randn(32)
    ranks = expected(
        arch,
        2,
        {
            "model.layers.0.mlp.gate_proj.weight": gate,
            "model.layers.0.mlp.up_proj.weight": up,
            "model.layers.0.mlp.down_proj.weight": down,
            "model.norm.weight": norm,
        },
    )
    assert ranks[0]["model.layers.0.mlp.gate_up_proj.weight"] == digest(torch.cat([gate[:24], up[:24]]))
    assert ranks[1]["model.layers.0.mlp.down_proj.weight"] == digest(down[:, 24:])
    assert ranks[0]["model.norm.weight"] == ranks[1]["model.norm.weight"] == digest(norm)


def test_the_vocabulary_is_filled_up_with_zeros(arch):
    embedding = torch.randn(96, 32)
    ranks = expected(arch, 2, {"model.embed_tokens.weight": embedding})
    padded = torch.cat([embedding, torch.zeros(32, 32)])
    assert [r["model.embed_tokens.weight"] for r in ranks] == [digest(padded[:64]), digest(padded[64:])]


def test_the_experts_of_a_layer_are_two_tensors_in_whatever_order_they_come(folders):
    arch = read_architecture(folders["qwen3-moe"][0])
    torch.manual_seed(0)
    parts = {
        f"model.layers.0.mlp.experts.{e}.{kind}_proj.weight": torch.randn((32, 20) if kind == "down" else (20, 32))
        for e in range(8)
        for kind in ("down", "gate", "up")
    }
    gate, up, down = (torch.stack([parts[f"model.layers.0.mlp.experts.{e}.{k}_proj.weight"] for e in range(8)])
                      for k in ("gate", "up", "down"))  # fmt: skip
    for order in (list(parts), list(reversed(parts))):
        ranks = expected(arch, 2, {name: parts[name] for name in order})
        for rank, half in enumerate((slice(0, 10), slice(10, 20))):
            assert ranks[rank] == {
                "model.layers.0.mlp.experts.w13_weight": digest(torch.cat([gate[:, half], up[:, half]], dim=1)),
                "model.layers.0.mlp.experts.w2_weight": digest(down[:, :, half]),
            }


def test_the_down_projections_of_latent_attention_are_one_matrix_that_every_rank_has(folders):
    arch = read_architecture(folders["deepseek"][0])
    a, b, up = torch.randn(24, 32), torch.randn(24, 32), torch.randn(80, 24)
    stem = "model.layers.0.self_attn."
    tensors = {"q_a_proj": a, "kv_a_proj_with_mqa": b, "q_b_proj": up}
    ranks = expected(arch, 2, {f"{stem}{name}.weight": tensor for name, tensor in tensors.items()})
    fused = digest(torch.cat([a, b]))
    assert [r[f"{stem}fused_qkv_a_proj_with_mqa.weight"] for r in ranks] == [fused, fused]
    assert ranks[1][f"{stem}q_b_proj.weight"] == digest(up[40:])
    arch = read_architecture(folders["moonlight"][0])  # no latent of the queries, so nothing to fuse
    (rank,) = expected(arch, 1, {f"{stem}q_proj.weight": up, f"{stem}kv_a_proj_with_mqa.weight": b})
    assert rank == {f"{stem}q_proj.weight": digest(up), f"{stem}kv_a_proj_with_mqa.weight": digest(b)}


def test_a_fused_tensor_of_which_a_part_was_not_sent_is_named(arch):
    tensors = qkv()
    (whole,) = expected(arch, 1, tensors)
    collector = Expected(arch, 1)
    for name, tensor in list(tensors.items())[:2]:
        collector.add(name, tensor)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert collector.compare([whole]) == [f"{name}: only some of its parts were sent"]


def test_every_difference_is_named(arch):
    collector = Expected(arch, 1)
    a, b, c = (f"model.layers.{layer}.input_layernorm.weight" for layer in range(3))
    for name in (a, b, c):
        collector.add(name, torch.ones(2))
    good = collector.digests[0]
    assert collector.compare([good]) == []
    found = {a: "0" * 16, b: good[b], "model.norm.weight": "1" * 16}
    assert collector.compare([found]) == [
        f"{a}: differs",
        f"{c}: not reported",
        "model.norm.weight: reported and not sent",
    ]
    assert collector.compare([good, good]) == ["2 ranks answered, required 1"]


def test_a_tensor_that_the_model_has_not_is_refused(arch):
    with pytest.raises(ValueError, match=r"found model\.norm\.bias, required a tensor of the model"):
        Expected(arch, 1).add("model.norm.bias", torch.ones(2))


@pytest.mark.parametrize("groups", [2, 4])
def test_experts_are_where_they_are_served_and_split_inside_a_group(folders, groups):
    arch = read_architecture(folders["qwen3-moe"][0])  # 8 experts; 4 ranks
    collector = Expected(arch, 4, expert=groups)
    experts, linears = "model.layers.2.mlp.experts", ("gate_proj", "up_proj")
    tensors = {f"{experts}.{i}.{name}.weight": torch.randn(20, 32) for i in range(8) for name in linears}
    for name, tensor in tensors.items():
        collector.add(name, tensor)
    of_group, size = 8 // groups, 4 // groups
    for rank, digests in enumerate(collector.digests):
        group, place = divmod(rank, size)
        served = [
            tensors[f"{experts}.{of_group * group + i}.{name}.weight"] for i in range(of_group) for name in linears
        ]
        w13 = torch.cat([tensor.chunk(size)[place] for tensor in served])
        assert digests == {f"{experts}.w13_weight": digest(w13)}
