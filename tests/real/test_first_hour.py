"""The README's way from nothing to a trained chat model, with a real one: its commands as they stand there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from first_hour import first_hour, lay_out
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.real


def test_the_readmes_commands_train_a_real_chat_model_with_an_own_reward(tmp_path):
    _, _, download, train, generate = first_hour()
    lay_out(tmp_path, download)
    model = Path(os.environ["R1_REAL_MODEL"])
    (tmp_path / "build" / "real").mkdir(parents=True)
    (tmp_path / "build" / "real" / model.name).symlink_to(model)

    def r1engine(words: list[str], said: str) -> str:
        command = [sys.executable, "-m", "r1engine", *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, input=said, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    r1engine([*train, "rollout.max_tokens=32"], "")  # as they stand there the commands take minutes
    run = tmp_path / generate[2]
    trained = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2] and all(0 <= row["reward/close"] <= 1 for row in trained)
    assert all(row["logp_diff/max"] < 0.05 for row in trained)
    AutoModelForCausalLM.from_pretrained(run / "model")
    assert r1engine([*generate, "--draw", "max_tokens=16"], "What is the capital of France?\n").strip()
