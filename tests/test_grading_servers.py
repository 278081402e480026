"""Runs whose rewards come from a judge and from reward models over HTTP; the servers are fakes, see model_server.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from model_server import ModelServer, Reply, fair_judge, rates, says, shown_texts
from ranks import forked

from r1engine.config import TinyConfig
from r1engine.demo.tiny import write_model
from r1engine.rewards.extract import final_answer

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "r1engine" / "train.py"
SHORT = [
    "threads=1",
    "grpo.questions=6",
    "grpo.group_size=8",
    "grpo.minibatches=1",
    "grpo.kl_coef=0",
    "steps=6",
    "optimizer.lr=1e-3",
    "rollout.max_tokens=24",
    "checkpoint.every=0",
    "log.tensorboard=false",
    "log.samples=48",
    "rewards.workers=1",
]


@pytest.fixture(scope="module")
def model(tiny_base) -> Path:
    """A base model that answers sums, roughly."""
    return tiny_base / "base" / "model"


def run(folder: Path, model: Path, rewards: list[str], *settings: str) -> subprocess.CompletedProcess[str]:
    """A training run on questions of these rewards in turn."""
    rows = [json.loads(line) for line in (model.parents[1] / "tiny" / "train.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["reward"] = rewards[number % len(rewards)]
    rows.append({"question": "What is it?", "answer": "\\sqrt{", "reward": "math"})  # is not drawn in so few steps
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(f"model: {{path: {model}}}\ndata: {{train: {folder / 'train.jsonl'}}}\n")
    return forked(1, TRAIN, folder / "run.yaml", *SHORT, f"run_dir={folder / 'run'}", *settings)


def logged(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / f"{name}.jsonl").read_text().splitlines()]


def of_judge(server: ModelServer, *more: str) -> str:
    return f"rewards.judge={{urls: ['{server.url}/v1'], model: m{''.join(', ' + text for text in more)}}}"


def parity_judge(path: str, body: dict) -> Reply:
    """To it two whole numbers are the same if both are even or both are odd: half of what the model writes is right."""
    texts = shown_texts(body)
    if all(text.isdecimal() for text in texts):
        return says("SAME" if sum(map(int, texts)) % 2 == 0 else "DIFFERENT")
    return fair_judge(path, body)


def test_run_learns_from_a_judge_and_a_reward_model(tmp_path, model, serve):
    judge = serve(parity_judge)
    # Likes short summaries, but not empty ones; a text that it gets is "question|response".
    helpful = serve(rates(lambda text: -len(text.partition("|")[2] or "x" * 30) / 10))
    done = run(
        tmp_path,
        model,
        ["judge", "preference", "math"],
        of_judge(judge),
        f"rewards.helpfulness_model={{urls: ['{helpful.url}'], model: rm, template: '{{prompt}}|{{response}}'}}",
        "rewards.helpfulness={0: 0.0, 2: 1.0}",
        "steps=5",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows, samples = logged(tmp_path, "metrics"), logged(tmp_path, "samples")
    kinds = {row["question"]: row["reward"] for row in map(json.loads, (tmp_path / "train.jsonl").open())}
    assert sum(row["grad_norm"] > 0 for row in rows) >= 4  # a group may be of one mind
    assert logged(tmp_path, "undecided") == []
    # A reference that no rule can read is told at load, before an answer to it is undecided.
    place = f"{tmp_path}/train.jsonl:{len(kinds)}"
    told = f"1 of {len(kinds)} references (0%) are undecided whatever the answer: {place} cannot"
    assert told.replace(" ", "") in "".join(done.stdout.split())
    # The schedule: nobody asks the reward model in the first two steps, but for the check at the start.
    rated = [row.get("reward/helpfulness") for row in rows]
    assert rated[:2] == [None, None] and None not in rated[2:]
    assert all(row["alarm/helpfulness"] == 0 for row in rows)
    # What the judge says is the verdict.
    judged = [sample for sample in samples if kinds[sample["question"]] == "judge"]
    for sample in judged:
        answer, _ = final_answer(sample["completion"])
        is_right = answer is not None and answer.isdecimal() and (int(answer) + int(sample["answer"])) % 2 == 0
        assert sample["verdict"] == ("right" if is_right else "wrong"), sample
    assert {sample["verdict"] for sample in judged} == {"right", "wrong"}
    # What the reward model likes is what is learned: its score and the format are the order of the advantages.
    liked = [s for s in samples if kinds[s["question"]] == "preference" and s["step"] > 2 and not s["truncated"]]
    for question in {sample["question"] for sample in liked}:
        group = [sample for sample in liked if sample["question"] == question]
        group.sort(key=lambda sample: sample["reward/helpfulness"] + sample["reward/format"])
        advantages = [sample["advantage"] for sample in group]
        assert advantages == sorted(advantages) and len(set(advantages)) > 1
    shown = [body["text"] for _, body, _ in helpful.seen[1:]]
    assert all("<think>" not in text and "</think>" not in text for texts in shown for text in texts)


def test_servers_that_fail_in_a_run_make_its_samples_undecided_and_end_nothing(tmp_path, model, serve):
    judge = serve(lambda path, body: fair_judge(path, body) if len(judge.seen) <= 60 else None)
    harmless = serve(lambda path, body: rates(len)(path, body) if len(harmless.seen) <= 3 else (500, b"out of memory"))
    done = run(
        tmp_path,
        model,
        ["judge", "preference"],
        of_judge(judge, "tries: 1"),
        f"rewards.harmlessness_model={{urls: ['{harmless.url}'], model: rm, tries: 1, "
        "template: '{prompt}|{response}'}",
        "rewards.harmlessness=1",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows, undecided = logged(tmp_path, "metrics"), logged(tmp_path, "undecided")
    assert rows[-1]["reward/undecided"] > 0.3
    assert len(undecided) == round(sum(48 * row["reward/undecided"] for row in rows))
    reasons = {row["reward"]: row["reason"] for row in undecided}
    assert "no reply from http://127.0.0.1" in reasons["judge"]
    assert "harmlessness: no reply from" in reasons["preference"] and "HTTP 500 out of memory" in reasons["preference"]
    assert all({"completion", "question", "answer", "id", "step"} <= row.keys() for row in undecided)
    # Such a sample gives no gradient, whatever the others of its question got.
    dropped = [sample for sample in logged(tmp_path, "samples") if sample["verdict"] == "undecided"]
    assert dropped and all(sample["advantage"] == 0 and "reward/accuracy" not in sample for sample in dropped)


def refused(tmp_path: Path, *rewards: str) -> str:
    """What `r1engine train` says to a run that cannot start; it has no time to load torch, and makes nothing."""
    write_model(tmp_path, TinyConfig(hidden_size=32, layers=1))
    (tmp_path / "train.jsonl").write_text('{"question": "1+1", "answer": 2}\n')
    (tmp_path / "run.yaml").write_text(f"model: {{path: {tmp_path}}}\ndata: {{train: {tmp_path / 'train.jsonl'}}}\n")
    code = "import sys; from r1engine.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "train", str(tmp_path / "run.yaml"), f"run_dir={tmp_path / 'run'}", *rewards]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
    return done.stderr


NOBODY = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            [f"rewards.judge={{urls: [{NOBODY}/v1], model: m, tries: 1}}"],
            f"judge m at {NOBODY}/v1: found undecided (no reply from {NOBODY}/v1/chat/completions: ",
        ),
        (
            [
                f"rewards.helpfulness_model={{urls: [{NOBODY}], model: r, tries: 1, "
                "template: '{prompt}{response}'}",
                "rewards.helpfulness=1",
            ],
            f"reward model r at {NOBODY}: found no score (no reply from {NOBODY}/classify: ",
        ),
        (
            [f"rewards.judge={{urls: [{NOBODY}/v1], model: m, key_variable: NO_SUCH_KEY}}"],
            "the environment variable NO_SUCH_KEY is not set",
        ),
    ],
)
def test_run_without_its_servers_is_refused_before_anything_is_made(tmp_path, settings, message):
    assert message in refused(tmp_path, *settings)


def test_judge_that_takes_anything_is_refused_at_the_start(tmp_path, serve):
    gullible = serve(lambda path, body: (200, b'{"choices": [{"message": {"content": "SAME"}}]}'))
    assert "found undecided (the judge says right to the canary" in refused(tmp_path, of_judge(gullible))


def test_questions_for_servers_that_are_not_there_are_refused(tmp_path, model):
    done = run(tmp_path, model, ["preference"])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "rewards.helpfulness_model or rewards.harmlessness_model: found null, required by the" in done.stderr
