"""A run on data as it was downloaded, with a reward of the user's own."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import in_folder
import pytest
from chat_folders import KINDS, save_tokenizer
from first_hour import first_hour, lay_out
from model_folders import save_model
from ranks import forked

from r1engine.config import load

ROOT = Path(__file__).resolve().parents[2]
IN_FOLDER = Path(in_folder.__file__)
DRIVER = ROOT / "tests" / "killed.py"


def test_raw_solutions_and_an_own_reward_train(tiny_base, tmp_path):
    rows = [json.loads(line) for line in (tiny_base / "tiny" / "train.jsonl").read_text().splitlines()]
    (tmp_path / "data").mkdir()
    for name, part in (("a", rows[:200]), ("b", rows[200:400])):
        raw = [{"problem": row["question"], "answer": f"We add.\n#### {row['answer']}", "level": 1} for row in part]
        text = "".join(json.dumps(row) + "\n" for row in raw)
        (tmp_path / "data" / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "own.py").write_text(
        "def level(columns, completion):\n    return float(columns['level'])\n\n"
        "def never(completion):\n    raise ValueError('no such thing')\n"
    )
    settings = [
        f"model.path={tiny_base}/base/model", f"data.train={tmp_path}/data", "data.columns.question=problem",
        f"rewards.functions.level={tmp_path}/own.py:level", f"rewards.functions.never={tmp_path}/own.py:never",
        f"rewards.functions.close={ROOT}/examples/own_reward.py:close", "rewards.function_weights.never=0",
        "rewards.function_weights.close=0",
        "rewards.accuracy=0", "rewards.format=0", "grpo.dynamic_sampling=1",
        "steps=1", "grpo.questions=4", "grpo.group_size=4", "grpo.minibatches=1",
        "optimizer.warmup_steps=0", "rewards.workers=1", "threads=1", "log.tensorboard=false",
        f"run_dir={tmp_path}/run",
    ]  # fmt: skip
    done = forked(1, DRIVER, 0, 0, "train", ROOT / "configs" / "tiny_r1_zero.yaml", *settings, "data.heldout=null")
    assert done.returncode == 0, done.stderr[-3000:]
    told = done.stdout + done.stderr
    assert "rewards.functions.never gave no value for any of 16 completions: ValueError: no such thing" in " ".join(
        told.split()
    )
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["reward/level"] == 1.0 and "reward/close" in row and "reward/never" not in row
    # The weights leave a reward of 1 to every completion: no question has a signal, and all are drawn once more.
    assert (row["groups/without_signal"], row["groups/drawn_again"], row["reward/std"]) == (1.0, 4.0, 0.0)
    assert row["questions/consumed"] == 8
    assert row["reward/undecided"] < 1 and row["reward/accuracy"] >= 0
    starts = json.loads((tmp_path / "run" / "provenance.json").read_text())["starts"]
    assert set(starts[0]["functions"]) == {"level", "never", "close"}
    answers = [json.loads(line)["answer"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert answers and all(answer.isdecimal() for answer in answers)


@pytest.mark.rotating
def test_five_commands_lead_from_nothing_to_a_chat_model_with_an_own_reward(tmp_path):
    _, _, download, train, generate = first_hour()
    lay_out(tmp_path, download)
    # What make brings, in small: a chat model with a real template.
    folder = Path(load(ROOT / train[2], []).model.folder).name
    save_model(tmp_path / "build" / "real" / folder, "qwen2", vocab_size=512, max_position_embeddings=512)
    save_tokenizer(tmp_path / "build" / "real" / folder, KINDS["chatml"])
    done = forked(
        1, IN_FOLDER, tmp_path, *train[1:], "steps=1", "rollout.max_tokens=8", "rewards.workers=1", "threads=1"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logged = [json.loads(line) for line in (tmp_path / generate[2] / "metrics.jsonl").read_text().splitlines()]
    assert ["reward/close" in row for row in logged if "loss" in row] == [True]
    done = forked(1, IN_FOLDER, tmp_path, *generate[1:])
    assert done.returncode == 0, done.stdout + done.stderr
