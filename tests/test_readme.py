"""The README and the other pages: their examples run, their commands are read, what they name is there."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import forked
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.config import Rewards, load
from r1engine.config.pipeline import load_pipeline

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FOLDERS = ("r1engine", "kernels", "csrc", "tests", "docs", "configs", "examples", "benchmarks")


def snippet(package: str) -> str:
    """The README's example of a package."""
    codes = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (code,) = [code for code in codes if f"from {package}" in code]
    return code


def test_the_ops_example_runs():
    names: dict = {}
    exec(snippet("r1kernels"), names)
    assert names["logits"].grad.abs().sum() > 0


def test_the_stage_example_runs(tiny_base, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(tiny_base)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    code = snippet("r1engine")
    assert len([line for line in code.splitlines() if line]) <= 14
    script = tmp_path / "example.py"
    small = code.replace('"steps=8"', '"steps=1", "optimizer.warmup_steps=0", "grpo.questions=4", "rewards.workers=1"')
    script.write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{small}")
    done = forked(1, script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.match(r"1 \d\.\d+ \S", done.stdout) and (tmp_path / "runs" / "eight_steps" / "model.safetensors").exists()


def test_the_loop_example_runs(tiny_base, tmp_path):
    for name in ("tiny", "base"):
        (tmp_path / name).symlink_to(tiny_base / name)
    done = forked(1, ROOT / "examples" / "own_loop.py", tmp_path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert [re.match(r"step (\d): reward \d\.\d{3}, best: .", line)[1] for line in lines] == ["1", "2"]
    before, after = (folder / "model.safetensors" for folder in (tmp_path / "base" / "model", tmp_path / "own_loop"))
    assert before.read_bytes() != after.read_bytes()


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in an indented block of a page, without its comment."""
    text = re.sub(r"\\\n", " ", page.read_text())
    for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE):
        words = shlex.split(line, comments=True) if re.match(r"(\.venv/bin/|make |torchrun |r1engine )", line) else []
        if words:
            yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def readme_commands(name: str) -> list[list[str]]:
    return [words[1:] for words in commands(README) if words[0] == name]


def test_every_make_target_is_there():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for page in PAGES for words in commands(page) if words[0] == "make"}
    assert {"demo", "test", "lint", "test-all", "test-sglang"} <= named
    assert named <= targets


@pytest.mark.parametrize("words", [words for name in ("r1engine", "torchrun") for words in readme_commands(name)])
def test_every_command_is_read(words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    start = next((i + 1 for i, word in enumerate(words) if word in ("train", "pipeline", "r1engine/train.py")), None)
    if start is None:
        options = [word for word in words[1:] if word.startswith("--")]
        help_text = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert help_text.exit_code == 0
        assert [option for option in options if option not in help_text.output] == []
        return
    config, *overrides = [word for word in words[start:] if not word.startswith("--")]
    overrides = [re.sub(r"^(.*)=\.\.\.$", rf"\1={tmp_path}/\1.jsonl", word) for word in overrides]
    if words[0] == "pipeline":
        assert load_pipeline(Path(config), overrides).stages
    else:
        assert load(Path(config), overrides).stage == "rl"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    broken = [link for link in links if link and not (page.parent / link).exists()]
    paths = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text)
    assert broken + [path for path in paths if "X" not in path and not (ROOT / path).exists()] == []


def test_the_index_has_every_page():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "README.md").read_text())) == pages


def test_the_layout_names_every_room():
    layout = re.search(r"## What is where\n\n(.*?)\n\n", README.read_text(), re.DOTALL)[1]
    rooms = {path.name for path in (ROOT / "r1engine").iterdir() if (path / "__init__.py").is_file()}
    named = {line.strip().split("/")[0] for line in layout.splitlines()}
    assert rooms - named == set()


def test_the_readme_is_short_and_shows_the_picture_and_the_status_first():
    text = README.read_text()
    assert len(text.splitlines()) < 190
    head = text[: text.index("\n## ")]
    assert "docs/demo.png" in head and "not yet run on a GPU" in head
    assert (ROOT / "docs" / "demo.png").stat().st_size < 150_000


def test_the_conditional_metrics_are_those_of_the_code():
    section = (ROOT / "docs" / "metrics.md").read_text().partition("## Only with a setting or a device")[2]
    keys = re.findall(r"^\| `([^`<]+)", section, re.MULTILINE)
    code = "".join(path.read_text() for path in (ROOT / "r1engine").rglob("*.py"))
    shaped = {f"reward/{name}" for name in Rewards.model_fields}
    assert len(keys) > 10
    named = [key for key in keys if f'"{key}' in code or f'["{key.removeprefix("eval/")}"]' in code or key in shaped]
    assert [key for key in keys if key not in named] == []
    literal = set(re.findall(r'"((?:refresh|gpu)/\w+)"', code))
    assert literal - set(keys) == set()
