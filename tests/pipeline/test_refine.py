"""Refining: what the model is asked, what of its replies counts, and a kill in the middle."""

import json
import os
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from chat_folders import KINDS, save_tokenizer
from model_server import says
from rich.console import Console
from samples import THOUGHTS, sample, write_samples

from r1engine.config import CurateConfig
from r1engine.pipeline.curate import curate
from r1engine.pipeline.refine import asked
from r1engine.pipeline.replies import Replies, prompt_text

PINYIN = "\u6211\u5148\u628a\u4e2a\u4f4d\u76f8\u52a0\uff0c\u518d\u628a\u5341\u4f4d\u76f8\u52a0"
START = "import sys; from r1engine.cli import app; app(['curate', *sys.argv[1:]])"


def total(row):
    return row["answer"]


class Rewriter:
    """Translates and summarizes as a good model would; `spoiled` question numbers get another sum."""

    def __init__(self, spoiled=()):
        self.spoiled, self.asked, self.at = spoiled, [], {}

    def __call__(self, path, body):
        text = body["messages"][0]["content"]
        self.asked.append(text)
        assert path == "/v1/chat/completions" and body["model"] == "v3" and body["max_tokens"] == 8192
        if hook := self.at.get(len(self.asked)):
            hook()
        number = int(text.partition("question number ")[2].partition("?")[0])
        if "Translate the thinking process" in text:
            return says(f"<think>Let me see.</think>{THOUGHTS} It is translated.")
        answer = number % 100 + 7 * number % 100 + (number in self.spoiled)
        return says(f"Adding both numbers gives \\(\\boxed{{{answer}}}\\).")


def mixed(number):
    return sample(number, completion=f"<think>{THOUGHTS} {PINYIN}.</think> <answer>{sample(number)['answer']}</answer>")


def config(tmp_path, server, rows, name="data", **refine):
    folder = tmp_path / "zero" / "samples"
    if not folder.is_dir():
        write_samples(folder.parent, rows)
        save_tokenizer(tmp_path / "model", KINDS["chatml"])
    server = {"urls": [f"{server.url}/v1"], "model": "v3", "parallel": 2, "tries": 1}
    return CurateConfig(
        sources=[folder],
        run_dir=tmp_path / name,
        model={"path": tmp_path / "model", "template": "chat"},
        refine={"server": server, "rewards": {"workers": 1}} | refine,
        language_min=1.0,
    )


def outcome(cfg):
    curate(cfg, Console(quiet=True))
    dropped = pq.read_table(cfg.run_dir / "dropped.parquet").to_pylist()
    return pq.read_table(cfg.run_dir / "data.parquet").to_pylist(), {row["id"]: row for row in dropped}


def test_thoughts_are_translated_and_summarized_and_graded_again(tmp_path, serve):
    rewriter = Rewriter(spoiled=[3])
    rows = [mixed(1), sample(2), mixed(3), mixed(4) | {"verdict": "wrong"}, sample(5, completion="9")]
    data, dropped = outcome(config(tmp_path, serve(rewriter), rows))
    found = {row["source"]: row for row in data}
    assert found.keys() == {"zero:1/0", "zero:2/0"}
    first = found["zero:1/0"]
    assert first["messages"][1]["content"] == (
        f"<think>{THOUGHTS} It is translated.</think>\nAdding both numbers gives \\(\\boxed{{8}}\\)."
    )
    assert first["edited_by"] == ["translate_thoughts", "summary"]
    assert found["zero:2/0"]["edited_by"] == ["summary"]  # its thoughts are in one language
    assert {name: row["reason"] for name, row in dropped.items()} == {
        "zero:3/0": "refining broke it", "zero:4/0": "wrong", "zero:5/0": "structure",
    }  # fmt: skip
    assert dropped["zero:3/0"]["detail"].startswith("wrong afterwards: ")
    assert len(rewriter.asked) == 5  # what is dropped anyhow is not asked about
    translated = [text for text in rewriter.asked if "Based on the above" in text and "It is translated." in text]
    listing = next(text for text in translated if "number 1?" in text)  # threads ask in any order
    assert listing.startswith("## Question\nWhat is the sum of 1 and 7") and "\n## Thought process\n" in listing
    outcome(config(tmp_path, serve(rewriter), rows, "other"))
    assert len(rewriter.asked) == 10
    outcome(config(tmp_path, serve(rewriter), rows))
    assert len(rewriter.asked) == 10  # every reply is on the disk, and servers may have moved


