"""The stage `search`: what it writes, that it goes on after a kill, and what it refuses."""

import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import ranks
import torch
from model_server import ModelServer
from safetensors.torch import load_file, save_file

from r1engine.config import ConfigError, SearchConfig, TinyConfig
from r1engine.demo.tiny import write_world
from r1engine.observe.failure import RunFailed
from r1engine.pipeline.kinds import dry_run
from r1engine.pipeline.manifest import digest
from r1engine.ranks import World
from r1engine.sampling import searching
from r1engine.sampling.search_page import most_telling
from r1engine.sampling.search_rows import markdown, print_tree, table_of
from r1engine.sampling.searching import drawn_by, search
from r1engine.search.lockstep import Lockstep
from r1engine.search.scored_folder import NAME, ScoredFolder
from r1kernels import cpu_lib

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A random model, four questions, and a scorer of steps that is as random."""
    folder = tmp_path_factory.mktemp("world")
    write_world(TinyConfig(run_dir=folder, hidden_size=32, layers=1, intermediate_size=64, texts=96, heldout=4))
    for name, about in (("scorer", ScoredFolder(tuple("0123456789aeiost"), None, "value").to_text()), ("silent", None)):
        prm = folder / name
        shutil.copytree(folder / "model", prm)
        weights = {k: v for k, v in load_file(prm / "model.safetensors").items() if k != "lm_head.weight"}
        weights["score.weight"] = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
        save_file(weights, prm / "model.safetensors", {"format": "pt"})
        config = json.loads((prm / "config.json").read_text())
        config |= {"architectures": ["Qwen2ForSequenceClassification"], "num_labels": 1, "tie_word_embeddings": False}
        (prm / "config.json").write_text(json.dumps(config))
        if about is not None:
            (prm / NAME).write_text(about)
    return folder


def settings(world: Path, run_dir: Path, **keys) -> SearchConfig:
    values = {
        "model": {"path": world / "model"},
        "questions": world / "heldout.jsonl",
        "template": "r1_zero",
        "rollout": {"max_tokens": 12},
        "rewards": {"workers": 1},
        "steps": {"marks": list("0123456789aeiost")},
        "scorer": {"path": world / "scorer"},
    }
    return SearchConfig.model_validate({"run_dir": run_dir, **values, **keys})


def run(cfg: SearchConfig) -> dict:
    return search(cfg, ALONE, {key: digest(path) for key, path in cfg.inputs().items()})


BOTH = {"compare": ["beam", "mcts"], "search": {"width": 2, "curve": [2], "difficulty": 3}}


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> tuple[SearchConfig, dict]:
    cfg = settings(world, tmp_path_factory.mktemp("finished") / "run", **BOTH)
    return cfg, run(cfg)


def test_what_is_searched_is_written_and_told(finished):
    cfg, told = finished
    rows = [json.loads(line) for line in (cfg.run_dir / "search.jsonl").read_text().splitlines()]
    assert [(row["search"], row["id"]) for row in rows] == [
        (s, q) for s in ("beam_2", "mcts_2", "difficulty") for q in range(4)
    ]
    assert all(row["ended"] == 3 and row["nodes"][0]["value"] == 1.0 for row in rows if row["search"] == "difficulty")
    summary = json.loads((cfg.run_dir / "summary.json").read_text())["searches"]
    assert [*summary] == ["beam_2", "mcts_2"]
    for name, found in summary.items():
        own = [row for row in rows if row["search"] == name]
        tokens = sum(len(step) for row in own for node in row["nodes"] for step in node["tokens"])
        assert told[f"drawn {name}"] == found["drawn"] == sum(row["drawn"] for row in own) / 4 >= tokens / 4
        assert found["accuracy"] == told[f"accuracy {name}"] == sum(row["verdict"] == "right" for row in own) / 4
        assert found["low"] <= found["accuracy"] <= found["high"]
        assert 0 < found["policy_run"] <= found["drawn"] + 60 and found["scorer_run"] > 0
    page = (cfg.run_dir / "report.html").read_text()
    assert "<h2>Trees of one question</h2>" in page and "How it was run" not in page
    assert "Accuracy at counted tokens" in page and "visits" in page and "beam_2: What is" in page
    lines: list[str] = []
    print_tree(cfg.run_dir, 2, lines.append)
    assert len(lines) == 3 and lines[1].startswith("mcts_2: What is")


def test_a_killed_search_goes_on_and_ends_with_the_same_file(finished, tmp_path):
    cfg, _ = finished
    again = cfg.model_copy(update={"run_dir": tmp_path / "run"})
    shutil.copytree(cfg.run_dir, again.run_dir)
    whole = (again.run_dir / "search.jsonl").read_bytes()
    (again.run_dir / "search.jsonl").unlink()
    part = again.run_dir / "parts" / "mcts_2.0.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:2]) + lines[2][:40])  # one question is there, the next was being written
    run(again)
    assert (again.run_dir / "search.jsonl").read_bytes() == whole
    other = again.model_copy(update={"seed": 5})
    with pytest.raises(ConfigError, match="was searched with seed 0, now it is 5; choose another run_dir"):
        run(other)
    other = again.model_copy(update={"search": again.search.model_copy(update={"max_steps": 9})})
    with pytest.raises(ConfigError, match=r"was searched with search\.max_steps 40, now it is 9; choose another"):
        run(other)


def run_until_killed(cfg: SearchConfig, at: int) -> None:
    """A process of its own: SIGKILL behind the round `at` of all searches together."""
    work, rounds = Lockstep._round, itertools.count(1)

    def killed(self, live, on_tokens):
        work(self, live, on_tokens)
        if next(rounds) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    Lockstep._round = killed
    run(cfg)


@pytest.mark.skipif(
    cpu_lib.library_path() is None, reason="_cpu.so is not built: other numbers of rows round otherwise"
)
def test_a_search_that_is_killed_between_two_rounds_goes_on_and_ends_with_the_same_file(world, finished, tmp_path):
    expected = finished[0].run_dir / "search.jsonl"
    cfg = settings(world, tmp_path / "run", **BOTH | {"search": BOTH["search"] | {"questions_at_once": 2}})
    process = ranks._forks.Process(target=run_until_killed, args=(cfg, 8))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = (cfg.run_dir / "parts" / "beam_2.0.jsonl").read_text().splitlines()[1:]
    assert 0 < len(done) < 4 and not (cfg.run_dir / "search.jsonl").exists()
    run(cfg)
    assert (cfg.run_dir / "search.jsonl").read_bytes() == expected.read_bytes()


def test_a_majority_needs_no_scorer(world, tmp_path):
    cfg = settings(world, tmp_path / "run", scorer=None, search={"n": 2, "choose": "majority"})
    assert run(cfg)["drawn best_of"] > 0
    assert json.loads((cfg.run_dir / "summary.json").read_text())["searches"]["best_of"]["scorer_run"] == 0


def test_rejection_sampling_draws_as_many_tokens_as_another_search(world, finished, tmp_path):
    cfg, _ = finished
    with pytest.raises(ValueError, match=r"search.tokens_of: found beam_2, mcts_2 in .*, required the search.jsonl of"):
        drawn_by(cfg.run_dir / "search.jsonl")
    guided = settings(world, tmp_path / "guided", search={"method": "mcts", "width": 2, "simulations": 8})
    drawn = run(guided)["drawn mcts"]
    assert drawn_by(guided.run_dir / "search.jsonl") == round(drawn)
    of_it = {"n": 64, "width": 1, "choose": "majority", "tokens_of": guided.run_dir / "search.jsonl"}
    cfg = settings(world, tmp_path / "reject", scorer=None, search=of_it)
    assert cfg.inputs()["search.tokens_of"] == guided.run_dir / "search.jsonl"
    run(cfg)
    for line in (cfg.run_dir / "search.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert round(drawn) <= row["drawn"] < round(drawn) + 12 and row["cut"]  # the last completion may go over
    with pytest.raises(ValueError, match=r"search.budget_tokens: found 5 with search.tokens_of, required one of them"):
        settings(world, tmp_path, scorer=None, search=of_it | {"budget_tokens": 5})


def test_a_scorer_that_is_gone_ends_a_search_and_later_it_goes_on(world, tmp_path, capsys):
    asked = []

    def reply(path, body):
        if path.endswith("_info"):
            info = {"architectures": ["Qwen2ForSequenceClassification"], "version": "1"}
            return 200, json.dumps(info).encode()
        asked.append(path)
        is_gone = path == gone and len(asked) > limit
        return None if is_gone else (200, json.dumps({"embedding": [0.5], "meta_info": {}}).encode())

    closed = {"path": world / "scorer", "urls": ["http://127.0.0.1:1"], "tries": 1}
    with pytest.raises(RunFailed, match=r"scorer http://127.0.0.1:1/model_info: .*; the same command goes on when it"):
        run(settings(world, tmp_path / "closed", scorer=closed))
    server = ModelServer(reply)
    of_scorer = {"path": world / "scorer", "urls": [server.url], "tries": 1, "parallel": 1}
    keys = {"scorer": of_scorer, "search": {"n": 2, "width": 2, "method": "beam", "questions_at_once": 1}}
    cfg, limit, gone = settings(world, tmp_path / "run", **keys), 0, "/flush_cache"
    with pytest.raises(RunFailed, match=r"scorer http://127.0.0.1:\d+/flush_cache: .*; what is done is kept, and the"):
        run(cfg)
    asked.clear()
    limit, gone = 12, "/classify"
    with pytest.raises(
        RunFailed, match=r"scorer http://127.0.0.1:\d+/classify: .*; what is done is kept, and the same"
    ):
        run(cfg)
    done = (cfg.run_dir / "parts" / "beam.0.jsonl").read_text().splitlines()[1:]
    limit = 10**6
    run(cfg)
    server.stop()
    rows = (cfg.run_dir / "search.jsonl").read_text().splitlines()
    assert 0 < len(done) < 4 == len(rows) and {*done} <= {*rows}
    table = (cfg.run_dir / "table.md").read_text()
    assert table.splitlines()[2].split(" | ")[5] == "-"  # what the server has run is not known
    said = capsys.readouterr().out
    assert "4 of 4 searches ended without an answer (max_steps 40, max_tokens 12)" in said
    assert "has learned steps" not in said  # the same marks


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scorer": None}, "search.choose: found vote without a scorer, required majority"),
        ({"scorer": None, "search": {"method": "mcts"}}, "scorer: found null, required one: only best_of"),
        ({"search": {"method": "dvts", "n": 6, "width": 4}}, "search.n: found 6, required a multiple of search.width"),
        ({"compare": ["mcts"], "search": {"method": "mcts", "use_rule": True}}, "a test must not know its answers"),
        (
            {"compare": ["best_of", "dvts"], "search": {"curve": [2, 6]}},
            "search.curve: found 2, 6 with dvts, required a multiple of search.width = 4",
        ),
        (
            {"compare": ["mcts"], "search": {"curve": [1, 5000]}},
            "search.curve: found 5000, required at most 4096 draws",
        ),
    ],
)
def test_settings_that_cannot_be_searched_are_named(world, tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        if problems := settings(world, tmp_path, **keys).source_problems():
            raise ValueError(problems)


def test_what_lacks_before_a_search_begins_is_named_by_its_own_key(world, finished, tmp_path):
    def problem(**keys) -> str:
        with pytest.raises(ConfigError) as found:
            dry_run(settings(world, tmp_path, **keys), 1, is_whole=True, is_live=False)
        return str(found.value)

    assert (
        problem(questions=tmp_path / "no.jsonl")
        == f"questions: found no {tmp_path}/no.jsonl, required a file or a folder"
    )
    assert "without good and bad tokens; required a score head" in problem(scorer={"path": world / "model"})
    assert problem(template="chat").startswith(f"template: {world}/model has no chat template")
    assert "max_prompt_tokens" in (long := problem(max_prompt_tokens=1)) and "data." not in long
    for folder, message in (
        (tmp_path, "found nothing"),
        (finished[0].run_dir, "found no question 9, required one that"),
    ):
        with pytest.raises(ConfigError, match=message):
            print_tree(folder, 9, print)


def test_a_scorer_that_says_not_what_it_means_a_mark_that_never_comes_and_too_little_room_are_refused(
    world, tmp_path, monkeypatch, capsys
):
    silent = {"path": world / "silent", "format": "own"}
    with pytest.raises(ValueError, match="does not say what its labels mean"):
        run(settings(world, tmp_path / "a", scorer=silent))
    with pytest.raises(ValueError, match="one path of 2,060 tokens needs"):
        run(settings(world, tmp_path / "b", search={"cache_gib": 1e-9}))
    run(settings(world, tmp_path / "d", steps={"marks": ["</step>"]}, search={"n": 2}))
    said = capsys.readouterr().out
    assert "steps.marks: found '</step>', which no completion of 4 questions has" in said
    assert f"found '</step>', and {world}/scorer has learned steps that end at '0', '1'," in said
    monkeypatch.setattr(searching, "LOOKED_AT", 3)
    with pytest.raises(ValueError, match=r"found '</step>', required a mark that occurs in completions \(0 of 3"):
        run(settings(world, tmp_path / "c", steps={"marks": ["</step>"]}))


def test_an_undecided_answer_differs_from_none_and_is_told(tmp_path):
    def row(search: str, number: int, verdict: str) -> dict:
        return {"search": search, "id": number, "verdict": verdict, "nodes": [{}] * number}

    rows = [row("a", 1, "right"), row("b", 1, "wrong"), row("a", 2, "right"), row("b", 2, "undecided")]
    assert most_telling(rows) == 1
    assert most_telling([row("a", 1, "undecided"), row("a", 2, "undecided")]) == 2


def test_the_table_by_hand():
    def row(verdict: str, drawn: int, answer: str | None = "1", right: int = 0) -> dict:
        return {
            "search": "beam", "verdict": verdict, "verdicts": dict.fromkeys(("vote", "best", "majority"), verdict),
            "answer": answer, "cut": False, "drawn": drawn, "right": right, "ended": 2,
            "decided": 2 - (verdict == "undecided"),
            "nodes": [{"value": drawn / 40, "verdict": verdict, "finish": "stop"}],
        }  # fmt: skip

    rows = [row("right", 10, right=1), row("wrong", 20, None, 1), row("undecided", 30), row("right", 40, right=2)]
    table = table_of(rows, {"beam": {"policy": 120, "scorer": 60, "seconds": 2.0}}, ["beam"])
    found = table["searches"]["beam"]
    assert (found["accuracy"], found["undecided"], found["without_answer"]) == (2 / 3, 1, 1)
    assert (found["drawn"], found["policy_run"], found["scorer_run"]) == (25, 30, 15)
    assert found["any_right"] == 1.0  # three of three: whether the undecided one is right is not known
    assert (found["pass_at_1"], found["auc"]) == (None, 0.5)  # 10 below 20, 40 above it
    assert "| beam | 0.667 (" in markdown(table) and "| 25 | 30 | 15 | 2.0 |" in markdown(table)
