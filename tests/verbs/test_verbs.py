"""The commands around a run: its checkpoints exported, its model asked, its data looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import forked
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.verbs.generate import Speaker, _parts, converse
from r1engine.verbs.wanted import Wanted, wanted_of

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "tests" / "killed.py"


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory) -> Path:
    """A run of three steps with a checkpoint each, of which one and the best are kept."""
    folder = tmp_path_factory.mktemp("verbs") / "run"
    settings = [
        f"model.path={tiny_base}/base/model", f"data.train={tiny_base}/tiny/train.jsonl", "threads=1", "steps=3",
        f"data.heldout={tiny_base}/tiny/heldout.jsonl", "grpo.questions=2", "grpo.group_size=4", "grpo.minibatches=1",
        "optimizer.warmup_steps=0", "optimizer.lr=1e-2", "rollout.max_tokens=16", "evaluation.samples=1",
        "evaluation.every=1", "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.best=eval/length_mean",
        "log.tensorboard=false", "rewards.workers=1", f"run_dir={folder}",
    ]  # fmt: skip
    done = forked(1, DRIVER, 0, 0, "train", ROOT / "configs" / "tiny_r1_zero.yaml", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def command(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


def refusal(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 2, done.output
    return done.output


def test_the_best_checkpoint_is_kept_beside_the_newest(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["eval/length_mean"] for row in rows if "eval/length_mean" in row and row["step"]}
    best = max(scores, key=lambda step: (scores[step], step))
    kept = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert kept == sorted({"step_00000003", f"step_{best:08d}"})
    assert (run / "checkpoints" / "best").read_text().strip() == f"step_{best:08d}"


def test_the_newest_checkpoint_is_the_exported_model(run, tmp_path):
    done = forked(1, DRIVER, 0, 0, "export", run, tmp_path / "out")
    assert done.returncode == 0 and "the model after 3 optimizer steps" in done.stdout, done.stderr[-3000:]
    made, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run / "model"))
    assert made.keys() == wanted.keys() and all(made[name].equal(wanted[name]) for name in wanted)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "after 3 optimizer steps" in card
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0


def test_the_best_checkpoint_is_exported_in_another_precision(run, tmp_path):
    name = (run / "checkpoints" / "best").read_text().strip()
    for target, words in (("a", [run, "--best"]), ("b", [run / "checkpoints" / name])):
        done = forked(1, DRIVER, 0, 0, "export", *words, tmp_path / target, "--precision", "bfloat16")
        assert done.returncode == 0, done.stderr[-3000:]
    a, b = (load_file(tmp_path / target / "model.safetensors") for target in "ab")
    assert {str(tensor.dtype) for tensor in a.values()} == {"torch.bfloat16"}
    assert all(a[key].equal(b[key]) for key in b)


def test_what_cannot_be_exported_is_named(run, tmp_path):
    assert "found no config.yaml in" in refusal("export", tmp_path, tmp_path / "out")
    (tmp_path / "config.yaml").write_text("")
    assert "found no checkpoint in" in refusal("export", tmp_path, tmp_path / "out")
    assert "found no best checkpoint in" in refusal("export", tmp_path, tmp_path / "out", "--best")
    assert "--precision: found fp4" in refusal("export", run, tmp_path / "out", "--precision", "fp4")


def test_samples_of_a_file_are_graded_by_reward(run, tiny_base, tmp_path):
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join((tiny_base / "tiny" / "heldout.jsonl").read_text().splitlines(True)[:2]))
    out = tmp_path / "out.jsonl"
    told = command("generate", run, questions, "--out", out, "--draw", "samples=2,max_tokens=12,seed=3")
    assert "4 samples" in told
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["0/0", "0/1", "1/0", "1/1"]
    assert all(row["prompt"].endswith("Assistant: <think>") or "User: " in row["prompt"] for row in rows)
    assert all(0 < row["num_tokens"] <= 12 for row in rows)
    again = tmp_path / "again.jsonl"
    command("generate", run / "model", questions, "--out", again, "--draw", "samples=2,max_tokens=12,seed=3")
    assert again.read_text() == out.read_text()
    command("reward", out, "--out", tmp_path / "verdicts.jsonl", "workers=1", "deadline_seconds=60")
    verdicts = [json.loads(line)["verdict"] for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert len(verdicts) == 4 and set(verdicts) <= {"right", "wrong"}


def test_what_is_said_piece_by_piece_is_what_is_drawn_at_once(run):
    speaker = Speaker(run, Wanted(max_tokens=24, seed=1))
    prompt = speaker.prompt([{"role": "user", "content": "12+34"}], 0, "here")
    pieces = list(speaker.tell(prompt))
    (whole,) = speaker.draw([prompt])
    assert "".join(pieces) == whole.text and len(whole.tokens) <= 24


def test_a_conversation_goes_on_until_the_input_ends(run):
    speaker, said = Speaker(run, Wanted(max_tokens=8)), iter(["12+34", "", "<think>"])

    def ask() -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115  # what is recorded counts
    converse(speaker, console, ask)
    assert "(a new conversation)" in console.export_text()


@pytest.mark.parametrize(
    ("said", "start", "prompt", "parts"),
    [
        ("<think>ab</think>cd", 0, "", [("<think>ab</think>", True), ("cd", False)]),
        ("ab</think>cd", 0, "<think>\n", [("ab</think>", True), ("cd", False)]),
        ("x<think>ab", 0, "", [("x", False), ("<think>ab", True)]),
        ("<think>ab</think>cd", 9, "", [("</think>", True), ("cd", False)]),
        ("<think>ab</think>cd", 18, "", [("d", False)]),
        ("plain", 0, "", [("plain", False)]),
    ],
)
def test_thoughts_are_told_from_the_rest(said, start, prompt, parts):
    assert list(_parts(said, start, prompt)) == parts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("chatt", None, ""), "--template: found chatt, required one of chat, r1, plain"),
        (("none", "Be kind.", ""), "--system: found one, required the template chat, r1 or plain, found none"),
        ((None, None, "tokens=5"), "--draw: found 'tokens', required some of samples, max_tokens"),
        ((None, None, "samples=x"), "--draw: found 'samples=x', required a number"),
        ((None, None, "temperature=0"), "temperature is 0.0, required is above 0"),
        ((None, None, "samples=0"), "found samples 0, max_tokens 1024, required 1 or more"),
    ],
)
def test_options_are_refused_by_name(words, message):
    with pytest.raises(ValueError, match=message):
        wanted_of(*words)


def test_a_file_without_the_column_names_those_there_are(run, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"text": "12+34"}\n')
    told = refusal("generate", run, tmp_path / "q.jsonl", "--out", tmp_path / "o.jsonl")
    assert "q.jsonl:1: question is None, required a text; choose another by --column" in " ".join(told.split())
    assert "found one of PROMPTS and --out" in refusal("generate", run, tmp_path / "q.jsonl")


def test_data_is_shown_as_the_run_will_see_it(tiny_base, tmp_path):
    lines = (tiny_base / "tiny" / "train.jsonl").read_text().splitlines()[:3]
    bad = json.dumps({"question": "1+1", "answer": "9^{9^{9}}"})
    (tmp_path / "q.jsonl").write_text("\n".join([*lines, lines[0], bad]))
    settings = [f"model.path={tiny_base}/base/model", f"data.train={tmp_path}/q.jsonl", "rewards.workers=1"]
    settings += ["data.max_prompt_tokens=400", "max_row_tokens=null"]
    told = command("data", ROOT / "configs" / "tiny_r1_zero.yaml", *settings, "--rows", "1")
    assert f"q.jsonl:1, {len(told)}"[:9] in told and json.loads(lines[0])["question"] in told
    flat = " ".join(told.split())
    for name, value in (("questions", "5"), ("distinct ones", "4"), ("rule can use", "1 of 4 (25.0%)")):
        assert f"{name} \u2502 {value}" in flat or f"{name} | {value}" in flat, told
    assert "5 rows hold 4 distinct questions" in flat and "q.jsonl:5: '9^{9^{9}}'" in flat
