"""What is made once a node: the prompts of a file."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from ranks import on_ranks
from shown import as_it_is

from r1engine import ranks
from r1engine.data.prompts import PromptTable, write_prompts


def load_as_two_nodes(path: Path, notes: Path, limit: int) -> list[list[int]]:
    """The tokens of the prompts, on four ranks that stand for two nodes of two; who reads the file leaves a note."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(rank % 2)
    world = ranks.start()
    try:

        def encode_all(texts: list[str]) -> list[list[int]]:
            with (notes / str(rank)).open("a") as file:
                file.write(f"{len(texts)}\n")
            return [list(text.encode()) for text in texts]

        with TemporaryDirectory() as own:

            def write() -> str:
                write_prompts(path, Path(own), encode_all, as_it_is, limit)
                return own

            folder = world.once_a_node(write)
            table = PromptTable(Path(folder), as_it_is)
            world.wait()
        shared = world.everyones(folder)
        assert shared[0] == shared[1] != shared[2] == shared[3]
        return [prompt.tokens for prompt in table]
    finally:
        ranks.stop()


@pytest.fixture
def path(tmp_path):
    rows = [{"question": "ab"[i % 2] * 5, "answer": i % 2} for i in range(6)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "notes").mkdir()
    return tmp_path / "a.jsonl"


def test_one_rank_a_node_reads_and_tokenizes_and_all_have_the_same_prompts(path):
    found = on_ranks(4, load_as_two_nodes, path, path.parent / "notes", 9)
    assert found == [[list(b"aaaaa"), list(b"bbbbb")] * 3] * 4
    assert {file.name: file.read_text() for file in (path.parent / "notes").iterdir()} == {"0": "2\n", "2": "2\n"}


def test_what_is_refused_is_raised_on_every_rank(path):
    with pytest.raises(RuntimeError, match=r"6 of 6 prompts have more than max_prompt_tokens = 4 tokens") as caught:
        on_ranks(4, load_as_two_nodes, path, path.parent / "notes", 4)
    assert str(caught.value).count("ValueError: ") >= 4
