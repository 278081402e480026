"""The route `receivers` into a real SGLang server of two ranks that serve half of the experts each.

SGLang's CPU build starts and loads such a server and tells its digests, but cannot compute with it ("index -1 is out of
bounds" in its experts' forward pass): what it would draw is not compared here, but in test_real_moe.py with one rank.
"""

from __future__ import annotations

import shutil

import pytest
import real
from model_folders import save_model
from ranks import on_ranks
from safetensors.torch import save_file

from tests.rollout.sglang.test_real_moe import FAMILIES, SIZES, other_weights
from tests.rollout.sglang.test_receivers import refreshes

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


def test_two_ranks_with_half_of_the_experts_each_get_what_they_serve(tmp_path, monkeypatch):
    monkeypatch.setenv("SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION", "0")  # else /health draws a token
    folder, trained = tmp_path / "model", tmp_path / "trained"
    save_model(folder, "deepseek", **SIZES | {"moe_intermediate_size": 64}, **FAMILIES["deepseek"])  # shared: halves
    shutil.copytree(folder, trained)
    save_file(other_weights(folder), trained / "model.safetensors", {"format": "pt"})
    server = real.serve(folder, tmp_path, ranks=2, expert=2)
    try:
        server.wait_ready(real.START_SECONDS)
        with real.receivers(folder, tmp_path, ranks=2) as urls:
            ends, layout = [(server.client.url, urls)], {"tensor": 2, "expert": 2}
            told = on_ranks(2, refreshes, trained, ends, layout, 2, 2)  # raises if a digest of any rank differs
    finally:
        server.stop()
    for own in told:
        for version, (report, versions) in enumerate(own, 1):
            assert versions == [version]
            assert report.most_bytes < 0.6 * report.num_bytes and report.most_received < 0.6 * report.num_bytes
