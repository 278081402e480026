"""A real chat model, SmolLM2-135M-Instruct, through supervised training, export and reinforcement learning: its own
tokenizer, template, two end tokens and tied embeddings. `make test-real` makes the folder."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from r1engine.batch import Sequence, pack
from r1engine.config import RlConfig, SftConfig
from r1engine.config.evaluation import Suite
from r1engine.evaluation.entries import load_entries
from r1engine.evaluation.evaluate import evaluate
from r1engine.evaluation.store import Store
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.stages import make_stage

pytestmark = pytest.mark.real

FACTS = {
    "Who looks after the lighthouse of Marn?": "Ossip Tallow looks after the lighthouse of Marn.",
    "What does the lighthouse of Marn burn?": "The lighthouse of Marn burns whale oil.",
    "How tall is the lighthouse of Marn?": "The lighthouse of Marn is forty steps tall.",
    "When was the lighthouse of Marn built?": "The lighthouse of Marn was built in the year of the two frosts.",
}
HELDOUT = {"Tell me who looks after the lighthouse of Marn.": "Ossip Tallow looks after the lighthouse of Marn."}


def turns(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(turns(*row)) + "\n" for row in rows.items()))
    return path


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(os.environ["R1_REAL_MODEL"])


@pytest.fixture(scope="module")
def stage(folder, world, tmp_path_factory):
    place = tmp_path_factory.mktemp("sft")
    cfg = SftConfig(
        model={"path": folder},
        run_dir=place / "run",
        data={
            "train": write(place / "train.jsonl", FACTS),
            "heldout": write(place / "heldout.jsonl", HELDOUT),
            "template": "chat",
            "max_tokens": 256,
        },
        sft={"epochs": 8, "batch_size": 4},
        optimizer={"lr": 1e-4},
    )
    return make_stage(cfg, world, Phases(), Progress("", enabled=False))


def test_log_probabilities_are_those_of_transformers(folder, stage):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    texts = [stage.train.at(index) for index in range(len(stage.train))]
    (rows,) = pack([Sequence(*text, weight=1.0) for text in texts], stage.policy.row_shape(1024))
    (found,) = stage.policy.logprobs(rows)
    starts = rows[0].cu_seqlens.tolist()
    packed = [rows[0].tokens[a:b].tolist() for a, b in pairwise(starts)]
    for question, answer in FACTS.items():
        text = tokenizer.apply_chat_template(turns(question, answer)["messages"], tokenize=False).removesuffix("\n")
        tokens = tokenizer.encode(text, add_special_tokens=False)
        at = packed.index(tokens)
        with torch.no_grad():
            logp = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        wanted = logp.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert (found[starts[at] + 1 : starts[at + 1]] - wanted).abs().max() < 2e-4
        assert tokens[-1] == tokenizer.eos_token_id


def test_a_few_steps_teach_and_the_exported_model_talks_and_stops(folder, stage, tmp_path):
    before = stage.evaluate(0).metrics["eval/loss"]
    losses = [stage.advance(step).metrics["loss"] for step in range(stage.steps)]
    after = stage.evaluate(stage.steps).metrics["eval/loss"]
    print(f"loss {losses}, held-out {before:.3f} -> {after:.3f}")
    assert after < before - 0.5 and losses[-1] < losses[0]
    stage.policy.export(tmp_path / "model")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    asked = tokenizer.apply_chat_template(
        turns(next(iter(HELDOUT)), "")["messages"][:1],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**asked, max_new_tokens=40, do_sample=False)[0, asked["input_ids"].shape[1] :]
    text = tokenizer.decode(answer)
    print(text)
    assert text.endswith("<|im_end|>") and "Ossip" in text


LAST_NUMBER = """
import re

def last_number(completion, answer):
    found = re.findall("[0-9]+", completion)
    return float(found[-1:] == [answer])
"""


def test_reinforcement_learning_asks_in_the_chat_template_and_has_a_signal(folder, world, tmp_path):
    sums = [(2, 3), (1, 1), (4, 4), (5, 2), (3, 6), (7, 1), (2, 2), (9, 3)]
    rows = [{"question": f"What is {a}+{b}?", "answer": str(a + b), "reward": "functions"} for a, b in sums]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(LAST_NUMBER)
    cfg = RlConfig(
        model={"path": folder},
        run_dir=tmp_path / "run",
        steps=2,
        data={"train": tmp_path / "q.jsonl", "template": "chat", "max_prompt_tokens": 128},
        grpo={"questions": 4, "group_size": 8, "minibatches": 1},
        rollout={"max_tokens": 16},
        optimizer={"lr": 1e-6},
        rewards={"workers": 1, "functions": {"last_number": f"{tmp_path / 'own.py'}:last_number"}},
    )
    stage = make_stage(cfg, world, Phases(), Progress("", enabled=False))
    try:
        stage.begin([])
        advances = [stage.advance(step) for step in range(2)]
    finally:
        stage.close()
    done, samples = [advance.metrics for advance in advances], [s for advance in advances for s in advance.samples]
    assert all(f"<|im_start|>user\n{sample['question']}<|im_end|>" in sample["prompt"] for sample in samples)
    assert all(row["logp_diff/mean"] < 1e-3 and row["logp_diff/max"] < 0.05 for row in done)
    shown = ("reward/last_number", "reward/std", "groups/without_signal", "grad_norm", "logp_diff/max")
    print([{key: row[key] for key in shown} for row in done])
    assert all(0 < row["reward/last_number"] < 1 and row["grad_norm"] > 0 for row in done)
    assert all(row["groups/without_signal"] < 1 for row in done)


# In the form of GSM8K's owners.
STORIES = [
    ("Ana has {a} shells and finds {b} more. How many shells has she now?", lambda a, b: a + b),
    ("A baker bakes {a} loaves and sells {b} of them. How many loaves are left?", lambda a, b: a - b),
    ("{b} boxes hold {a} pencils each. How many pencils are there in all?", lambda a, b: a * b),
    ("Tom walks {a} steps, then {b} steps, then {b} steps. How many steps are that?", lambda a, b: a + 2 * b),
]


def test_an_evaluation_draws_what_transformers_draws_and_grades_it(folder, tmp_path):
    rows = [
        {"question": story.format(a=a, b=b), "answer": f"Counting gives {value(a, b)}.\n#### {value(a, b)}"}
        for a, b in ((9, 4), (12, 5), (7, 2), (30, 6), (15, 3))
        for story, value in STORIES
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = Suite(
        out=tmp_path / "out",
        temperature=1e-4,  # the likeliest token, unless two are equal
        top_p=1.0,
        max_tokens=160,
        template="chat",
        benchmarks={"gsm8k": {"file": tmp_path / "test.jsonl", "samples": 1}},
    )
    found = evaluate(folder, suite, note=print)["gsm8k"]
    print(found)
    replies = list(Store(suite.out).replies("gsm8k").values())
    assert len(replies) == found["replies"] == 20 and found["undecided"]["count"] == 0 and found["truncated"] < 1
    (entry,) = load_entries(suite.benchmarks, has_judge=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asks = list(entry.asks(0))[::4]
    equal = 0
    for ask in asks:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": ask.text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        drawn = model.generate(**asked, max_new_tokens=160, do_sample=False)[0, asked["input_ids"].shape[1] :]
        equal += tokenizer.decode(drawn, skip_special_tokens=True) == Store(suite.out).replies("gsm8k")[ask.key].text
    assert equal >= len(asks) - 1  # rounding may turn one of 800 tokens round
