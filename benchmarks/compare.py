"""Two files of rows side by side: what became faster, what slower, and where the quartiles say that it is noise.

    python benchmarks/bench_logprob_entropy.py --json > before.json
    python benchmarks/bench_logprob_entropy.py --json > after.json
    python benchmarks/compare.py before.json after.json

Rows belong together if benchmark, row and everything else that is no measurement (sizes, dtypes, settings) are equal.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from table import duration

MEASURED = ("median", "q1", "q3", "rounds", "device", "threads", "versions", "date")
Key = tuple[tuple[str, object], ...]


def read(path: Path) -> dict[Key, dict]:
    """What identifies a row -> the row; of two that are alike the later.

    Raises:
        ValueError: a line is no row; with file and line.
    """
    rows = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or "row" not in row:
            raise ValueError(f"{path}:{number}: found {line[:40]!r}, required a line of --json")
        if "median" in row:
            key = {k: v for k, v in row.items() if k not in MEASURED and not isinstance(v, float)}
            rows[tuple(sorted(key.items(), key=str))] = row
    return rows


def compared(before: dict[Key, dict], after: dict[Key, dict]) -> list[str]:
    """A line for each row that both files have, the largest change first; then what only one has."""
    lines = []
    both = [key for key in after if key in before]
    for key in sorted(both, key=lambda key: after[key]["median"] / before[key]["median"]):
        old, new = before[key], after[key]
        is_noise = max(old["q1"], new["q1"]) <= min(old["q3"], new["q3"])
        about = " ".join(f"{k}={v}" for k, v in key if k not in ("benchmark", "row"))
        lines.append(
            f"{new['median'] / old['median']:6.3f}x  {duration(old['median']):>8} -> {duration(new['median']):>8}  "
            f"{'within the quartiles  ' if is_noise else ''}{new.get('benchmark', '')} {new['row']}  {about}".rstrip()
        )
    for which, one, other in (("first", before, after), ("second", after, before)):
        lines += [
            f"only in the {which}: {one[key].get('benchmark', '')} {one[key]['row']}" for key in one if key not in other
        ]
    devices = {f"{row['device']}, {row['threads']} threads" for row in [*before.values(), *after.values()]}
    if len(devices) > 1:
        lines.insert(0, f"measured on different machines: {'; '.join(sorted(devices))}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    try:
        lines = compared(read(args.before), read(args.after))
    except (OSError, ValueError) as error:
        sys.exit(f"compare: {error}")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
