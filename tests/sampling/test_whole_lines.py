"""Files of a JSON value a line that a kill may cut short."""

from r1engine.sampling.labelling import StepFile
from r1engine.sampling.whole_lines import lines_of, whole_lines

ROWS = [{"text": "a\u2028b\x85c\x1cd\r\ne"}, {"text": "\n"}]


def test_rows_come_back_as_they_were_and_a_last_one_without_its_end_is_none(tmp_path):
    path = tmp_path / "a.jsonl"
    assert list(whole_lines(path)) == []
    path.write_text(lines_of(ROWS))
    assert list(whole_lines(path)) == ROWS
    path.write_text(lines_of(ROWS)[:-1])
    assert list(whole_lines(path)) == ROWS[:1]
    path.write_bytes(lines_of(ROWS).encode() + '{"text": "é'.encode()[:-1])  # a kill inside a character
    assert list(whole_lines(path)) == ROWS
    path.write_text("{")
    assert list(whole_lines(path)) == []


def test_labelled_solutions_with_other_ends_of_lines_are_kept(tmp_path):
    file, steps = StepFile(tmp_path / "steps.jsonl"), ["a\u2028b\n\n", "c\x85"]
    assert file.begin({"seed": 1}) == set()
    file.append([{"id": "7/0", "steps": steps, "labels": [1.0, None], "of": 1, "rollouts": 3}])
    assert file.begin({"seed": 1}) == {7}
    assert file.summary() == {"solutions": 1, "steps": 2, "labelled": 1, "wrong": 0, "rollouts": 3}
