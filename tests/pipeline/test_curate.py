"""The kind of stage `curate`: what comes out of which rows, and what a damaged input or a full disk leaves."""

import json
import pickle
import random
import resource
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_folders import KINDS, save_tokenizer
from rich.console import Console
from samples import THOUGHTS, sample, write_samples
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.config import ConfigError, CurateConfig, TextData
from r1engine.config.pipeline import load_pipeline
from r1engine.data.conversations import read_conversations
from r1engine.data.texts import TextTable, cached_texts
from r1engine.pipeline import curate as stage
from r1engine.pipeline.curate import check, curate

EVALUATION = "Find the least positive integer that has exactly twelve divisors and ends with the digit six."


def run(tmp_path, rows, name="out", **settings):
    """(counts, rows of data.parquet, id -> reason of dropped.parquet)."""
    folder = tmp_path / name / "zero"
    made = write_samples(folder, rows)
    return run_on([made, *settings.pop("files", [])], tmp_path / name / "data", **settings)


def run_on(sources, run_dir, **settings):
    cfg = CurateConfig(sources=sources, run_dir=run_dir, **settings)
    counts = curate(cfg, Console(quiet=True))
    dropped = pq.read_table(run_dir / "dropped.parquet").to_pylist()
    reasons = {row["id"]: row["reason"] for row in dropped}
    assert len(reasons) == len(dropped) and counts == json.loads((run_dir / "counts.json").read_text())
    return counts, pq.read_table(run_dir / "data.parquet").to_pylist(), reasons


