"""Real servers that are killed or stopped at random moments: nothing is lost, doubled or biased.

R1_FAULT_TRIALS=20 makes it twenty (`make test-sglang-faults`); every seventh trial kills, the others stop the server.
"""

from __future__ import annotations

import os
import random
import signal

import pytest
import real
import torch
from model_folders import save_model

from r1engine.rollout import generate

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

TRIALS = int(os.environ.get("R1_FAULT_TRIALS", "5"))
GROUPS, SIZE, LIMIT = 6, 6, 100
SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128, "max_position_embeddings": 512}


@pytest.fixture
def servers(tmp_path):
    """Two servers, and the transformers model that both hold."""
    module = save_model(tmp_path / "model", "qwen2", **SIZES)
    started = [real.serve(tmp_path / "model", tmp_path, f"server{i}") for i in range(2)]
    try:
        for server in started:
            server.wait_ready(real.START_SECONDS)
        yield started, module
    finally:
        for server in started:
            server.stop()


def test_faults_at_random_moments_lose_nothing_and_favour_no_length(servers, tmp_path):
    running, module = servers
    engine = real.generator(tmp_path / "model", [s.client.url for s in running], tmp_path)
    moments = random.Random(7)
    weights = real.changed(module, seed=1)
    disturbed, undisturbed, hits = [], [], 0
    for trial in range(TRIALS):
        engine.load_weights(iter(weights.items()))  # takes back what answers again, and verifies it
        assert all(endpoint.is_usable for endpoint in engine.endpoints)
        undisturbed += draw(engine, module)
        victim, word = moments.randrange(2), signal.SIGKILL if trial % 7 == 3 else signal.SIGSTOP
        moment, count = moments.randrange(GROUPS * SIZE * LIMIT // 4), 0

        def strike(number: int, victim: int = victim, word: int = word, moment: int = moment) -> None:
            nonlocal count, hits
            if count <= moment < count + number:
                os.killpg(running[victim].process.pid, word)
                hits += 1
            count += number

        disturbed += draw(engine, module, strike)
        server = running[victim]
        if count > moment and word == signal.SIGKILL:
            port = int(server.client.url.rsplit(":", 1)[1])
            server.stop()
            running[victim] = real.serve(tmp_path / "model", tmp_path, f"server{victim}", port)
            running[victim].wait_ready(real.START_SECONDS)
        elif count > moment:
            os.killpg(server.process.pid, signal.SIGCONT)
    assert hits >= TRIALS // 2
    ours, theirs = (torch.tensor([float(len(c.tokens)) for c in part]) for part in (disturbed, undisturbed))
    error = (ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt()
    print(
        f"{TRIALS} trials, {hits} hits: mean length {ours.mean():.1f} disturbed, {theirs.mean():.1f} not, +-{error:.1f}"
    )
    assert (ours.mean() - theirs.mean()).abs() < 4 * error


def draw(engine, module, on_tokens=None) -> list:
    """One rollout, whole and of the right weights."""
    completions = generate(
        engine,
        real.prompts(GROUPS),
        num_samples=SIZE,
        step=0,
        max_tokens=LIMIT,
        on_tokens=on_tokens,
    )
    assert [(c.prompt.id, c.sample) for c in completions] == [(i, j) for i in range(GROUPS) for j in range(SIZE)]
    assert all(len(c.tokens) == LIMIT if c.truncated else c.tokens[-1] == 1 for c in completions)
    assert all(c.versions == ((engine.weight_version, len(c.tokens)),) for c in completions)
    assert real.difference(module, completions) < 1e-4
    return completions
