"""Records of the rewards that run code, from a file or a trainer to their scores."""

import json
from dataclasses import replace

import psutil
import pytest
from reward_records import record
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.data.questions import read_questions
from r1engine.rewards import Scorer, ScorerSettings
from r1engine.rewards.offline import read_records
from r1engine.rewards.sandbox import probe
from r1engine.rewards.sandbox.protection import compiler

SQUARE = [{"stdin": "3", "stdout": "9"}, {"stdin": "4", "stdout": "16"}]
HUMAN_EVAL = {
    "prompt": "def one():\n    '''Returns 1.'''\n",
    "entry_point": "one",
    "test": "def check(candidate):\n    assert candidate() == 1",
}


@pytest.fixture(scope="module")
def scorer():
    with Scorer(ScorerSettings(workers=1, code_deadline_seconds=60)) as made:
        yield made


def answer(program: str) -> str:
    return f"<think>So.</think><answer>\n```python\n{program}\n```\n</answer>"


def score_lines(scorer, tmp_path, *rows):
    file = tmp_path / "completions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return scorer.score(read_records(file))


def test_code_record_is_run_and_its_format_kept(scorer):
    right, wrong, none = scorer.score(
        [
            record("code", answer("print(int(input()) ** 2)"), tests=SQUARE),
            record("code", answer("print(9)"), tests=SQUARE),
            record("code", "print(9)", tests=SQUARE),
        ]
    )
    assert (right.verdict, right.components, right.reason) == ("right", {"format": 1, "accuracy": 1}, "passed 2 tests")
    assert (wrong.verdict, wrong.components) == ("wrong", {"format": 1, "accuracy": 0})
    assert wrong.reason == "test 2 of 2: line 1: found '9', required '16'"
    assert none.verdict == "wrong" and none.reason.startswith("no python code block; format:")


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_cpp_record_is_compiled_run_and_compared(scorer):
    program = "#include <iostream>\nint main() {{ long n; std::cin >> n; std::cout << n * {} << '\\n'; }}"
    tests = {"language": "cpp", "tests": SQUARE}
    texts = [answer(program.format(factor)).replace("```python", "```cpp") for factor in ("n", "3")]
    texts.append(answer("int main() { return x; }").replace("```python", "```cpp"))
    scores = scorer.score([record("code", text, tests=tests) for text in texts])
    assert [score.verdict for score in scores] == ["right", "wrong", "wrong"]
    assert scores[1].reason == "test 2 of 2: line 1: found '12', required '16'"
    assert "it does not compile" in scores[2].reason


def test_lines_of_known_data_sets_need_no_tests_field(scorer, tmp_path):
    lcb = json.dumps([{"input": "2", "output": "4", "testtype": "stdin"}])
    scores = score_lines(
        scorer,
        tmp_path,
        {"reward": "code", "completion": "    return 1\n", **HUMAN_EVAL},
        {"reward": "code", "completion": "    return 2\n", **HUMAN_EVAL},
        {"reward": "code", "completion": answer("print(int(input()) * 2)"), "public_test_cases": lcb},
        {"reward": "code", "completion": answer("1"), "input_output": json.dumps({"inputs": [""], "outputs": [""]})},
    )
    assert [score.verdict for score in scores] == ["right", "wrong", "right", "right"]


def test_tests_that_cannot_be_read_are_undecided_and_say_why(scorer):
    scores = scorer.score([record("code", answer("1"), tests=tests) for tests in ([], {"inputs": 1})])
    assert [score.verdict for score in scores] == ["undecided"] * 2
    assert "it has no tests" in scores[0].reason and "found the fields ['inputs'], required tests" in scores[1].reason
    assert "accuracy" not in scores[0].components


def test_file_and_data_set_without_tests_are_refused_with_the_line(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"reward": "code", "completion": "1", "question": "q"}')
    message = r"x.jsonl:1: found tests None, required by reward 'code' an object or a list"
    with pytest.raises(ValueError, match=message):
        read_records(file)
    with pytest.raises(ValueError, match=message):
        read_questions(file)


def test_question_of_a_data_set_may_carry_a_known_record(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"question": "Write one().", "reward": "code", **HUMAN_EVAL}))
    assert read_questions(file)[0].tests == HUMAN_EVAL


def test_code_is_refused_where_nothing_protects_and_the_rest_is_scored(scorer, monkeypatch):
    bare = replace(probe(), bwrap=None, bwrap_problem="bubblewrap is not installed", landlock=0)
    monkeypatch.setattr("r1engine.rewards.scorer.probe", lambda: bare)  # a machine without protection
    with pytest.raises(RuntimeError, match=r"neither namespaces .* nor Landlock; required to run untrusted code"):
        scorer.submit(record("code", answer("1"), tests=SQUARE))
    assert scorer.score([record("exact", "<answer>a</answer>", "a")])[0].verdict == "right"


def test_bytes_that_are_no_utf8_and_ten_megabytes_are_scored(scorer, tmp_path):
    file = tmp_path / "completions.jsonl"
    line = json.dumps({"reward": "code", "completion": answer("print('@')"), "tests": [{"stdout": "x"}]})
    file.write_bytes(line.encode().replace(b"@", b"\xff\xfe"))
    long = answer("print(1)").replace("So.", "x" * 10_000_000)
    scores = scorer.score([*read_records(file), record("code", long, tests=[{"stdout": "1"}])])
    assert [score.verdict for score in scores] == ["wrong", "right"]
    assert "SyntaxError" in scores[0].reason


def test_workers_and_sandboxes_end_with_the_scorer():
    me = psutil.Process()
    before = set(me.children(recursive=True))
    with Scorer(ScorerSettings(workers=2)) as scorer:
        scorer.score([record("code", answer("print(9)"), tests=SQUARE[:1]) for _ in range(4)])
        started = set(me.children(recursive=True)) - before
        assert "bwrap" in {process.name() for process in started}
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []


def test_gym_record_is_scored_in_the_sandbox(scorer):
    pytest.importorskip("reasoning_gym", reason="extra `gym` is not installed")
    from r1engine.rewards.gym import gym_records

    row = next(gym_records("spiral_matrix", seed=1, size=1))
    texts = [f"<think>a</think><answer>{text}</answer>" for text in (row["answer"], "__import__('os')._exit(0)")]
    scores = scorer.score([record("gym", text, row["answer"], tests=row["tests"]) for text in texts])
    assert [score.verdict for score in scores] == ["right", "wrong"]


def test_command_tells_what_protects_and_refuses_without(tmp_path, monkeypatch):
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text(json.dumps({"reward": "code", "completion": answer("print(9)"), "tests": SQUARE[:1]}))
    done = CliRunner().invoke(app, ["reward", str(file), "--out", str(out), "workers=1"])
    assert done.exit_code == 0 and "code runs in a sandbox of:" in done.output and "seccomp: yes" in done.output
    assert json.loads(out.read_text())["verdict"] == "right"
    bare = replace(probe(), has_seccomp=False)
    monkeypatch.setattr("r1engine.rewards.scorer.probe", lambda: bare)  # a machine without protection
    done = CliRunner().invoke(app, ["reward", str(file), "--out", str(out)])
    assert done.exit_code != 0 and "the kernel offers no seccomp filters; required" in done.output


def test_unusable_tests_are_listed_at_load(scorer):
    records = [record("code", "", tests=SQUARE), record("code", "", tests=[{"stdin": "1"}])]
    ((found, problem),) = scorer.unusable_references(records)
    assert found is records[1] and "found no stdout" in problem