def conversations(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bad_rows():
    """Reason -> a row that leaves for it, and a row beside it that stays."""
    good = [sample(i) for i in range(10, 22)]
    bad = {
        "truncated": sample(1, finish="length"),
        "wrong": sample(2, verdict="wrong", reason="3 is not 4"),
        "undecided": sample(3, verdict="undecided"),
        "structure": sample(4, completion="The sum is 9."),
        "mixed languages": sample(
            5, completion=f"<think>{THOUGHTS} \u6211\u4eec\u628a\u5b83\u4eec\u76f8\u52a0</think>9"
        ),
        "code in thoughts": sample(6, completion="<think>```\nprint(9)\n```</think>9"),
        "repetition": sample(7, completion=f"<think>{THOUGHTS * 9}</think>9"),
        "too long": sample(8, num_tokens=401),
        "same thoughts": {**good[0], "id": "10/1", "sample": 1},
        "contaminated": sample(9, question=f"I was asked: {EVALUATION.upper()} What is it?"),
    }
    return bad, good


def test_each_row_leaves_with_its_reason_and_all_others_stay(tmp_path):
    bad, good = bad_rows()
    heldout = conversations(tmp_path / "heldout.jsonl", {"question": EVALUATION, "answer": "96"})
    counts, data, reasons = run(tmp_path, [*bad.values(), *good], decontaminate=[heldout], max_tokens=400)
    same = reasons.keys() & {"zero:10/0", "zero:10/1"}
    assert len(same) == 1 and reasons.pop(next(iter(same))) == "same thoughts"
    assert reasons == {f"zero:{row['id']}": reason for reason, row in bad.items() if reason != "same thoughts"}
    kept = {row["source"] for row in data}
    assert kept | same == {f"zero:{row['id']}" for row in [*good, bad["same thoughts"]]}
    assert counts["read"] == 22 and counts["kept"] == 12
    assert counts["dropped"] == {reason: {"math": 1} for reason in counts["dropped"]} and len(counts["dropped"]) == 10
    page = (tmp_path / "out" / "data" / "report.html").read_text()
    assert all(reason in page for reason in bad) and "3 is not 4" in page and "395,285" in page
    dropped = pq.read_table(tmp_path / "out" / "data" / "dropped.parquet").to_pylist()
    detail = next(row["detail"] for row in dropped if row["reason"] == "contaminated")
    assert detail.startswith(f"{heldout}:1: 'find the least positive integer")


def test_neither_the_order_of_rows_nor_processes_matter(tmp_path, monkeypatch):
    bad, good = bad_rows()
    rows = [*bad.values(), *good, *(sample(i, k) for i in range(30, 40) for k in range(3))]
    settings = {"keep_per_question": 2, "counts": {"math": 25}}
    first, data, reasons = run(tmp_path, rows, **settings)
    assert Counter(reasons.values()).keys() >= {"question has others", "not in the mixture", "same thoughts"}
    random.Random(0).shuffle(rows)
    monkeypatch.setattr(stage, "SMALL_BYTES", 0)
    monkeypatch.setattr(stage, "BUCKET_TOKENS", 200)  # rows are dealt to many buckets
    again, others, other_reasons = run(tmp_path, rows, "again", processes=2, **settings)
    assert (again, others, other_reasons) == (first, data, reasons)
    _, seeded, _ = run(tmp_path, rows, "seeded", seed=1, **settings)
    assert [row["source"] for row in seeded] != [row["source"] for row in data]


def test_rows_say_where_they_come_from(tmp_path):
    turns = [
        {"role": "user", "content": "How are you, and who are you?"},
        {"role": "assistant", "content": "I am well."},
    ]
    human = conversations(
        tmp_path / "human.jsonl",
        {"messages": turns, "num_tokens": 7, "domain": "general", "edited_by": ["human"]},
        {
            "question": "\u4f60\u597d\u5417\uff1f",
            "completion": "<think>\u6211\u5f88\u597d</think>\n\u597d\u3002",
            "num_tokens": 9,
        },
    )
    rows = [sample(1, prompt="User: 1\nAssistant: <think>", completion="I add.</think>\nIt is 8."), sample(2)]
    counts, data, _ = run(tmp_path, rows, files=[human], methods=["r1_zero", "human"])
    found = {row["source"]: row for row in data}
    assert found.keys() == {"zero:1/0", "zero:2/0", "human.jsonl:1", "human.jsonl:2"}
    assert found["zero:1/0"]["messages"][1]["content"] == "<think>I add.</think>\nIt is 8."
    assert found["human.jsonl:1"]["edited_by"] == ["human"] and found["human.jsonl:1"]["messages"] == turns
    assert [found[f"human.jsonl:{i}"]["language"] for i in (1, 2)] == ["en", "zh"]
    assert {row["method"] for row in data} == {"r1_zero", "human"}
    assert counts["methods"] == {"human": 2, "r1_zero": 2} and counts["domains"]["general"]["rows"] == 2
    shas = {row["question_sha"] for row in data}
    assert len(shas) == 4 and all(len(sha) == 64 for sha in shas)


def test_a_bare_answer_gets_its_summary_from_a_text(tmp_path):
    table_1 = "<think> I add them. </think> <answer> \\boxed{8} </answer>"
    rows = [sample(1, completion=table_1), sample(2, completion=table_1.replace("\\boxed{8}", ""))]
    save_tokenizer(tmp_path / "model", KINDS["chatml"])
    model = {"path": tmp_path / "model", "template": "chat"}
    settings = {"summaries": {"en": "The sum is \\boxed{{answer}}."}, "model": model}
    _, data, reasons = run(tmp_path, rows, **settings)
    assert [row["messages"][1]["content"] for row in data] == ["<think> I add them. </think>\nThe sum is \\boxed{8}."]
    assert data[0]["edited_by"] == ["summaries"] and reasons == {"zero:2/0": "structure"}
    _, data, _ = run(tmp_path, rows[:1], "bare")
    assert data[0]["messages"][1]["content"] == "<think> I add them. </think>\n\\boxed{8}"


def test_right_answers_of_nearly_the_same_question_are_few_and_the_shortest(tmp_path):
    asked = (
        "In how many ways can nine different books be put on three shelves if no shelf may stay empty and order counts"
    )
    rows = [sample(i, question=f"{asked}{end}", num_tokens=90 - i) for i, end in enumerate(("?", "!", " here?"))]
    rows.append(sample(7, question=f"{asked} at all?", num_tokens=10, verdict="wrong"))
    _, data, reasons = run(tmp_path, rows, keep_per_question=1, prefer="shortest")
    assert [row["source"] for row in data] == ["zero:2/0"]
    assert reasons == {"zero:0/0": "question has others", "zero:1/0": "question has others", "zero:7/0": "wrong"}
    _, data, _ = run(tmp_path, rows, "apart", keep_per_question=1, near_duplicate=None)
    assert len(data) == 2  # equal but for punctuation is equal


def test_a_contaminated_answer_takes_no_place(tmp_path):
    heldout = conversations(tmp_path / "heldout.jsonl", {"question": EVALUATION})
    long, clean = sample(1), sample(1, 1)
    long["completion"] = f"<think>This is {EVALUATION}</think>\n9"
    _, data, reasons = run(tmp_path, [long, clean], keep_per_question=1, decontaminate=[heldout])
    assert reasons == {"zero:1/0": "contaminated"} and [row["source"] for row in data] == ["zero:1/1"]


def test_supervised_training_reads_the_data(tmp_path):
    run(tmp_path, [sample(i) for i in range(9)])
    path = tmp_path / "out" / "data" / "data.parquet"
    found = list(read_conversations(path))
    assert len(found) == 9 and found[0].messages[1]["content"].startswith("<think>I add")
    from r1engine.data.chat import make_format
    from r1engine.hf.tokenizer import load_tokenizer

    folder = save_tokenizer(tmp_path / "model", KINDS["chatml"])
    data = TextData(train=path, template="chat")
    table = TextTable(
        cached_texts(path, tmp_path / "cache", "key", make_format(folder, load_tokenizer(folder), data), data)
    )
    assert len(table) == 9
    with pq.ParquetFile(path) as file:
        assert file.schema_arrow.metadata[b"num_tokens"] == b"as the inputs say"


def test_a_chunk_that_differs_by_a_byte_is_named(tmp_path):
    made = write_samples(tmp_path / "zero", [sample(i) for i in range(20)])
    chunk = made / "chunk_00001.parquet"
    whole = chunk.read_bytes()
    for place in random.Random(0).sample(range(len(whole)), 5):
        chunk.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(
            ValueError, match=r"samples/chunk_00001\.parquet: SHA-256 differs from counts\.json; delete it"
        ):
            run_on([made], tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == []
    chunk.write_bytes(whole)
    assert run_on([made], tmp_path / "data")[0]["kept"] == 20


def test_a_full_disk_in_the_middle_leaves_what_was_there(tmp_path):
    made = write_samples(tmp_path / "zero", [sample(i, completion=noisy(i)) for i in range(64)])
    _, before, _ = run_on([made], tmp_path / "data", counts={"math": 3})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "data" / "report.html").stat().st_size
    for limit in (2_000, size):  # in the first pass, and when the data is written
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # stands for a full disk: writing on is an OSError
        try:
            with pytest.raises(OSError, match="File too large"):
                run_on([made], tmp_path / "data")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        names = {"counts.json", "data.parquet", "dropped.parquet", "report.html"}
        assert {path.name for path in (tmp_path / "data").iterdir()} == names
        assert pq.read_table(tmp_path / "data" / "data.parquet").to_pylist() == before


def noisy(seed):
    """A completion that does not compress well."""
    rng = random.Random(seed)
    letters = " ".join(f"$x_{{{rng.randrange(10**9)}}}$" for _ in range(40))
    return f"<think>{THOUGHTS} {letters}</think>\nIt is {seed}."


def test_what_is_left_is_enough_or_an_error(tmp_path):
    rows = [sample(1, verdict="wrong"), sample(2, domain="code"), sample(3)]
    with pytest.raises(ValueError, match=r"counts\.code: found 1, required 2; counts\.logic: found 0, required 1"):
        run(tmp_path, rows, counts={"code": 2, "logic": 1})
    with pytest.raises(ValueError, match=r"data: 0 of 1 rows are left \(wrong 1\); see dropped\.parquet"):
        run(tmp_path, rows[:1], "none")
    _, data, reasons = run(tmp_path, rows, "shares", shares={"code": 1.0})
    assert [row["domain"] for row in data] == ["code"] and reasons["zero:3/0"] == "not in the mixture"
    assert not (tmp_path / "none" / "data" / "data.parquet").exists()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("", "sources: found none, required at least one"),
        ("sources=[a.jsonl, a.jsonl]", "sources: found one twice"),
        ("sources=[a.jsonl] methods=[human, human]", "methods: found 2, required one for each of the 1 sources"),
        ("sources=[a.jsonl] methods=[alien]", "methods: found 'alien', required one of few_shot, direct"),
        ("sources=[a.jsonl] counts={math:1} shares={math:1}", "counts, shares: found both"),
        ("sources=[a.jsonl] summaries={en:x}", "summaries.en: found 'x', required a text with {answer}"),
        ("sources=[a.jsonl]", "sources.0: found no a.jsonl, required a file or a folder"),
        ("sources=[a.jsonl] near_duplicates=1", "did you mean 'near_duplicate'?"),
    ],
)
def test_the_command_refuses_what_cannot_run(tmp_path, settings, problem):
    (tmp_path / "c.yaml").write_text(f"stage: curate\nrun_dir: {tmp_path / 'data'}\n")
    overrides = [part.replace(":", ": ") for part in settings.replace(", ", ",").split() if part]
    done = CliRunner().invoke(app, ["curate", str(tmp_path / "c.yaml"), *overrides])
    assert done.exit_code == 2 and problem in done.stderr


