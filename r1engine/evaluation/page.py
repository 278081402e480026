"""One self-contained HTML page of one or several evaluations: scores, differences, lengths, the replies. No torch.

Of private benchmarks the page holds numbers and letters, no text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from r1engine.config import ConfigError
from r1engine.evaluation.afterwards import scores_in, stored_summary
from r1engine.evaluation.compare import paired
from r1engine.evaluation.results import Summary
from r1engine.evaluation.show import mean_tokens, papers, points, share, vote
from r1engine.evaluation.store import Store
from r1engine.observe.charts import Chart, Group, chart_layout
from r1engine.observe.figures import COLORS, GREY
from r1engine.observe.packed import packed
from r1engine.observe.page import charted, compact_json, render

TEXT_BYTES = 24_000_000  # of replies in a page: a browser opens that at once
TEXT_CHARACTERS = 40_000  # of one reply, half from its beginning and half from its end
BINS = 20  # of the lengths of replies
HEAD = ("benchmark", "evaluation", "metric", "n x k", "score", "cons", "undecided", "truncated", "unread", "tokens")


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
    titles = [f"{number}: {one['target']}" for number, one in enumerate(summaries, 1)]
    whole = f"Evaluation of {summaries[0]['target']}" if len(outs) == 1 else f"{len(outs)} evaluations"
    groups: list[Group] = [("", [score_chart(names, titles, summaries)])]
    groups += [(_title(name, summaries), _charts(name, titles, outs, summaries)) for name in names]
    text = render(
        "evaluation.html",
        whole,
        facts=[(title, str(out)) for title, out in zip(titles, outs, strict=True)],
        tables=[_results(names, summaries), *_differences(outs)],
        replies=packed(compact_json(_replies(names, outs, summaries))),
        **charted([group for group in groups if group[1]]),
    )
    try:
        path.write_text(text, encoding="utf-8", errors="replace")  # a reply can hold half a surrogate pair
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _title(name: str, summaries: list[dict[str, Any]]) -> str:
    first = next(one["benchmarks"][name] for one in summaries if name in one["benchmarks"])
    note = "; private: this page holds no text of it" if first.get("private") else ""
    return f"{name}: {first['title']} ({first['metric']}{note})"


def _results(names: Sequence[str], summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """A row a benchmark and evaluation; columns that would say nothing are left out."""
    rows = [
        [name, str(number), *_cells(one["benchmarks"][name])]
        for name in names
        for number, one in enumerate(summaries, 1)
        if name in one["benchmarks"]
    ]
    kept = [i for i in range(len(HEAD)) if any(row[i] not in ("", "-", "0") for row in rows)]
    return {
        "title": "Scores, with half of the 95 % interval over questions",
        "head": [HEAD[i] for i in kept],
        "rows": [[row[i] for i in kept] for row in rows],
    }


def _cells(found: Summary) -> list[str]:
    undecided = found.get("undecided") or {"count": 0}
    return [
        found["metric"],
        f"{found['questions']:,} x {found['samples']}",
        points(found.get("score")),
        vote(found),
        str(undecided["count"]),
        share(found.get("truncated")),
        share(found.get("unread")),
        mean_tokens(found),
    ]


def score_chart(names: Sequence[str], titles: Sequence[str], summaries: list[dict[str, Any]]) -> Chart:
    """The score of each evaluation with its interval, a line a benchmark, and the scores of the paper's models."""
    data, rows = [], dict(zip(reversed(names), range(len(names)), strict=True))
    for number, (title, one, color) in enumerate(zip(titles, summaries, cycle(COLORS), strict=False)):
        scored = [(name, one["benchmarks"][name]["score"]) for name in names if name in one["benchmarks"]]
        known = [(name, score) for name, score in scored if score is not None]
        above = 0.5 * (number + 1) / (len(titles) + 1)  # the first on top, half a line for all
        error = {"type": "data", "symmetric": False, "thickness": 2, "width": 0}
        error["array"] = [100 * (score["high"] - score["mean"]) for _, score in known]
        error["arrayminus"] = [100 * (score["mean"] - score["low"]) for _, score in known]
        x, y = [100 * score["mean"] for _, score in known], [rows[name] + 0.25 - above for name, _ in known]
        dots = {"type": "scatter", "mode": "markers", "name": title, "x": x, "y": y, "error_x": error}
        data.append(dots | {"marker": {"color": color, "size": 9}, "hovertemplate": "%{x:.1f}"})
    kinds = {name: one["benchmarks"][name].get("kind", name) for one in summaries for name in one["benchmarks"]}
    theirs = [(model, x, rows[name]) for name in names for model, x in papers(kinds[name]).items() if x <= 100]
    if theirs:
        models, x, y = (list(column) for column in zip(*theirs, strict=True))
        ticks = {"type": "scatter", "mode": "markers", "name": "the paper's models", "x": x, "y": y, "text": models}
        marker = {"color": GREY, "symbol": "line-ns-open", "size": 14}
        data.append(ticks | {"marker": marker, "hovertemplate": "%{text} %{x:.1f}"})
    axis = {"tickvals": list(rows.values()), "ticktext": list(rows), "zeroline": False, "automargin": True}
    axis |= {"range": [-0.6, len(rows) - 0.4]}
    layout = chart_layout(axis, "points, with the 95 % interval")
    layout["xaxis"] |= {"range": [-3, 103]}
    layout |= {"hovermode": "closest", "height": 190 + 46 * len(rows)}
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    return {"title": "Scores", "data": data, "layout": layout}


