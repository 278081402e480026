"""The digests that a server must report: SGLang's fused and split tensors, made here from Hugging Face names."""

from __future__ import annotations

import hashlib

import pytest
import torch

from r1engine.architecture import read_architecture
from r1engine.rollout.sglang.checksum import Expected, digest


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


def test_every_difference_is_named(arch):
    collector = Expected(arch, 1)
    for name in ("a.weight", "b.weight", "c.weight"):
        collector.add(name, torch.ones(2))
    good = collector.digests[0]
    assert collector.compare([good]) == []
    found = {"a.weight": "0" * 16, "b.weight": good["b.weight"], "d.weight": "1" * 16}
    assert collector.compare([found]) == [
        "a.weight: differs",
        "c.weight: not reported",
        "d.weight: reported and not sent",
    ]
    assert collector.compare([good, good]) == ["2 ranks answered, required 1"]
