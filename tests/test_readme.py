"""The README's Python example runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["logits"].grad.abs().sum() > 0


def test_it_stays_under_200_lines():
    assert len(README.read_text().splitlines()) < 200