def _charts(name: str, titles: Sequence[str], outs: Sequence[Path], summaries: list[dict[str, Any]]) -> list[Chart]:
    """Of a benchmark: lengths of the replies, and the questions of the first two evaluations that have it."""
    found = [i for i, one in enumerate(summaries) if name in one["benchmarks"]]
    lengths = {titles[i]: _lengths(outs[i], name) for i in found}
    charts = [_length_chart(lengths, titles)] if any(lengths.values()) else []
    if len(found) > 1:
        first, second = (scores_in(outs[i], name) for i in found[:2])
        charts.append(question_chart(first, second, *(titles[i] for i in found[:2])))
    return charts


def _lengths(out: Path, name: str) -> list[tuple[int, bool]]:
    """Tokens of each reply, and whether the limit cut it."""
    lines = Store(out).replies(name).values()
    return [(line.tokens, line.finish == "length") for line in lines if line.tokens is not None]


def question_chart(first: dict[str, float], second: dict[str, float], x: str, y: str) -> Chart:
    """The score of each question in two evaluations; a dot grows with the questions that share it."""
    counts = Counter((score, second[question]) for question, score in first.items() if question in second)
    at = {"x": [x for x, _ in counts], "y": [y for _, y in counts]}
    sizes = [6 + 4 * count**0.5 for count in counts.values()]
    dots: Chart = {"type": "scatter", "mode": "markers", "name": "questions", "text": list(counts.values()), **at}
    dots |= {"marker": {"color": COLORS[0], "size": sizes, "opacity": 0.5}, "hovertemplate": "%{text} questions"}
    line: Chart = {"type": "scatter", "mode": "lines", "name": "equal", "x": [0, 1], "y": [0, 1], "hoverinfo": "skip"}
    axis = {"title": {"text": y}, "range": [-0.06, 1.06]}
    layout = chart_layout(axis, x) | {"hovermode": "closest", "showlegend": False}
    layout["xaxis"] |= {"range": [-0.06, 1.06]}
    data = [line | {"line": {"color": GREY, "dash": "dash", "width": 1}}, dots]
    return {"title": "Score of each question", "data": data, "layout": layout}


def _length_chart(lengths: dict[str, list[tuple[int, bool]]], titles: Sequence[str]) -> Chart:
    """Histograms of the tokens of a reply in steps; dotted: of those that the limit cut."""
    width = max(1, -(-(max(tokens for of in lengths.values() for tokens, _ in of) + 1) // BINS))
    edges, data = [width * i for i in range(BINS + 1)], []
    for title, of in lengths.items():
        color = COLORS[list(titles).index(title) % len(COLORS)]
        for what, dash, found in (
            ("", "solid", [tokens for tokens, _ in of]),
            (", cut", "dot", [tokens for tokens, is_cut in of if is_cut]),
        ):
            if not found:
                continue
            counts = Counter(tokens // width for tokens in found)
            y = [counts[i] for i in range(BINS)]
            steps = {"type": "scatter", "mode": "lines", "name": title + what, "x": edges, "y": [*y, y[-1]]}
            data.append(steps | {"line": {"color": color, "dash": dash, "shape": "hv", "width": 2}})
    layout = chart_layout({"title": {"text": "replies"}, "rangemode": "tozero"}, "tokens of a reply")
    return {"title": "Lengths of the replies", "data": data, "layout": layout}


def _differences(outs: Sequence[Path]) -> list[dict[str, Any]]:
    rows = []
    for number, out in enumerate(outs[1:], start=2):
        for found in paired(outs[0], out):
            d = found.difference
            interval = f"{100 * d.low:+.1f} to {100 * d.high:+.1f}"
            tested = [f"{found.p:.3g}", f"{found.adjusted:.3g}"]
            rows.append([found.benchmark, str(number), f"{100 * d.mean:+.1f}", interval, *tested])
    head = ["benchmark", "evaluation", "difference", "95 % interval", "p", "p (Holm)"]
    title = "Differences to the first, over the questions that both have"
    return [{"title": title, "head": head, "rows": rows}] if rows else []


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
