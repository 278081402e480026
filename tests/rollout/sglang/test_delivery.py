"""Who gets what from whom, by hand: small servers, and the 671B model on 256 + 256 GPUs."""

import math
import re
from pathlib import Path

import pytest
import torch

from r1engine.hf.architecture import read_architecture
from r1engine.hf.tensors import hf_shapes
from r1engine.model.state.dealing import Lot, deal
from r1engine.rollout.sglang.delivery import Parcel, ServerLayout, Spec, flows, parcels, rounds

EXPERT = "model.layers.1.mlp.experts.{}.up_proj.weight"
NORM, SHARED = "model.norm.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"
MODELS = Path(__file__).resolve().parents[3] / "configs" / "models"


def spec(name: str, elements: int, dtype: str = "float32") -> Spec:
    return Spec(name, dtype, (elements,))


@pytest.mark.parametrize(
    ("expert", "holders"),
    [
        (1, [range(4), range(4), range(4), range(4)]),  # every rank has a part of each expert
        (2, [range(2), range(2), range(2, 4), range(2, 4)]),
        (4, [range(1), range(1, 2), range(2, 3), range(3, 4)]),
    ],
)
def test_an_expert_is_needed_where_it_is_served_and_all_else_everywhere(expert, holders):
    layout = ServerLayout((range(4),), num_experts=4, expert=expert)
    assert [layout.holders(EXPERT.format(i)) for i in range(4)] == holders
    assert layout.holders(NORM) == layout.holders(SHARED) == range(4)


def test_a_round_by_hand():
    layout = ServerLayout((range(2), range(2, 4)), num_experts=4, expert=4)
    shares = [[spec(NORM, 10), spec(EXPERT.format(3), 8, "bfloat16")], [spec(EXPERT.format(0), 5)]]
    found = parcels(shares, layout)
    assert found == [
        Parcel(0, (0, 1), range(2), (spec(NORM, 10),)),  # once to each node, half of it by the other rank
        Parcel(0, (0, 1), range(2, 4), (spec(NORM, 10),)),
        Parcel(0, (0,), range(3, 4), (spec(EXPERT.format(3), 8, "bfloat16"),)),
        Parcel(1, (1,), range(1), (spec(EXPERT.format(0), 5),)),
    ]
    norm, _, third, first = found
    assert [norm.num_bytes, third.num_bytes, first.num_bytes] == [48, 16, 32]  # 40, 16 and 20 bytes, in sixteens
    assert [norm.chunk(0), norm.chunk(1)] == [slice(0, 32), slice(32, 48)]
    counted = flows(found, 2, layout)
    assert counted.sent == [32 + 32 + 16, 16 + 16 + 32] and counted.received == [32 + 32, 16, 32, 16 + 16]


def test_wide_elements_come_first_so_that_every_tensor_lies_at_a_multiple_of_its_element():
    share = [spec("a", 3, "float8_e4m3fn"), spec("b", 1), spec("c", 5, "bfloat16")]
    (parcel,) = parcels([share], ServerLayout((range(1),)))
    assert [s.name for s in parcel.specs] == ["b", "c", "a"] and parcel.num_bytes == 32  # 4 + 10 + 3


def test_rounds_are_cut_by_what_a_server_rank_gets_whoever_has_the_tensors():
    layout = ServerLayout((range(2),), num_experts=2, expert=2)
    names = [EXPERT.format(0), EXPERT.format(1), NORM, "model.layers.0.self_attn.q_proj.weight"]
    names += ["model.layers.0.self_attn.k_proj.weight", SHARED]
    sizes = dict.fromkeys(names, 40)

    def cut(mine: set[int]) -> list[list[str]]:
        stream = [(name, torch.zeros(10) if i in mine else None) for i, name in enumerate(names)]
        stream.insert(1, (names[0] + "_scale_inv", torch.zeros(1) if 0 in mine else None))  # not in `sizes`
        return [[name for name, _ in part] for part in rounds(stream, sizes, layout, 80)]

    everything = cut(set(range(6)))
    # Both experts fit beside a norm: each rank gets one. Attention stays together.
    assert everything == [[names[0], names[0] + "_scale_inv", names[1], NORM], names[3:5], [SHARED]]
    assert cut({2, 4}) == [[NORM], [names[4]], []] and cut(set()) == [[], [], []]


def test_671b_from_256_ranks_into_a_server_of_16():
    arch = read_architecture(MODELS / "DeepSeek-V3")
    layout, shapes = ServerLayout((range(8), range(8, 16)), arch.moe.num_experts, expert=16), hf_shapes(arch)
    # 16 pipeline stages of 16 ranks, each of which holds 16 experts of a layer; stages of 3, 4, ..., 4 and 2 layers.
    lots: list[dict[str, Lot]] = [{} for _ in range(16)]
    for name, shape in shapes.items():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        stage = 15 if name in ("lm_head.weight", "model.norm.weight") else (layer + 1) // 4
        expert = re.search(r"experts\.(\d+)\.", name)
        holders = [16 * stage + int(expert[1]) // 16] if expert else list(range(16 * stage, 16 * stage + 16))
        key = name.split("self_attn.")[0] if "self_attn." in name else name
        lot = lots[stage].setdefault(key, Lot([], holders))
        lot.names.append(name)
        lot.size += math.prod(shape)
    shares: list[list[Spec]] = [[] for _ in range(256)]
    for own in lots:
        for lot, owner in zip(own.values(), deal(list(own.values())), strict=True):
            shares[owner] += [Spec(name, "bfloat16", shapes[name]) for name in lot.names]
    counted = flows(parcels(shares, layout), 256, layout)
    # A layer's experts have 22.55 GB, all else 34.2 GB: an eighth of it comes to each GPU of a node.
    assert [round(b / 1e9, 1) for b in counted.received] == [86.0] * 16
    assert max(counted.sent) / 1e9 == pytest.approx(4 * 22.55 / 16 + 2 * 34.2 / 256, rel=0.03)  # experts of 4 layers
    assert sum(counted.sent) == sum(counted.received)
