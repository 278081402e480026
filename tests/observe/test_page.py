"""The pages as a browser shows them, what they hold of a run, the comparison of runs, and the report of a run that
goes on."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.config import RlConfig
from r1engine.evaluation.page import question_chart, score_chart
from r1engine.observe.charts import MOST_POINTS, chart_groups, thinned
from r1engine.observe.live import LiveReport
from r1engine.observe.packed import packed, unpacked
from r1engine.observe.page import charted, compact_json, page, render
from r1engine.observe.report import write_comparison, write_report
from r1engine.observe.starts import record_start

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>addEventListener("load", async () => {
  if (document.getElementById("charts")) await Promise.all([drawing, typeof begun === "undefined" ? null : begun]);
  const tokens = document.getElementById("tokens");
  if (tokens) {
    tokens.checked = true;
    tokens.dispatchEvent(new Event("input"));
  }
  dispatchEvent(new Event("beforeprint"));
  const found = JSON.stringify({
    wide: document.documentElement.scrollWidth, window: document.documentElement.clientWidth,
    charts: document.querySelectorAll(".chart .main-svg").length,
    cards: document.querySelectorAll("#samples article").length,
    page: getComputedStyle(document.body).backgroundColor,
    group: document.querySelectorAll("#samples .group .badge").length,
    tokens: [...document.querySelectorAll("#samples pre span[title]")].map((one) => one.textContent + " " + one.title),
  });
  if (parent === window) document.title = found; else parent.postMessage(found, "*");
});</script></body>"""


