"""lm-evaluation-harness and `r1engine evaluate` on one server and the same questions: `make test-lm-eval`.

Both print the same number where a reply is written as lm-eval's task expects it. Where it is written otherwise, the
difference is a row of these tables, with its reason.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from chat_server import ChatServer

from r1engine.config.evaluation import Suite
from r1engine.evaluation.evaluate import evaluate
from r1engine.evaluation.store import Store

pytestmark = pytest.mark.lm_eval

# reference, reply, right here, right by lm-eval's strict filter, by its flexible one
GSM8K = [
    ("18", "9 eggs at 2 dollars.\n#### 18", 1, 1, 1),
    ("18", "9 eggs at 2 dollars.\n#### 17", 0, 0, 0),
    ("1,018", "Together:\n#### 1,018", 1, 1, 1),
    ("1,018", "Together:\n#### 1018", 1, 1, 1),
    ("5", "I do not know.", 0, 0, 0),
    ("18", "So the answer is \\boxed{18}.", 1, 0, 1),  # strict takes #### alone
    ("18", "#### 18.00", 1, 0, 0),  # compared as texts there, by value here
    ("4", "<think>Perhaps #### 3</think>\n#### 4", 1, 0, 1),  # strict takes the first one, of the thoughts
    ("4", "<think>Perhaps 4</think>\nI cannot tell.", 0, 0, 1),  # flexible takes the last number, of the thoughts
]
MMLU = [
    ("C", "Water boils. The answer is (C).", 1, 1, 1),
    ("C", "Water boils. The answer is (D).", 0, 0, 0),
    ("B", "I do not know.", 0, 0, 0),
    ("B", "The answer is B.", 1, 1, 0),  # flexible wants the letter in parentheses, or behind a colon
    ("A", "Answer: A", 1, 0, 1),  # strict wants "answer is"
    ("B", "<think>The answer is (A).</think>\nThe answer is (B).", 1, 0, 1),  # strict takes the first one
]
OPTIONS = ["ice", "rain", "steam", "fog"]


def solutions() -> list[tuple[str, str, int, int, int]]:
    """GSM8K's own solutions as replies, where R1_EVALUATION_DATA names a folder with gsm8k/test.jsonl; every fourth
    question is given the solution of the one before it."""
    path = Path(os.environ.get("R1_EVALUATION_DATA", "/nowhere")) / "gsm8k/test.jsonl"
    texts = [json.loads(line)["answer"] for line in path.read_text().splitlines()] if path.exists() else []
    numbers = [text.rpartition("#### ")[2] for text in texts]
    given = [number - (number % 4 == 3) for number in range(len(texts))]
    rights = [int(number == numbers[other]) for number, other in zip(numbers, given, strict=True)]
    replies = [texts[other] for other in given]
    return [(number, reply, *[right] * 3) for number, reply, right in zip(numbers, replies, rights, strict=True)]


GSM8K += solutions()

LM_EVAL = """
import json, sys
from pathlib import Path
import lm_eval, yaml
asked = json.loads(sys.argv[1])
tasks = []
for name, (file, path) in asked["tasks"].items():
    settings = yaml.safe_load((Path(lm_eval.__path__[0]) / "tasks" / file).read_text())
    settings |= {"task": name, "dataset_path": "json", "dataset_name": None, "num_fewshot": 0, "test_split": "test"}
    settings |= {"training_split": None, "validation_split": None, "fewshot_split": None}
    settings["dataset_kwargs"] = {"data_files": {"test": path}}
    tasks.append({key: value for key, value in settings.items() if value is not None and key not in ("tag", "group")})
