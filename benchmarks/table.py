"""Rows of benchmarks as a table for the terminal. Where and with what they were measured stands once, above it."""

from __future__ import annotations

ABOUT = ("device", "threads", "versions", "date")  # of the machine, the same in every row of a run
HIDDEN = ("benchmark", "q1", "q3", "rounds")  # in the JSON; the quartiles stand beside the median


class Table:
    """Prints one row at a time: the headings again only where a row has other columns."""

    def __init__(self) -> None:
        self._columns: tuple[str, ...] = ()
        self._about: object = None

    def add(self, row: dict[str, object]) -> str:
        """The lines for a row."""
        lines = []
        about = {name: row[name] for name in ABOUT if name in row}
        if about != self._about:
            self._about, versions = about, about.get("versions")
            packages = " ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else ""
            plain = ", ".join(f"{k} {v}" for k, v in about.items() if k != "versions")
            lines.append(f"{row.get('benchmark', '')}: {plain}; {packages}")
        shown = {k: v for k, v in row.items() if k not in (*ABOUT, *HIDDEN)}
        if tuple(shown) != self._columns:
            self._columns = tuple(shown)
            lines += ["", "  ".join(_cell(k, k) for k in shown)]
        lines.append("  ".join(_cell(k, _value(k, v, row)) for k, v in shown.items()))
        return "\n".join(lines)


def _cell(column: str, text: str) -> str:
    width = {"row": 28, "median": 30}.get(column, max(10, len(column)))
    return f"{text:<{width}}" if column in ("row", "median") else f"{text:>{width}}"


def _value(column: str, value: object, row: dict[str, object]) -> str:
    if column == "median" and isinstance(value, float):
        low, high = row.get("q1"), row.get("q3")
        spread = f" ({duration(low)} to {duration(high)})" if isinstance(low, float) and isinstance(high, float) else ""
        return duration(value) + spread
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """In the unit that has one to three digits before the point."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
