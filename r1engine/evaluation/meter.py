"""How far an evaluation is: replies, rate, time left. A bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

LINE_SECONDS = 10.0


class Meter:
    """Counts replies and tokens of this rank; usable from any thread."""

    def __init__(
        self,
        total: int,
        *,
        enabled: bool,
        say: Callable[[str], None] | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            total:   replies to be drawn.
            enabled: False on ranks other than the first: nothing is shown.
            say:     told lines of text where there is no bar; None: the console is.
            console: of the bar; None: stdout.
            clock:   seconds, monotonic.
        """
        self._total, self._enabled, self._clock = total, enabled, clock
        self._console, self._say = console or Console(), say
        self._began = self._told = clock()
        self._replies = self._tokens = self._right = self._graded = 0
        self._lock = threading.Lock()
        self._bars: Progress | None = None
        if enabled and self._console.is_terminal and total:
            columns = (TextColumn("draw"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rest]}"))
            self._bars = Progress(*columns, console=self._console)
            self._task = self._bars.add_task("", total=total, rest="")
            self._bars.start()

    def tokens(self, count: int) -> None:
        """So many more are drawn."""
        with self._lock:
            self._tokens += count
            self._show()

    def reply(self) -> None:
        """One more has ended."""
        with self._lock:
            self._replies += 1
            if self._bars is not None:
                self._bars.advance(self._task)

    def grade(self, *, is_right: bool) -> None:
        """One more is graded."""
        with self._lock:
            self._graded, self._right = self._graded + 1, self._right + is_right

    def note(self, text: str) -> None:
        """A line of plain text."""
        if self._enabled and self._bars is None and self._say is not None:
            self._say(text)
        elif self._enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """The end."""
        if self._bars is not None:
            self._bars.stop()

    @property
    def rest(self) -> str:
        """Rate, time left, and the share of right ones so far."""
        seconds = max(1e-9, self._clock() - self._began)
        left = "-"
        if self._replies:
            whole = round(seconds / self._replies * (self._total - self._replies))
            left = f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
        right = f"  right {self._right / self._graded:.1%}" if self._graded else ""
        return f"{self._tokens / seconds:,.0f} tok/s  ETA {left}{right}"

    def _show(self) -> None:
        clock = self._clock()
        if not self._enabled or clock - self._told < (0.5 if self._bars else LINE_SECONDS):
            return
        self._told = clock
        if self._bars is not None:
            self._bars.update(self._task, rest=self.rest)
        else:
            self.note(f"draw {self._replies:,}/{self._total:,}  {self.rest}")
