"""The experts in a server's answer, decoded. The answer was recorded from a real server (sglang 0.5.23 on a CPU)."""

import base64
from dataclasses import replace

import numpy as np
import pytest

from r1engine.hf.architecture import read_architecture
from r1engine.rollout.sglang.routed_experts import decode_experts

# Qwen3-MoE, 4 layers of 8 experts, 2 a token; 4 prompt tokens and 6 drawn ones: 9 rows.
RECORDED = (
    "BwAAAAMAAAAGAAAABQAAAAEAAAAFAAAABwAAAAAAAAAFAAAABwAAAAYAAAAFAAAAAgAAAAcAAAAFAAAABwAAAAUAAAAAAAAABgAA"
    "AAUAAAACAAAABQAAAAUAAAAHAAAABQAAAAcAAAAGAAAABQAAAAUAAAAHAAAABQAAAAcAAAAFAAAAAAAAAAYAAAAFAAAABQAAAAcA"
    "AAAFAAAABwAAAAUAAAAGAAAABgAAAAUAAAAHAAAABgAAAAcAAAAFAAAABQAAAAAAAAAGAAAABQAAAAcAAAACAAAABQAAAAcAAAAF"
    "AAAAAwAAAAYAAAAFAAAABwAAAAUAAAAHAAAABQAAAAUAAAAHAAAABgAAAAUAAAAHAAAABQAAAAUAAAAHAAAA"
)
FIRST = [[7, 3], [6, 5], [1, 5], [7, 0]]  # of the first token, a layer each


@pytest.fixture
def arch(folders):
    arch = read_architecture(folders["qwen3-moe"][0])
    return replace(arch, moe=replace(arch.moe, layers=(True,) * 4))


def test_a_recorded_answer(arch):
    experts = decode_experts(RECORDED, arch, 10, "http://a:1")
    assert experts.shape == (9, 4, 2)
    assert experts[0].tolist() == FIRST
    assert all(len(set(pair)) == 2 for token in experts.tolist() for pair in token)


def test_layers_without_experts_are_left_out(arch):
    arch = replace(arch, moe=replace(arch.moe, layers=(False, True, False, True)))
    experts = decode_experts(RECORDED, arch, 10, "http://a:1")
    assert experts.shape == (9, 2, 2)
    assert experts[0].tolist() == [FIRST[1], FIRST[3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "http://a:1: the answer has no routed_experts, .* start the server with --enable-return-routed-experts"),
        ("no base64!", "http://a:1: routed_experts is no base64 of int32"),
        (RECORDED[:-8], "http://a:1: routed_experts has 70 entries, required 9 x 4 x 2|no base64"),
        (base64.b64encode(np.full(72, 8, "<i4")).decode(), "names experts 8 to 8, required 0 to 7"),
    ],
)
def test_what_is_no_answer_is_refused(arch, text, message):
    with pytest.raises(RuntimeError, match=message):
        decode_experts(text, arch, 10, "http://a:1")
