"""The commands that the README begins own training with, and a folder in which they run without a network."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def first_hour() -> list[list[str]]:
    """The words of each command: clone, make, download, train, generate."""
    text = (ROOT / "README.md").read_text().partition("## Train your own model\n")[2]
    block = re.search(r"\n((?:    \S.*\n|        .*\n)+)", text)[1].replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    clone, make, download, train, generate = commands
    assert (clone[:2], make, download[0]) == (["git", "clone"], ["make", "smollm2"], "curl")
    assert (train[1], generate[1]) == ("train", "generate")
    return commands


def lay_out(folder: Path, download: list[str]) -> None:
    """What clone and curl bring: configurations, examples, and files of questions in GSM8K's own form."""
    names = re.search(r"\{(.*)\}(\.jsonl)", download[-1])
    for name in names[1].split(","):
        path = folder / download[download.index("--output-dir") + 1] / f"{name}{names[2]}"
        path.parent.mkdir(exist_ok=True)
        rows = [
            {
                "question": f"Of the {name} set: a hen lays {n} eggs and then 1 more. How many are that?",
                "answer": f"She lays {n}+1=<<{n}+1={n + 1}>>{n + 1} eggs.\n#### {n + 1}",
            }
            for n in range(9)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
