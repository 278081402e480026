"""One self-contained HTML page of one or several evaluations: whiskers, scatter, histograms, the replies. No torch.

Of private benchmarks the page holds numbers and letters, no text.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1engine.config import ConfigError
from r1engine.evaluation.afterwards import scores_in, stored_summary
from r1engine.evaluation.compare import paired
from r1engine.evaluation.results import Summary
from r1engine.evaluation.show import mean_tokens, papers, points, share, vote
from r1engine.evaluation.store import Store
from r1engine.observe.report import embedded_json

TEMPLATE = Path(__file__).parent / "page_template.html"
TEXT_BYTES = 24_000_000  # of replies in a page: a browser opens that at once
TEXT_CHARACTERS = 40_000  # of one reply, half from its beginning and half from its end
COLORS = ("#1f6feb", "#d1242f", "#2da44e", "#8250df", "#bf8700", "#57606a")
WIDTH, ROW = 560, 22  # of the whiskers' picture, in CSS pixels
BINS = 20


def write_page(outs: Sequence[Path], path: Path | None = None) -> Path:
    """Writes the page.

    Args:
        outs: folders of evaluations; the first is what the others are compared with.
        path: of the page; None: report.html of the first.

    Raises:
        ConfigError: a folder is no evaluation that has come to its end, or two cannot be compared.
    """
    path = path or outs[0] / "report.html"
    summaries = [stored_summary(out) for out in outs]
    names = list(dict.fromkeys(name for one in summaries for name in one["benchmarks"]))
    sections = [_section(name, outs, summaries) for name in names]
    head = "".join(
        f'<p><b style="color:{COLORS[i % len(COLORS)]}">&#9632;</b> {html.escape(one["target"])} '
        f"<small>{html.escape(str(out))}</small></p>"
        for i, (out, one) in enumerate(zip(outs, summaries, strict=True))
    )
    data = embedded_json(_replies(names, outs, summaries))
    text = TEMPLATE.read_text(encoding="utf-8")
    for mark, value in (("HEAD", head), ("SECTIONS", _differences(outs) + "".join(sections)), ("DATA", data)):
        text = text.replace(f"<!--{mark}-->", value)
    try:
        path.write_text(text, encoding="utf-8", errors="replace")  # a reply can hold half a surrogate pair
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _section(name: str, outs: Sequence[Path], summaries: list[dict[str, Any]]) -> str:
    found = [(i, one["benchmarks"][name]) for i, one in enumerate(summaries) if name in one["benchmarks"]]
    first = found[0][1]
    rows = "".join(_row(i, summary) for i, summary in found)
    table = (
        "<table><tr><th><th>n x k<th>score<th>cons<th>undecided<th>truncated<th>unread<th>mean tokens</tr>"
        f"{rows}</table>"
    )
    private = "<p>Private: this page holds no text of it.</p>" if first.get("private") else ""
    pictures = whiskers(found, papers(first.get("kind", name)))
    if len(found) > 1:
        pictures += scatter(*(scores_in(outs[i], name) for i, _ in found[:2]))
    lengths = "".join(_lengths(i, name, outs[i]) for i, _ in found)
    title = html.escape(f"{name}: {first['title']} ({first['metric']})")
    return f"<h2>{title}</h2>{private}{table}<div class=row>{pictures}{lengths}</div>"


def _row(index: int, found: Summary) -> str:
    undecided = found.get("undecided") or {"count": 0}
    cells = [
        f"{found['questions']:,} x {found['samples']}",
        points(found.get("score")),
        vote(found),
        str(undecided["count"]),
        share(found.get("truncated")),
        share(found.get("unread")),
        mean_tokens(found),
    ]
    color = COLORS[index % len(COLORS)]
    return f'<tr><td style="color:{color}">&#9632;' + "".join(f"<td>{cell}" for cell in cells) + "</tr>"


def whiskers(found: Sequence[tuple[int, Summary]], theirs: dict[str, float]) -> str:
    """A picture: the score of each evaluation with its interval, and a tick for each model of the paper.

    Args:
        found:  number of the evaluation, its summary of the benchmark.
        theirs: model -> the paper's score in points.
    """
    height = ROW * (len(found) + 2)
    parts = []
    for row, (index, summary) in enumerate(found):
        score, y, color = summary.get("score"), ROW * (row + 0.7), COLORS[index % len(COLORS)]
        if score is not None:
            low, mean, high = (score[key] * WIDTH for key in ("low", "mean", "high"))
            parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="2"/>')
            parts.append(f'<circle cx="{mean:.1f}" cy="{y}" r="4" fill="{color}"/>')
    base = ROW * (len(found) + 0.7)
    for model, value in theirs.items():
        if value <= 100:
            x = value / 100 * WIDTH
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{base}" stroke="#999" stroke-dasharray="2 3">'
                f"<title>{html.escape(model)} {value:g}</title></line>"
            )
    for tick in range(0, 101, 20):
        parts.append(f'<text x="{tick / 100 * WIDTH:.1f}" y="{base + ROW}" font-size="11">{tick}</text>')
    return f'<svg viewBox="-10 0 {WIDTH + 30} {height}" width="{WIDTH}">{"".join(parts)}</svg>'


def scatter(first: dict[str, float], second: dict[str, float]) -> str:
    """A picture: the score of each question in two evaluations."""
    size = 240
    points_of = Counter((score, second[question]) for question, score in first.items() if question in second)
    dots = "".join(
        f'<circle cx="{x * size:.1f}" cy="{size - y * size:.1f}" r="{2 + count**0.5:.1f}" fill="{COLORS[0]}" '
        f'fill-opacity="0.4"><title>{count} questions</title></circle>'
        for (x, y), count in points_of.items()
    )
    axis = f'<line x1="0" y1="{size}" x2="{size}" y2="0" stroke="#ccc"/>'
    frame = f'<rect width="{size}" height="{size}" fill="none" stroke="#ccc"/>'
    return f'<svg viewBox="-12 -12 {size + 24} {size + 24}" width="{size}">{frame}{axis}{dots}</svg>'


def _lengths(index: int, name: str, out: Path) -> str:
    """A histogram of the tokens of a reply, those that were cut in grey."""
    lines = [line for line in Store(out).replies(name).values() if line.tokens is not None]
    if not lines:
        return ""
    most = max(1, *(line.tokens or 0 for line in lines))
    counts = [[0, 0] for _ in range(BINS)]
    for line in lines:
        counts[min(BINS - 1, (line.tokens or 0) * BINS // most)][line.finish == "length"] += 1
    tallest, bars = max(sum(pair) for pair in counts), []
    for number, (ended, cut) in enumerate(counts):
        x, up, grey = number * 12, 100 * ended / tallest, 100 * cut / tallest
        color = COLORS[index % len(COLORS)]
        bars.append(f'<rect x="{x}" y="{100 - up:.1f}" width="10" height="{up:.1f}" fill="{color}"/>')
        bars.append(f'<rect x="{x}" y="{100 - up - grey:.1f}" width="10" height="{grey:.1f}" fill="#999"/>')
    label = f'<text y="116" font-size="11">tokens, to {most:,}; grey: cut</text>'
    return f'<svg viewBox="0 0 240 120" width="240">{"".join(bars)}{label}</svg>'


def _differences(outs: Sequence[Path]) -> str:
    rows = ""
    for number, out in enumerate(outs[1:], start=1):
        for found in paired(outs[0], out):
            d = found.difference
            rows += (
                f'<tr><td style="color:{COLORS[number % len(COLORS)]}">&#9632;<td>{html.escape(found.benchmark)}'
                f"<td>{100 * d.mean:+.1f}<td>{100 * d.low:+.1f} to {100 * d.high:+.1f}<td>{found.p:.3g}"
                f"<td>{found.adjusted:.3g}</tr>"
            )
    if not rows:
        return ""
    head = "<tr><th><th>benchmark<th>difference<th>95 %<th>p<th>p (Holm)</tr>"
    return f"<h2>Differences to the first, over the questions that both have</h2><table>{head}{rows}</table>"


def _replies(names: Sequence[str], outs: Sequence[Path], summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the browser of replies shows, as much as a page may hold; of private benchmarks no text."""
    rows, left = list[dict[str, Any]](), TEXT_BYTES
    for name in names:
        for index, (out, one) in enumerate(zip(outs, summaries, strict=True)):
            if name not in one["benchmarks"]:
                continue
            is_private = bool(one["benchmarks"][name].get("private"))
            replies = {} if is_private else Store(out).replies(name)
            for key, grade in Store(out).grades(name).items():
                text = shortened(replies[key].text) if key in replies else ""
                left -= len(text) + 100
                if left < 0:
                    return rows
                answer, reason = (None, "") if is_private else (grade.answer, grade.reason)
                verdict = "unread" if grade.answer is None and grade.verdict == "wrong" else grade.verdict
                rows.append({"b": name, "o": index, "q": grade.q, "s": grade.s, "v": verdict, "a": answer,
                             "r": reason, "t": text})  # fmt: skip
    return rows


def shortened(text: str) -> str:
    """A text without its middle, where it is very long."""
    if len(text) <= TEXT_CHARACTERS:
        return text
    half = TEXT_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