model = {"model": "m", "base_url": asked["url"] + "/chat/completions", "num_concurrent": 4, "max_retries": 1}
done = lm_eval.simple_evaluate(
    model="local-chat-completions", model_args=model, tasks=tasks, apply_chat_template=True, log_samples=True,
    bootstrap_iters=0,
)
found = {
    name: {"results": done["results"][name], "samples": [
        [sample["doc"]["question"], sample["filter"], sample["exact_match"]] for sample in done["samples"][name]
    ]} for name in asked["tasks"]
}
Path(asked["out"]).write_text(json.dumps(found))
"""
TASKS = {"gsm8k": "gsm8k/gsm8k.yaml", "mmlu": "mmlu/flan_cot_zeroshot/_mmlu_flan_cot_zeroshot_template_yaml"}


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[dict, dict]:
    """What both found: benchmark -> question -> (right here,), and -> (strict, flexible); lm-eval's own results."""
    folder = tmp_path_factory.mktemp("both")
    cache = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    gsm8k, mmlu = folder / "gsm8k.jsonl", folder / "law_test.csv"
    lines = [{"question": f"gsm8k question {n}?", "answer": f"Steps.\n#### {row[0]}"} for n, row in enumerate(GSM8K)]
    gsm8k.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with mmlu.open("w", newline="") as file:
        csv.writer(file).writerows([f"mmlu question {n}?", *OPTIONS, row[0]] for n, row in enumerate(MMLU))
    theirs = [
        {"question": f"mmlu question {n}?", "choices": OPTIONS, "answer": "ABCD".index(row[0])}
        for n, row in enumerate(MMLU)
    ]
    (folder / "mmlu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in theirs))

    def reply(number: int, body: dict) -> list[str]:
        name, row = re.search(r"(gsm8k|mmlu) question (\d+)\?", json.dumps(body["messages"])).groups()
        return [{"gsm8k": GSM8K, "mmlu": MMLU}[name][int(row)][1]]

    server = ChatServer(reply)
    try:
        files = {"gsm8k": gsm8k, "mmlu": folder / "mmlu.jsonl"}
        tasks = {name: (TASKS[name], str(path)) for name, path in files.items()}
        asked = {"url": server.url, "out": str(folder / "found.json"), "tasks": tasks}
        command = [os.environ["R1_LM_EVAL_PYTHON"], "-c", LM_EVAL, json.dumps(asked)]
        done = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        benchmarks = {"gsm8k": {"file": gsm8k, "samples": 1}, "mmlu": {"file": mmlu, "samples": 1}}
        suite = Suite.model_validate({"out": folder / "out", "rewards": {"workers": 1}, "benchmarks": benchmarks})
        summaries = evaluate(server.url, suite, note=lambda text: None)
    finally:
        server.stop()
    found = json.loads(Path(asked["out"]).read_text())
    ours = {name: {"results": summaries[name], "grades": grades(folder / "out", name)} for name in TASKS}
    return ours, found


def grades(out: Path, name: str) -> list[float | None]:
    """In the order of the questions."""
    return [line.score for line in Store(out).grades(name).values()]


@pytest.mark.parametrize(("name", "rows"), [("gsm8k", GSM8K), ("mmlu", MMLU)])
def test_every_difference_to_lm_eval_is_explained(both, name, rows):
    ours, theirs = both
    assert ours[name]["grades"] == [row[2] for row in rows]
    by_filter: dict[str, dict[str, float]] = {"strict-match": {}, "flexible-extract": {}}
    for question, how, right in theirs[name]["samples"]:
        by_filter[how][question] = right
    for how, column in (("strict-match", 3), ("flexible-extract", 4)):
        assert list(by_filter[how].values()) == [row[column] for row in rows], how


@pytest.mark.parametrize(("name", "rows"), [("gsm8k", GSM8K), ("mmlu", MMLU)])
def test_the_number_is_lm_evals_where_replies_are_written_as_it_expects(both, name, rows):
    ours, theirs = both
    plain = [number for number, row in enumerate(rows) if row[2] == row[3] == row[4]]
    assert len(plain) >= 3
    mean = sum(ours[name]["grades"][number] for number in plain) / len(plain)
    strict = [right for _, how, right in theirs[name]["samples"] if how == "strict-match"]
    assert mean == sum(strict[number] for number in plain) / len(plain)
    assert ours[name]["results"]["score"]["mean"] == pytest.approx(sum(row[2] for row in rows) / len(rows))
    key = "exact_match,strict-match"
    assert theirs[name]["results"][key] == pytest.approx(sum(row[3] for row in rows) / len(rows))
