"""The paper in miniature: what the world knows, that its pipeline runs through every kind, and kills anywhere in it."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from pages import rows_of, section
from ranks import forked

from r1engine.config import TinyR1Config
from r1engine.demo import tiny_r1
from r1engine.rewards.extract import final_answer

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "tests" / "killed.py"
TRIALS = int(os.environ.get("R1_DEMO_KILLS", "0"))
# As few steps as every kind can be run with. So small a model is never right: the cold start gets conversations, too.
SMALL = {
    "world": {"texts": 96, "student_texts": 48, "heldout": 2, "cold": 2, "more": 2, "vocab_size": 512},
    "base": {"sft.batch_size": 48},
    "student_base": {"sft.batch_size": 48},
    "cold_samples": {"samples": 2, "chunk_questions": 1},
    "cold_data": {"sources": "[cold_samples, world/chats.jsonl]", "methods": "[r1_zero, human]"},
    "samples": {"chunk_questions": 1},
    "dev1": {"sft.epochs": 1, "sft.batch_size": 512},
    "dev3": {"sft.epochs": 1, "sft.batch_size": 512},
    "distilled": {"sft.epochs": 1, "sft.batch_size": 512},
    "helpful": {"reward_model.epochs": 1, "reward_model.batch_size": 1024},
    "harmless": {"reward_model.batch_size": 1024},
    "r1": {"rewards.helpfulness": "{0: 0.0, 1: 1.0}", "rewards.harmlessness": "{0: 0.0, 1: 1.0}"},
    "table": {"samples": 1},
}
OF_RL = {"steps": 2, "grpo.questions": 2, "grpo.group_size": 4, "optimizer.warmup_steps": 0, "evaluation.every": 0}


def settings() -> list[str]:
    rl = dict.fromkeys(("r1_zero", "dev2", "r1", "student_zero"), OF_RL)
    kinds = {name: rl.get(name, {}) | SMALL.get(name, {}) for name in {**rl, **SMALL}}
    drawing = ("r1_zero", "cold_samples", "dev2", "samples", "r1", "student_zero", "table")
    more = [f"stages.{name}.rollout.max_tokens=12" for name in drawing]
    warm = [f"stages.{name}.optimizer.warmup_steps=0" for name in SMALL if name not in (*drawing, "world", "cold_data")]
    given = [f"stages.{name}.{key}={value}" for name, keys in kinds.items() for key, value in keys.items()]
    return [*given, *more, *warm, "stages.r1.data.more=[{path: world/general.jsonl, share: 0.5, from_step: 1}]"]


def test_the_world_knows_what_is_good_and_keeps_its_questions_apart(tmp_path):
    cfg = TinyR1Config(run_dir=tmp_path)
    train, held = tiny_r1.split_pairs(cfg)
    numbers, held_numbers = tiny_r1.split_numbers(cfg)
    assert not {*train} & {*held} and sorted(numbers + held_numbers) == [*range(100)]
    asked = {question for _, question, _, _ in tiny_r1.general(numbers)}
    assert not asked & {question for _, question, _, _ in tiny_r1.general(held_numbers)}
    rng, kinds = random.Random(0), set()
    for language, question, good, domain in tiny_r1.general(held_numbers):
        best, poor = tiny_r1.replies(language, question, domain, numbers, rng)
        assert final_answer(best)[0] == good and good not in [final_answer(reply)[0] for reply in poor]
        kinds.add((language, domain, len(poor)))
    assert kinds == {(spoken, kind, n) for spoken in ("en", "zh") for kind, n in (("general", 3), ("safety", 2))}
    labels = [row["safe"] for row in tiny_r1.labels(numbers, "labels", 1)]
    assert 0.2 < labels.count(False) / len(labels) < 0.5
    assert all(row["chosen"] != row["rejected"] for row in tiny_r1.pairs_of(numbers, "pairs", 1))


def outcome(folder: Path) -> dict[str, bytes]:
    """What each stage made, and the table."""
    made = {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("*/model/model.safetensors")}
    return made | {name: (folder / "table" / name).read_bytes() for name in ("table.json", "table.md")}


@pytest.mark.skipif(not TRIALS, reason="two minutes of a core and more for each kill: make test-demo-r1")
def test_kills_anywhere_in_the_miniature_leave_the_same_table(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, began = ("pipeline", "configs/tiny_r1.yaml", *settings()), time.monotonic()
    whole = forked(1, DRIVER, 0, 0, *command, f"run_dir={tmp_path / 'whole'}")
    seconds = time.monotonic() - began
    assert whole.returncode == 0, whole.stderr[-3000:]
    expected = outcome(tmp_path / "whole")
    assert len(expected) == 14  # 9 models of the table, two reward models, the one that all begins with; two files
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "stages done <b>17 of 17</b>" in page and "cold_data: what left, and why" in page
    assert "R1-Zero</th>" in page and "<td>pass@1</td>" in page
    again = f"run_dir={tmp_path / 'killed'}"
    rng, ended = random.Random(TRIALS), []
    for _ in range(TRIALS):  # anywhere in what a kill has left of the whole, on the average
        moment = f"+{rng.uniform(2, max(4, 2 * seconds / TRIALS)):.2f}s"
        ended.append(forked(1, DRIVER, signal.SIGKILL, moment, *command, again).returncode)
    assert set(ended) <= {0, -signal.SIGKILL, 128 + signal.SIGKILL} and ended.count(0) <= TRIALS // 4, ended
    done = forked(1, DRIVER, 0, 0, *command, again)
    assert done.returncode == 0, done.stderr[-3000:]
    assert outcome(tmp_path / "killed") == expected


def measured() -> list[dict[str, dict[str, float]]]:
    """Of each seed: model -> column -> percent, as the page on pipelines has them."""
    (_, *columns), *rows = rows_of(section((ROOT / "docs" / "pipeline.md").read_text(), "The miniature"))
    cells = {row[0]: dict(zip(columns, [cell.split(" / ") for cell in row[1:]], strict=True)) for row in rows}
    seeds = len(cells["R1"]["general"])
    return [{model: {c: float(of[c][i]) for c in columns} for model, of in cells.items()} for i in range(seeds)]


@pytest.mark.parametrize("table", measured())
def test_the_measured_table_has_the_shape_of_the_paper(table):
    right = {model: (of["two digits"] + of["three digits"]) / 2 for model, of in table.items()}
    assert right["R1-Zero"] >= right["base"] + 50  # reinforcement learning alone (section 2.2)
    assert table["R1-Zero"]["one language"] <= 60 and table["R1-Zero"]["readable"] <= 10  # its two drawbacks
    assert table["Dev1"]["one language"] >= 95 and table["Dev1"]["readable"] >= 95  # the cold start mends them
    assert right["Dev1"] >= right["R1-Zero"] - 10
    assert table["Dev3"]["general"] >= table["Dev2"]["general"] + 15  # the second supervised stage
    assert table["R1"]["general"] > table["Dev3"]["general"]  # the reward model of helpfulness
    assert table["R1"]["unsafe"] >= table["Dev3"]["unsafe"] + 20  # that of harmlessness
    assert right["R1"] >= right["R1-Zero"] and table["R1"]["readable"] >= 95
    assert right["student distilled"] >= right["student by RL"] + 30  # Table 6
    assert table["student distilled"]["one language"] >= table["student by RL"]["one language"] + 30


def test_the_reward_model_of_helpfulness_gains_on_the_mean_of_three_seeds():
    gains = [table["R1"]["general"] - table["Dev3"]["general"] for table in measured()]
    assert len(gains) == 3 and sum(gains) / 3 >= 5