def metrics_row(step: int, **more: float) -> dict:
    return {
        "step": step, "tokens_generated": 100, "reward/mean": 0.5, "reward/std": 0.25, "reward/accuracy": step / 40,
        "reward/close": 0.25, "groups/without_signal": 0.5, "groups/all_right": 0.25, "groups/all_wrong": 0.25,
        "completion/length_mean": 40.0 + step, "loss": 0.1, "kl": 0.01, "entropy": 1.0, "lr": 1e-6, "grad_norm": 0.5,
        "logp_ratio/0.9-1.1": 1.0, "gpu/power": 300.0, "seconds/generate": 1.0, "seconds/total": 2.0, "strange": 3.0,
        "tokens_per_second": 50.0,
        **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "run"
    folder.mkdir()
    rows = [{"step": 0, "eval/pass_at_1": 0.1}, *map(metrics_row, range(1, 31)), {"step": 30, "eval/pass_at_1": 0.6}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    group = [{"verdict": "right", "reward": 1.0, "length": 9}, {"verdict": "undecided", "reward": None, "length": 12}]
    tokens = {"token_characters": [1, 0, 1, 4, 0], "token_percent": [100, 40, 99, 7, 55]}
    sample = {
        "step": 30, "prompt": "p", "question": "q" * 300, "answer": "2", "completion": "a\U0001f600</b>",
        "reason": "6 is not 5", "verdict": "wrong", "reward/accuracy": 0.0, "advantage": -0.5, "group": group, **tokens,
    }  # fmt: skip
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    record_start(RlConfig(run_dir=folder, seed=7), step=0, ranks=2)
    return folder


def test_every_series_of_a_run_is_drawn_in_its_group(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    groups = chart_groups(rows[1:-1])
    assert [title for title, _ in groups] == ["", "Rewards", "Optimization", "Lengths and speed", "Further series"]
    titles = {chart["title"]: chart for _, charts in groups for chart in charts}
    for title in ("Total reward", "Questions without a signal", "Loss", "KL to the reference", "Entropy of the policy"):
        assert titles[title]["data"], title
    further = "Further components of the reward"
    assert {"The first rank's GPU", further, "strange"} <= titles.keys()
    assert [trace["name"] for trace in titles[further]["data"]] == ["close", "close"]  # pale, and smoothed
    assert sum(bool(chart["data"]) for _, charts in groups for chart in charts) == 16


def test_the_page_says_how_the_run_was_made(run):
    text = html.unescape(write_report(run).read_text())
    starts = json.loads((run / "provenance.json").read_text())["starts"]
    for words in ("seed: 7", "2 ranks", starts[0]["host"], starts[0]["versions"]["torch"], "start 1: "):
        assert words in text, words
    assert 'http-equiv="refresh"' not in text


def test_a_page_of_a_run_that_goes_on_loads_itself_again(run):
    page = write_report(run, refresh_seconds=30)
    assert '<meta http-equiv="refresh" content="30">' in page.read_text()


def test_long_lines_are_thinned_to_means():
    steps, values = thinned([float(i) for i in range(1, 10_401)], [float(i) for i in range(1, 10_401)])
    assert len(steps) <= MOST_POINTS and steps[-1] == 10_400.0
    assert values[0] == 13.5 and steps[0] == 26.0  # the mean of 1 .. 26
    assert thinned([1.0, 2.0], [0.123456789, 1.0]) == ([1.0, 2.0], [0.1235, 1.0])


def test_runs_are_compared_with_what_differs(run, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    shutil.rmtree(other / "none", ignore_errors=True)
    (other / "config.yaml").write_text((run / "config.yaml").read_text().replace("seed: 7", "seed: 8"))
    done = CliRunner().invoke(app, ["report", str(run), str(other), "--out", str(tmp_path / "both.html")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "both.html").read_text().replace(' class="numeric"', "")
    assert "<td>seed</td><td>7</td><td>8</td>" in text and "<td>Held-out pass@1</td><td>60.0%</td>" in text
    charts = json.loads(unpacked(re.search(r'id="charts">(.*?)</script>', text)[1]))
    assert all({trace["name"] for trace in chart["data"]} == {"run", "other"} for chart in charts) and len(charts) > 15
    with pytest.raises(ValueError, match="required folders of different runs"):
        write_comparison([run, run], tmp_path / "x.html")


def test_a_report_is_begun_when_it_is_time_and_ended_with_the_run(run, monkeypatch):
    begun = []

    class Begun(subprocess.Popen):
        def __init__(self, command, **options):
            begun.append((command, options["env"]))
            super().__init__([sys.executable, "-c", "import time; time.sleep(1000)"])

    clock = iter([0.0, 5.0, 10.0, 11.0, 500.0])
    monkeypatch.setattr("r1engine.observe.live.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("r1engine.observe.live.subprocess.Popen", Begun)
    monkeypatch.setenv("WORLD_SIZE", "8")
    live = LiveReport(run, every_seconds=10)
    for number in (0, 1, 1, 1):  # at 5 s, 10 s, 11 s; then the first one has not ended yet
        live.tick()
        assert len(begun) == number
    assert begun[0][0][3:] == ["report", str(run), "--live", "10"] and "WORLD_SIZE" not in begun[0][1]
    process = live._process
    live.close()
    assert process.poll() is not None


def other_pages() -> dict[str, str]:
    """One of each template beside the run's, with names that are longer than a phone is wide."""
    long, table = "a_name_" * 20, {"title": "t", "head": ["", "x" * 60], "rows": [["y" * 60, "1.5"]]}
    score = {"mean": 0.5, "low": 0.4, "high": 0.7}
    charts = [("", [score_chart([long], [long], [{"benchmarks": {long: {"score": score}}}])])]
    charts.append((long, [question_chart({"q": 1.0}, {"q": 0.5}, long, long)]))
    reply = {"b": long, "o": 0, "q": long, "s": 0, "v": "wrong", "a": long, "r": long, "t": long}
    replies = packed(compact_json([reply]))
    bar = {"name": long[:40], "title": "math 1", "count": 1, "percent": 50.0, "before": 50.0}
    stage = {"name": "tiny", "kind": "tiny", "page": None, "is_done": True, "seconds": "1 s", "told": long}
    graph = {"width": 200, "height": 30, "arcs": [], "dots": [{"y": 15, "is_done": True}]}
    parts = [{"title": long, "blocks": [{"text": long}, table | {"text": ""}], "bars": [bar]}]
    reasons = [{"name": long, "rows": [{"source": long, "detail": long, "text": long}]}]
    return {
        "evaluation": render("evaluation.html", long, tables=[table], replies=replies, **charted(charts)),
        "curate": render("curate.html", long, bars=[bar], table=table, reasons=reasons),
        "pipeline": render("pipeline.html", long, graph=graph, stages=[stage], parts=parts),
        "report": page(
            long, charts, headlines=[{"name": long, "old": "1,234,567.0", "new": "1,234,567.0", "where": long}]
        ),
    }


@pytest.mark.rotating
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("name", ["evaluation", "curate", "pipeline", "report"])
def test_the_other_pages_fit_a_phone(name, tmp_path):
    (tmp_path / "page.html").write_text(other_pages()[name])
    found = shown(tmp_path / "page.html", tmp_path, width=390)
    assert found["wide"] == found["window"] <= 390
    assert found["cards"] == (name == "evaluation") and found["charts"] >= 2 * found["cards"]


def shown(page: Path, tmp_path: Path, *options: str, width: int | None = None) -> dict:
    """What the probe finds in the page, with every chart drawn; `width`: in a frame, as windows have a least width."""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE))
    if width is not None:
        frame = f'<iframe src="probed.html" style="width: {width}px; height: 844px; border: 0"></iframe>'
        script = '<script>addEventListener("message", (event) => { document.title = event.data; })</script>'
        probed = tmp_path / "frame.html"
        probed.write_text(f"<!DOCTYPE html><title></title>{script}{frame}")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", *options]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [*command, profile, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=240
    )
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_the_page_wide_narrow_and_dark(run, tmp_path):
    page = write_report(run)
    charts = page.read_text().count('class="chart"')
    wide = shown(page, tmp_path, "--window-size=1440,900")
    assert (wide["wide"], wide["cards"], wide["group"]) == (wide["window"], 1, 2)
    assert wide["charts"] >= charts > 15
    assert wide["tokens"] == ["a 100 %", "\U0001f600 99 %", "</b> 7 %", "\u2402 55 %"]
    dark = shown(
        page, tmp_path, "--window-size=390,844", "--force-dark-mode", "--blink-settings=preferredColorScheme=0"
    )
    assert dark["wide"] == dark["window"] < 600
    assert dark["page"] == "rgb(20, 25, 31)" and wide["page"] == "rgb(245, 247, 249)"
