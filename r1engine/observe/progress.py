"""One live bar for the whole run on a terminal; plain lines elsewhere; nothing on ranks other than 0."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from r1engine.observe.heartbeat import Heartbeat

_PHASE_LINE_SECONDS = 10.0  # without a terminal, at most one line of a phase in this time
_MEDIAN_OF = 21  # steps behind the ETA; the median ignores the occasional evaluation or checkpoint
# Shown if the row has them: key -> (name, format)
_SHOWN = {
    "loss": ("loss", "{:.3f}"),
    "reward/mean": ("reward", "{:.3f}"),
    "reward/accuracy": ("accuracy", "{:.3f}"),
    "completion/length_mean": ("length", "{:.0f}"),
    "tokens_per_second": ("tok/s", "{:,.0f}"),
    "eval/pass_at_1": ("held-out pass@1", "{:.3f}"),
    "drawn": ("drawn", "{:,.0f}"),
    "accepted": ("right", "{:.1%}"),
}


class _Count(MofNCompleteColumn):
    """Units done; where their number is not known, those so far and what they are, or the seconds of the phase."""

    def render(self, task: Task) -> Text:
        if task.total is not None:
            return super().render(task)
        unit = task.fields.get("unit", "")
        return Text(f"{task.completed:,.0f} {unit}".rstrip() if task.completed else f"{task.elapsed or 0:.0f} s")


class Progress:
    """Progress of a run. Use as a context manager: leaving it, also by Ctrl-C, restores the terminal."""

    _phase_bar: TaskID  # where there are bars

    def __init__(
        self,
        title: str,
        *,
        enabled: bool,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        time_of_day: Callable[[], str] = lambda: time.strftime("%H:%M:%S"),
    ) -> None:
        """
        Args:
            title:   name of the run.
            enabled: False on ranks other than 0: every method then does nothing.
            console: where to write; None: stdout.
            clock:   seconds, monotonic.
            time_of_day: stands in front of a line that does not go to a terminal.
        """
        self._total, self._title, self._enabled = 0, title, enabled
        self.current = ""  # phase, on every rank
        self._time_of_day = time_of_day
        self.heartbeat: Heartbeat | None = None  # told of every movement, too, once there is one
        self._console = console or Console()
        self._clock = clock
        self._step, self._stepped_at = 0, clock()
        self._seconds_per_step: deque[float] = deque(maxlen=_MEDIAN_OF)
        self._phase, self._phase_done, self._lined_at = "", 0, clock()
        self._phase_total: int | None = None
        self._unit = ""
        self._bars = self._make_bars() if enabled and self._console.is_terminal else None

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        if self._enabled and kind is KeyboardInterrupt:
            self._line(f"interrupted at step {self._step} of {self._total}")

    def start(self, step: int, total: int) -> None:
        """Says that the first stride begins: the ETA counts from here.

        Args:
            step:  steps done before, by the run this one resumes; 0 for a fresh run.
            total: steps of the whole run, those before a resume included.
        """
        self._step, self._total, self._stepped_at = step, total, self._clock()
        if self._bars is not None:
            self._bars.update(self._run_bar, completed=step, total=total)
        elif self._enabled:
            self._line(f"{self._title}: {total} steps")

    def phase(self, name: str, total: int | None = None, *, unit: str = "") -> None:
        """Names what is going on.

        Args:
            name:  generate, update, ...
            total: units it will take, counted by `advance`; None: not known.
            unit:  what is counted, told where the total is not known: tokens, rows, ...
        """
        self.current, self._unit = name, unit
        if not self._enabled:
            self._phase = name
            self._beat()
            return
        self._phase, self._phase_total, self._phase_done, self._lined_at = name, total, 0, self._clock()
        self._beat()
        if self._bars is not None:
            # A fresh task: rich cannot set the total of an old one back to unknown.
            self._bars.remove_task(self._phase_bar)
            self._phase_bar = self._bars.add_task(f"  {escape(name)}", total=total, values="", eta="", unit=unit)

    def advance(self, n: int = 1) -> None:
        """Counts `n` more units of the phase as done."""
        if not self._enabled:
            return
        self._phase_done += n
        self._beat()
        if self._bars is not None:
            self._bars.advance(self._phase_bar, n)
        elif self._clock() - self._lined_at >= _PHASE_LINE_SECONDS:
            self._lined_at = self._clock()
            total = self._phase_total
            of = f"{self._phase_done / total:4.0%} of {total:,}" if total else f"{self._phase_done:,} {self._unit}"
            self._line(f"  {self._phase} {of}".rstrip())

    def step(self, step: int, row: dict[str, float]) -> None:
        """Reports a finished iteration.

        Args:
            step: steps done.
            row:  the metrics row; what it lacks is not shown.
        """
        if not self._enabled:
            self._step = step
            return
        clock = self._clock()
        if step > self._step:
            self._seconds_per_step.append((clock - self._stepped_at) / (step - self._step))
        self._step, self._stepped_at = step, clock
        self._beat()
        values = "  ".join(f"{name} {form.format(row[key])}" for key, (name, form) in _SHOWN.items() if key in row)
        if self._bars is not None:
            self._bars.update(self._run_bar, completed=step, values=values, eta=f"ETA {self.eta()}")
            self._bars.update(self._phase_bar, visible=False)
        else:
            self._line(f"step {step}/{self._total}  {values}  ETA {self.eta()}")

    def note(self, text: str) -> None:
        """Prints a line of plain text, above the bar if there is one."""
        if self._enabled:
            self._line(text)

    def eta(self) -> str:
        """Time left, from the median of the last steps: "1:02:03", or "-" before the first step."""
        if not self._seconds_per_step:
            return "-"
        seconds = round(statistics.median(self._seconds_per_step) * (self._total - self._step))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"

    def _beat(self) -> None:
        if self.heartbeat is not None:
            self.heartbeat.beat(self._phase, self._phase_done, self._step, self._total)

    def _line(self, text: str) -> None:
        if self._bars is None:
            text = f"{self._time_of_day()} {text}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _make_bars(self) -> Bars:
        bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Count(),
            TextColumn("{task.fields[values]}"),
            TextColumn("{task.fields[eta]}"),
            console=self._console,
            refresh_per_second=4,
        )
        self._run_bar = bars.add_task(escape(self._title), total=None, completed=self._step, values="", eta="ETA -")
        self._phase_bar = bars.add_task("", total=None, visible=False, values="", eta="")
        return bars