def test_the_command_and_its_dry_run(tmp_path):
    made = write_samples(tmp_path / "zero", [sample(i) for i in range(3)])
    (tmp_path / "c.yaml").write_text(f"stage: curate\nrun_dir: {tmp_path / 'data'}\nsources: [{made}]\n")
    done = CliRunner().invoke(app, ["curate", str(tmp_path / "c.yaml"), "--dry-run"])
    assert done.exit_code == 0 and "language_min: 0.95" in done.stdout and "note: 3 rows in 1 files" in done.stderr
    assert not (tmp_path / "data").exists()
    done = CliRunner().invoke(
        app, ["curate", str(tmp_path / "c.yaml"), "summaries={en: 'It is {answer}.'}", "--dry-run"]
    )
    assert done.exit_code == 0
    done = CliRunner().invoke(app, ["curate", str(tmp_path / "c.yaml")])
    assert done.exit_code == 0 and "3 of 3 rows kept" in done.stdout and (tmp_path / "data" / "data.parquet").is_file()
    done = CliRunner().invoke(app, ["curate", str(tmp_path / "c.yaml"), "summaries={en: 'It is {answer}.'}"])
    assert done.exit_code == 2 and "found no num_tokens behind summaries; required is model.path" in done.stderr


def test_bad_sources_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: found no chunk_\*\.parquet, required are samples"):
        check(CurateConfig(sources=[tmp_path / "empty"]))
    made = write_samples(tmp_path / "zero", [sample(1)])
    table = pq.read_table(made / "chunk_00000.parquet")
    (made.parent / "counts.json").unlink()
    pq.write_table(table.drop_columns("verdict"), made / "chunk_00000.parquet")
    with pytest.raises(ConfigError, match=r"chunk_00000\.parquet: row 1: found no field 'verdict'"):
        check(CurateConfig(sources=[made]))
    path = conversations(tmp_path / "a.jsonl", {"question": "a", "completion": "b", "domain": 3})
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: domain is 3, required a text"):
        check(CurateConfig(sources=[path]))
    path = conversations(tmp_path / "a.jsonl", {"question": "a", "completion": "b"})
    with pytest.raises(ValueError, match=r"a\.jsonl:1: found no num_tokens; required is model\.path"):
        run_on([path], tmp_path / "data")
    assert table.schema.field("completion").type == pa.string()


def test_a_pipeline_takes_the_data_of_one_stage_into_another(tmp_path):
    path = conversations(tmp_path / "a.jsonl", {"question": "What is it?", "completion": "It is.", "num_tokens": 3})
    (tmp_path / "p.yaml").write_text(
        f"run_dir: {tmp_path / 'runs'}\nstages:\n"
        f"  first: {{stage: curate, sources: [{path}]}}\n"
        "  second: {stage: curate, sources: [first], decontaminate: [first/data.parquet]}\n"
    )
    pipeline = load_pipeline(tmp_path / "p.yaml", [])
    second = pipeline.stages[1]
    assert second.cfg.sources == [tmp_path / "runs" / "first" / "data.parquet"]
    assert second.needs == {"sources.0": "first", "decontaminate.0": "first"}
    assert second.cfg.inputs().keys() == {"sources.0", "decontaminate.0"}


def test_a_filter_that_somebody_else_has_written_is_not_loaded(tmp_path):
    class Runs:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "filter").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(RuntimeError, match=r"filter is not what this run has written; it is not loaded"):
        stage._filter_of(tmp_path, "0" * 64)
    assert not (tmp_path / "ran").exists()
