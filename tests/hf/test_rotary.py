"""Rotary settings of config.json against transformers: angles, magnitude, context. The models are in test_policy.py."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from r1engine.hf.architecture import Architecture, read_architecture
from r1engine.hf.rotary import rotary_frequencies

SIZES = {
    "vocab_size": 96, "hidden_size": 256, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 4096,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(folder, family: str, rope: dict | None, **changes: object) -> Architecture:
    """The architecture of a folder with these keys, in the older of the two places."""
    config = SIZES | {"architectures": [f"{family}ForCausalLM"], "rope_scaling": rope} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


def expected(family: str, rope: dict, **changes: object) -> tuple[torch.Tensor, float]:
    """transformers' angles and magnitude."""
    options = SIZES | changes
    theta = options.pop("rope_theta")
    kind = rope.get("rope_type", rope.get("type"))
    given = {"rope_theta": theta} | rope | {"rope_type": kind}
    return ROPE_INIT_FUNCTIONS[kind](getattr(transformers, f"{family}Config")(**options, rope_parameters=given))


ROPES = [
    {"rope_type": "linear", "factor": 4.0},  # deepseek-coder
    {"type": "linear", "factor": 2},  # as vicuna writes it
    {"rope_type": "dynamic", "factor": 6.0},
    {"type": "dynamic", "factor": 2.0},
    YARN,
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},  # Qwen2.5 and QwQ
    YARN | {"attention_factor": 0.9},
    YARN | {"attention_factor": 1.0, "attn_factor": 3.0},
    YARN | {"beta_fast": 16, "beta_slow": 2},
    YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
    YARN | {"mscale": 0.707},
    YARN | {"mscale_all_dim": 1.0},
    YARN | {"truncate": False},
    YARN | {"truncate": False, "beta_fast": 8, "factor": 1.0},
    {"rope_type": "yarn", "factor": 4.0},  # the original context is the folder's
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512},
    YARN | {"factor": 40, "rope_theta": 500.0},
    LLAMA3 | {"original_max_position_embeddings": 1024},
    LLAMA3,
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: ",".join(f"{k}={v}" for k, v in rope.items()))
@pytest.mark.parametrize(("family", "sizes"), [("Qwen2", {}), ("Qwen3", {"head_dim": 128}), ("Llama", {})])
def test_angles_and_magnitude_are_those_of_transformers(tmp_path, family, sizes, rope):
    arch = read(tmp_path, family, rope, **sizes)
    angles, magnitude = expected(family, rope, **sizes)
    torch.testing.assert_close(rotary_frequencies(arch), angles, rtol=1e-6, atol=0)
    assert arch.rope_magnitude == pytest.approx(magnitude, abs=1e-12)
    assert arch.softmax_scale == arch.head_dim**-0.5


def test_the_published_attn_factor_makes_the_magnitude_one(tmp_path):
    # DeepSeek-R1-0528-Qwen3-8B. transformers passes the key over; vLLM and SGLang multiply 0.1 ln 4 + 1 by it.
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    arch = read(tmp_path, "Qwen3", rope | {"attn_factor": 0.8782488562869419}, max_position_embeddings=131072)
    assert arch.rope_magnitude == pytest.approx(1.0, abs=1e-12) and arch.max_positions == 131072
    assert read(tmp_path, "Qwen3", rope).rope_magnitude == 0.1 * math.log(4) + 1
    assert read(tmp_path, "Qwen3", rope | {"attn_factor": None}).rope_magnitude == 0.1 * math.log(4) + 1


@pytest.mark.parametrize(
    ("rope", "longest", "wanted"),
    [
        (None, 32768, 32768),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 32768, 131072),  # Qwen2.5's README
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072, 131072),
        ({"type": "yarn", "factor": 2.5}, 1000, 2500),
        ({"type": "linear", "factor": 4}, 4096, 16384),
        ({"type": "dynamic", "factor": 4.0}, 4096, 4096),
        (LLAMA3 | {"original_max_position_embeddings": 8192}, 131072, 131072),
    ],
)
def test_the_context_is_that_of_after_the_stretch(tmp_path, rope, longest, wanted):
    assert read(tmp_path, "Qwen2", rope, max_position_embeddings=longest).max_positions == wanted


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type 'longrope', required is 'default', 'linear', 'dynamic',"),
        ({"rope_type": "mrope"}, "rope_type 'mrope', required is"),
        ({"type": "linear"}, "key 'factor' is missing, required by Qwen2ForCausalLM"),
        ({"type": "linear", "factor": "4"}, "factor of rope_type 'linear' is '4', required is a number of at least 1"),
        ({"type": "dynamic", "factor": True}, "factor of rope_type 'dynamic' is True"),
        ({"type": "yarn", "factor": 0.5}, "factor of rope_type 'yarn' is 0.5"),
        ({"rope_type": "llama3", "factor": 8.0}, "key 'low_freq_factor' is missing"),
    ],
)
def test_settings_that_cannot_be_computed_are_refused(tmp_path, rope, message):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, "Qwen2", rope)
    assert message in str(caught.value) and str(caught.value).startswith(str(tmp_path / "config.json"))