def test_replies_that_cannot_be_used_leave_the_row_out(tmp_path, serve):
    def reply(path, body):
        number = int(body["messages"][0]["content"].partition("question number ")[2].partition("?")[0])
        choices = {1: {"message": {"content": " \n"}}, 2: {"message": {"content": "x"}, "finish_reason": "length"}}
        if number == 4:
            return 400, b"no"
        return 200, json.dumps(
            {"choices": [choices.get(number, {"message": {"content": "It is \\boxed{24}."}})]}
        ).encode()

    rows = [sample(number) for number in (1, 2, 3, 4)]
    data, dropped = outcome(config(tmp_path, serve(reply), rows, prompts=["summary"]))
    assert [row["source"] for row in data] == ["zero:3/0"]
    details = {name: row["detail"] for name, row in dropped.items()}
    assert details["zero:1/0"] == "summary: the reply is blank"
    assert details["zero:2/0"] == "summary: the reply is cut off at 8192 tokens"
    assert details["zero:4/0"].startswith("no reply: http://") and "HTTP 400 no" in details["zero:4/0"]


def test_a_kill_in_the_middle_costs_only_what_was_not_answered(tmp_path, serve):
    rows = [mixed(number) for number in range(10)]
    expected, _ = outcome(config(tmp_path, serve(Rewriter()), rows, "whole"))
    assert len(expected) == 10
    rewriter = Rewriter()
    server = serve(rewriter)
    cfg = config(tmp_path, server, rows, "killed")
    (tmp_path / "c.yaml").write_text(
        f"stage: curate\nrun_dir: {cfg.run_dir}\nsources: [{cfg.sources[0]}]\nlanguage_min: 1.0\n"
        f"model: {{path: {tmp_path / 'model'}, template: chat}}\n"
        "refine:\n  rewards: {workers: 1}\n"
        f"  server: {{urls: ['{server.url}/v1'], model: v3, parallel: 1, tries: 1}}\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", START, str(tmp_path / "c.yaml")], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    rewriter.at[8] = lambda: os.kill(run.pid, signal.SIGKILL)
    assert run.wait(120) == -signal.SIGKILL
    cache = cfg.run_dir / "refined.jsonl"
    assert len(cache.read_text().splitlines()) == 7
    with cache.open("a") as file:
        file.write('{"key": "half a li')
    rewriter.at.clear()
    found, _ = outcome(cfg)
    assert found == expected
    assert len(rewriter.asked) == 8 + 20 - 7
    assert sorted(path.name for path in cfg.run_dir.iterdir()) == [
        "counts.json", "data.parquet", "dropped.parquet", "refined.jsonl", "report.html",
    ]  # fmt: skip


def test_servers_that_are_gone_end_the_stage_and_nothing_is_half(tmp_path, serve):
    cfg = config(tmp_path, serve(lambda path, body: None), [sample(number) for number in range(12)])
    with pytest.raises(
        RuntimeError, match=r"refine: 8 rows without a reply, the last: http://.*; start it again later"
    ):
        curate(cfg, Console(quiet=True))
    assert [path.name for path in cfg.run_dir.iterdir()] == ["refined.jsonl"]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "refined.jsonl"
    replies = Replies(path)
    replies.add("a", "one", {})
    replies.add("b", "two\n", {})
    replies.close()
    again = Replies(path)
    assert (again.get("a"), again.get("b"), again.get("c"), len(again)) == ("one", "two\n", None, 2)
    again.close()
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(ValueError, match=r"refined\.jsonl:1: no reply stands there"):
        Replies(path)


def test_prompts_take_texts_as_they_are(tmp_path):
    from r1engine.data.examples import Example

    question = "What is {thought_process} {examples}?"
    row = Example("a:1", [{"role": "user", "content": question}], "math", "en", "given", 3)
    text = asked("conversational", row, " I {question} it. ", "EXAMPLES\n\n")
    assert text.startswith(f"EXAMPLES\n\n## Question\n{question}\n## Thought process\nI {{question}} it.\n")
    assert "- Use \\boxed{} for final answer(s)." in asked("summary", row, "x", "")
    for name in ("summary", "translate_thoughts", "conversational"):
        assert {"{question}", "{thought_process}"} <= set(prompt_text(name).split())
