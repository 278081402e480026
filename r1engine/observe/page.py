"""Self-contained HTML pages of the templates beside it; text that they are given is escaped."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1engine.observe.charts import Group
from r1engine.observe.packed import packed, packed_plotly

if TYPE_CHECKING:
    from jinja2 import Environment

_NUMERIC = re.compile(r"[-+]?[\d.,]+( ?%|e-?\d+| \u00b1 [\d.]+)?|-|\u2013|")


def page(title: str, groups: list[Group], **parts: Any) -> str:
    """A page of templates/report.html: a run, a comparison, a plan, a search.

    Args:
        title:  of the page.
        groups: of charts.
        parts:  of the template: facts (name, value), headlines, tables, details, details_title, samples (packed
            JSON), samples_note, refresh_seconds; what is left out is not shown.
    """
    defaults: dict[str, Any] = dict.fromkeys(("headlines", "tables", "details"), ())
    defaults |= {"samples": "", "samples_note": "", "details_title": "How it was run"}
    return render("report.html", title, **(defaults | charted(groups) | parts))


def render(template: str, title: str, **values: Any) -> str:
    """A page of a template in templates/, all of which extend base.html.

    Args:
        template: its file name.
        title:    of the page.
        values:   what it shows; `facts` and `refresh_seconds` of base.html may be left out.
    """
    return (
        _environment().get_template(template).render(**({"facts": (), "refresh_seconds": None} | values), title=title)
    )


def charted(groups: list[Group]) -> dict[str, Any]:
    """What `charts_of` of templates/parts.html takes: titles in groups, and the charts and plotly, packed."""
    charts = [chart for _, group in groups for chart in group]
    numbers = iter(range(len(charts)))
    return {
        "groups": [
            {
                "title": name,
                "charts": [
                    {"title": chart["title"], "height": chart["layout"]["height"], "number": next(numbers)}
                    for chart in group
                ],
            }
            for name, group in groups
        ],
        "charts": packed(compact_json([{"data": chart["data"], "layout": chart["layout"]} for chart in charts])),
        "plotly": packed_plotly() if charts else "",
    }


def compact_json(value: object) -> str:
    """JSON in ASCII, without blanks."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).with_name("templates")
    environment = Environment(autoescape=True, undefined=StrictUndefined, loader=FileSystemLoader(folder))
    environment.tests["numeric"] = lambda cell: _NUMERIC.fullmatch(str(cell)) is not None
    return environment
