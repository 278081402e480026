"""Progress degrades to plain lines, estimates from the median, and leaves the terminal as it was."""

import io
import re

import pytest
from rich.console import Console

from r1engine.observe.progress import Progress
from r1engine.observe.summary import print_summary, summary_table


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def plain(**options):
    return Console(file=io.StringIO(), width=200, **options)


def terminal():
    return Console(file=io.StringIO(), width=120, force_terminal=True, force_interactive=True, color_system=None)


def lines(console):
    return console.file.getvalue().splitlines()


def timed_lines(console):
    """What was written, without the time in front of each line."""
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines(console))
    return [line[9:] for line in lines(console)]


ROW = {"reward/mean": 1.25, "reward/accuracy": 0.5, "completion/length_mean": 123.4, "tokens_per_second": 4321.0}


def test_without_a_terminal_a_step_is_one_line():
    console, clock = plain(), Clock()
    with Progress("demo", enabled=True, console=console, clock=clock) as progress:
        progress.start(0, 10)
        clock.seconds = 6.0
        progress.step(1, ROW)
    assert timed_lines(console) == [
        "demo: 10 steps",
        "step 1/10  reward 1.250  accuracy 0.500  length 123  tok/s 4,321  ETA 0:54",
    ]


def test_a_long_phase_has_a_line_at_most_every_ten_seconds():
    console, clock = plain(), Clock()
    with Progress("demo", enabled=True, console=console, clock=clock) as progress:
        progress.phase("generate", total=50)
        for _ in range(50):
            clock.seconds += 0.6
            progress.advance(1)
        progress.phase("update")
        clock.seconds += 10
        progress.advance(7)
        progress.phase("evaluate", unit="tokens")
        clock.seconds += 10
        progress.advance(9)
    # 10 s are over at the 17th, 34th unit; each 0.6 s.
    assert timed_lines(console) == [
        "  generate  34% of 50",
        "  generate  68% of 50",
        "  update 7",
        "  evaluate 9 tokens",
    ]


def test_eta_is_from_the_median_and_counts_steps_not_calls():
    clock = Clock()
    progress = Progress("demo", enabled=True, console=plain(), clock=clock)
    assert progress.eta() == "-"
    progress.start(40, 100)  # resumed
    for step, seconds in ((50, 20.0), (60, 900.0), (70, 20.0)):  # an evaluation in between
        clock.seconds += seconds
        progress.step(step, {})
    assert progress.eta() == "1:00"  # 30 steps of 2 s


def test_eta_has_hours():
    clock = Clock()
    progress = Progress("demo", enabled=True, console=plain(), clock=clock)
    progress.start(0, 3662)
    clock.seconds = 1.0
    progress.step(1, {})
    assert progress.eta() == "1:01:01"


def test_other_ranks_are_silent():
    console = terminal()
    with Progress("demo", enabled=False, console=console) as progress:
        progress.start(0, 10)
        progress.phase("generate", total=5)
        progress.advance(5)
        progress.step(1, ROW)
        progress.note("hello")
    assert console.file.getvalue() == ""


def test_markup_in_a_note_is_printed_as_it_is():
    console = plain()
    with Progress("a[b]c", enabled=True, console=console) as progress:
        progress.note("\\boxed{[red]} [/oops]")
    assert timed_lines(console) == ["\\boxed{[red]} [/oops]"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_cursor_is_shown_again_whatever_ends_the_run(error):
    console = terminal()
    with pytest.raises(error), Progress("demo", enabled=True, console=console) as progress:
        progress.start(0, 10)
        progress.phase("generate [1]", total=5)
        progress.advance(2)
        progress.step(1, ROW)
        assert console.file.getvalue().count("\x1b[?25l") == 1  # hidden while the bar lives
        raise error
    text = console.file.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert ("interrupted at step 1 of 10" in text) == (error is KeyboardInterrupt)


def test_the_bar_shows_the_step_and_its_numbers():
    console = terminal()
    with Progress("demo", enabled=True, console=console) as progress:
        progress.start(0, 10)
        progress.step(4, ROW)
    last = console.file.getvalue()
    assert "4/10" in last and "accuracy 0.500" in last and "ETA" in last


def test_a_phase_of_unknown_length_does_not_show_the_last_total():
    console = terminal()
    with Progress("demo", enabled=True, console=console) as progress:
        progress.phase("generate", total=40)
        progress.advance(40)
        progress.phase("train")
        progress.phase("evaluate")
        progress.advance(1021)
    shown = {name: [line for line in lines(console) if name in line] for name in ("train", "evaluate")}
    assert "0 s" in shown["train"][-1] and "1,021" in shown["evaluate"][-1] and "?" not in shown["train"][-1]


BEFORE = {"eval/pass_at_1": 0.1, "eval/format": 0.5, "eval/length_mean": 40.0, "eval/truncated": 0.2, "step": 0}
AFTER = {"eval/pass_at_1": 0.75, "eval/format": 1.0, "eval/length_mean": 52.5, "eval/truncated": 0.0}


def test_the_table_has_before_after_and_change():
    console = plain()
    console.print(summary_table(BEFORE, AFTER))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines(console)]
    assert ["pass@1", "10.0%", "75.0%", "+65.0%"] in cells
    assert ["mean length (tokens)", "40.0", "52.5", "+12.5"] in cells
    assert ["truncated", "20.0%", "0.0%", "-20.0%"] in cells


def test_a_missing_evaluation_is_a_dash():
    console = plain()
    console.print(summary_table({}, AFTER))
    assert any("pass@1" in line and line.count("-") == 2 for line in lines(console))


def test_without_a_terminal_samples_are_plain_text():
    console = plain()
    row = {"step": 9, "question": "1+1?", "answer": "2", "completion": "[b]<think>x</think>", "reward/accuracy": 1.0}
    print_summary(BEFORE, AFTER, [row, {}, {"completion": "a third"}], console=console)
    text = console.file.getvalue()
    assert "[step 9  reward/accuracy 1.0  length -]\nquestion: 1+1?\nreference: 2\n[b]<think>x</think>" in text
    assert "a third" not in text
