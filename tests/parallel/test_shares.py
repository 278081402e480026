"""The shares of the weights that the ranks of every layout get: together the whole, about equal, no tensor twice."""

import pytest
import torch
from model_folders import save_model
from ranks import on_ranks
from safetensors.torch import load_file

from r1engine.config import RlConfig
from r1engine.model.parallel import join, leave, leave_layout
from r1engine.model.policy import Policy
from r1engine.model.state.dealing import Lot, in_turns

LAYOUTS = {
    2: {
        "tp2": ("qwen2", {"tensor": 2}),
        "dp2": ("qwen3", {"data": 2}),
        "pp2-tied": ("qwen2-tied", {"pipeline": 2}),
        "tp2-etp2": ("deepseek", {"tensor": 2, "expert_tensor": 2}),
        "ep2-fused": ("qwen3-moe", {"expert": 2}),
    },
    4: {
        "tp2-ep2": ("deepseek", {"tensor": 2, "expert": 2}),
        "pp2-ep2-fused": ("qwen3-moe", {"pipeline": 2, "expert": 2}),
        "cp2-ep4": ("moonlight", {"context": 2, "expert": 4}),
    },
}


def shares(cases: dict, folders) -> tuple[dict, dict]:
    """Of each case this rank's share, names in their order, and the names that it sees."""
    found, seen = {}, {}
    for name, (family, sizes) in cases.items():
        experts = "fused" if name.endswith("fused") else "megatron"
        cfg = RlConfig(model={"path": folders / family, "experts": experts}, parallel=sizes)
        policy = Policy(cfg.model, cfg.parallel, cfg.optimizer, join(cfg.parallel))
        streams = [[(n, None if t is None else t.clone()) for n, t in policy.weights(dealt=True)] for _ in range(2)]
        found[name] = [{n: t for n, t in stream if t is not None} for stream in streams]
        seen[name] = [n for n, _ in streams[0]]
        leave_layout()
    leave()
    return found, seen


def test_owners_take_turns_by_what_they_have_had():
    names, sizes, owners = "abcd", (4, 4, 2, 6), (0, 0, 1, 1)
    dealt = [(Lot([n], [owner], size), owner) for n, size, owner in zip(names, sizes, owners, strict=True)]
    # Before its lots owner 0 has had 0 and 4, owner 1 has had 0 and 2.
    assert [lot.names for lot, _ in in_turns(dealt)] == [["a"], ["c"], ["d"], ["b"]]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.rotating)])
def test_the_shares_are_the_whole_once_and_about_equal(tmp_path, ranks):
    for family in {family for family, _ in LAYOUTS[ranks].values()}:
        save_model(tmp_path / family, family)
    found, seen = zip(*on_ranks(ranks, shares, LAYOUTS[ranks], tmp_path), strict=True)
    for name, (family, sizes) in LAYOUTS[ranks].items():
        whole = load_file(tmp_path / family / "model.safetensors")
        dealt = [share[name][0] for share in found]
        assert sorted(n for share in dealt for n in share) == sorted(whole), name
        assert all(torch.equal(t, whole[n]) for share in dealt for n, t in share.items()), name
        assert [list(share[name][1]) for share in found] == [list(share) for share in dealt], name
        stages = sizes.get("pipeline", 1)
        for stage in range(stages):  # a stage's ranks hold its layers alone
            loads = [
                sum(t.numel() for t in share.values()) for share in dealt[stage * ranks // stages :][: ranks // stages]
            ]
            assert max(loads) - min(loads) <= max(t.numel() for t in whole.values()), (name, loads)
            of_stage = [names[name] for names in seen][stage * ranks // stages :][: ranks // stages]
            assert all(names == of_stage[0] for names in of_stage)  # others' are named in their place
        for share in dealt:  # SGLang wants them at once
            blocks = {n.split(".self_attn.")[0] + ".self_attn." for n in share if ".self_attn." in n}
            assert {n for n in whole if n.startswith(tuple(blocks))} <= share.keys()
