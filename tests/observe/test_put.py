"""Files that are whole or not there."""

from pathlib import Path

from ranks import on_ranks

from r1engine.observe.put import put_text


def write_often(path: Path) -> str:
    for number in range(2000):
        put_text(path, f"{number}\n", is_lasting=False)
    return path.read_text()


def test_processes_that_write_one_file_do_not_disturb_each_other(tmp_path):
    assert "1999\n" in on_ranks(2, write_often, tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
