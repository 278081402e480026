"""The report draws whatever a run has logged so far, and text of the model stays text."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from r1engine.evaluation.ratings import shown
from r1engine.observe import figures, report
from r1engine.observe.charts import chart_groups, line_chart
from r1engine.observe.packed import packed, unpacked
from r1engine.observe.rated import Ratings, rated_charts
from r1engine.observe.report import write_report

ATTACK = "</script><script>alert(1)</script><!-- <b>%%@PLOTLY@%%\u2028"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(step, **more):
    return {
        "step": step,
        "tokens_generated": 100,
        "reward/accuracy": step / 100,
        "reward/format": 0.5,
        "completion/length_mean": 40.0 + step,
        "logp_diff/mean": 1e-6,
        "logp_diff/max": 1e-5,
        "seconds/generate": 1.0,
        "seconds/total": 2.0,
        **more,
    }


def sample(step, **more):
    return {"step": step, "prompt": "p", "question": "q", "answer": "2", "completion": "c", "advantage": 0.5, **more}


class Scripts(HTMLParser):
    """The script elements of a page, as a browser splits them."""

    def __init__(self):
        super().__init__()
        self.scripts, self.inside, self.sources = [], None, []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag == "script":
            self.inside = (dict(attrs), [])

    def handle_data(self, data):
        if self.inside:
            self.inside[1].append(data)

    def handle_endtag(self, tag):
        if tag == "script":
            self.scripts.append((self.inside[0], "".join(self.inside[1])))
            self.inside = None


def parse(page):
    parser = Scripts()
    parser.feed(page.read_text())
    parser.close()
    return parser


def embedded(page, name="data"):
    (text,) = [text for attrs, text in parse(page).scripts if attrs.get("id") == name]
    return unpacked(text) if name == "plotly" else json.loads(unpacked(text))


def names_in(page):
    """Of the curves and bars."""
    return {trace.get("name") for chart in embedded(page, "charts") for trace in chart["data"]}


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("full")
    rows = [row(step) for step in range(1, 31)]
    rows.insert(0, {"step": 0, "eval/pass_at_1": 0.125, "eval/format": 0.25, "eval/length_mean": 30.0})
    rows.append({"step": 30, "eval/pass_at_1": 0.75, "eval/format": 1.0, "eval/length_mean": 60.0})
    write_lines(run_dir / "metrics.jsonl", rows)
    write_lines(run_dir / "samples.jsonl", [sample(1, completion=ATTACK, question=ATTACK), sample(30)])
    (run_dir / "summary.json").write_text(
        json.dumps({"seconds": 90.0, "note": "<i>x</i>", "pass_at_1_after": 0.75, "peak_rss_gb": 0.5, "steps": 30})
    )
    return run_dir, write_report(run_dir)


def test_the_page_has_the_names_of_the_papers_figures(full_run):
    run_dir, page = full_run
    assert page == run_dir / "report.html"
    text = page.read_text()
    assert "Figure 2 of the paper: accuracy during training" in text
    assert "Figure 3 of the paper: mean response length during training" in text


def test_the_headlines_are_the_first_and_the_last_evaluation(full_run):
    text = full_run[1].read_text()
    assert '<span class="old">12.5%</span>' in text and '<span class="new">75.0%</span>' in text
    assert '<span class="old">30.0</span>' in text and '<span class="new">60.0</span>' in text
    assert "step 0 \N{RIGHTWARDS ARROW} step 30" in text
    assert "wall time <b>1.5 min</b>" in text and "peak memory (GB) <b>0.5</b>" in text and text.count("steps <b>") == 1
    assert "tokens generated <b>3,000</b>" in text


def test_a_completion_cannot_start_a_script(full_run):
    page = full_run[1]
    assert embedded(page)[0]["completion"] == ATTACK  # whole, as data
    assert not any(text.startswith("alert(1)") for _, text in parse(page).scripts)
    assert "<script>alert" not in page.read_text()
    assert "&lt;i&gt;x&lt;/i&gt;" in page.read_text()  # nor can summary.json


def test_the_page_needs_no_network(full_run):
    parser = parse(full_run[1])
    assert parser.sources == []
    assert "default-src 'none'" in full_run[1].read_text()
    assert len(embedded(full_run[1], "plotly")) > 1_000_000  # plotly itself
    assert full_run[1].stat().st_size < 2_000_000


def test_the_page_has_a_line_for_every_series_with_data(full_run):
    names = names_in(full_run[1])
    assert {"held-out questions (pass@1)", "training questions (accuracy reward)", "format", "generate"} <= names
    assert "truncated" not in names  # not in the rows


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 0}],
        [row(1)],
        [row(1), row(2)],
        [row(1, **{"reward/accuracy": None, "nonfinite": ["reward/accuracy"]})],
        [row(1, **{"logp_diff/mean": 0.0, "logp_diff/max": 0.0})],  # not on a logarithmic axis
        [{"step": 0, "eval/pass_at_1": 0.5}],
    ],
    ids=["nothing but a step", "one row", "no evaluation", "a NaN", "no difference", "only an evaluation"],
)
@pytest.mark.filterwarnings("error")
def test_short_runs_are_drawn(tmp_path, rows):
    write_lines(tmp_path / "metrics.jsonl", rows)
    page = write_report(tmp_path)
    assert embedded(page) == []


def supervised(step, **more):
    return {
        "step": step,
        "loss": 1.0 / step,
        "tokens": 100,
        "lr": 1e-3,
        "tokens_per_second": 9.0,
        "grad_norm": 1.0,
        **more,
    }


def test_a_supervised_run_is_drawn_over_steps_tokens_and_domains(tmp_path):
    evaluated = {"eval/loss": 2.0, "eval/loss/math": 1.5, "eval/loss/<b>": 2.5}
    rows = [{"step": 0, **evaluated}, *map(supervised, range(1, 5)), {"step": 4, **evaluated}]
    write_lines(tmp_path / "metrics.jsonl", rows)
    (tmp_path / "lengths.json").write_text(json.dumps({"edges": [1, 2, 4], "texts": [3, 5], "row_tokens": 3}))
    page = write_report(tmp_path)
    text = page.read_text()
    assert re.findall(r"<h3>(.*?)</h3>", text)[1:] == [
        "Cross-entropy",
        "Cross-entropy over tokens",
        "Entropy of the predictions",
        "Gradient norm before clipping",
        "Learning rate",
        "Speed",
        "Held-out cross-entropy by domain",
        "Lengths of the texts",
        "Where the time goes",
    ]
    assert "tokens trained on <b>400</b>" in text
    assert {"math", "<b>"} <= names_in(page)
    assert any(trace["x"] == [100, 200, 300, 400] for chart in embedded(page, "charts") for trace in chart["data"])
    merged = [{"step": 0, "eval/loss": 2.0}, supervised(1), supervised(2, **{"eval/loss": 1.0})]
    assert figures.points(merged, "eval/loss", over_tokens=True) == ([0, 200], [2.0, 1.0])


def test_a_reward_model_is_drawn_with_its_interval_scores_and_calibration(tmp_path, monkeypatch):
    evaluated = {"eval/loss": 0.5, "eval/accuracy": 0.75, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.93}
    evaluated |= {"eval/length_correlation": -0.25, "eval/calibration_error": 0.1, "eval/accuracy/writing": 0.5}
    trained = {"accuracy": 0.5, "chosen": -1.0, "rejected": -2.0, "difference": 1.0}
    rows = [{"step": 0, **evaluated}, *(supervised(step, **trained) for step in range(1, 4)), {"step": 3, **evaluated}]
    write_lines(tmp_path / "metrics.jsonl", rows)
    scores = np.array([[2.0, 1.0], [0.0, 1.0], [1.0, -1.0], [3.0, -1.0]])
    drawn = shown(scores, np.array([[20, 10], [10, 20], [15, 15], [30, 5]]), None)
    (tmp_path / "ratings.json").write_text(json.dumps(drawn))
    page = write_report(tmp_path)
    assert re.findall(r"<h3>(.*?)</h3>", page.read_text()) == [
        "Held-out loss",
        "Held-out accuracy",
        "Correlation of score and length",
        "Loss of the reward model",
        "Accuracy of the reward model",
        "Scores",
        "Length and sureness",
        "Gradient norm before clipping",
        "Learning rate",
        "Speed",
        "Held-out accuracy by domain",
        "Held-out scores",
        "Score against length",
        "Calibration",
        "Where the time goes",
    ]
    for number in ("75.0%", "-0.250"):
        assert f'<span class="new">{number}</span>' in page.read_text()
    (accuracy,) = (chart for _, group in chart_groups(rows) for chart in group if "Accuracy" in chart["title"])
    assert [trace["y"] for trace in accuracy["data"]][1:4] == [[0.4, 0.4], [0.93, 0.93], [0.75, 0.75]]
    bars, (dots,), (ideal, found) = (chart["data"] for chart in rated_charts(Ratings(**drawn)))
    assert {bar["name"]: sum(bar["y"]) for bar in bars} == {"chosen": 4, "rejected": 4}
    assert dots["y"] == scores.ravel().tolist() and dots["x"] == [20, 10, 10, 20, 15, 15, 30, 5]
    assert sum(int(text.split()[0]) for text in found["text"]) == 4 and ideal["x"] == ideal["y"]
    assert found["y"] == [0.5, 1.0, 1.0]  # the two that differ by 1: one is right
    assert found["x"] == pytest.approx([1 / (1 + np.exp(-size)) for size in (1, 2, 4)])


def test_a_row_that_is_being_written_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(1)) + "\n" + '{"step": 2, "re')
    assert [r["step"] for r in report._read_lines(tmp_path / "metrics.jsonl")] == [1]


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"report: .*metrics.jsonl does not exist; is .* the run_dir of a run"):
        write_report(tmp_path)


def test_an_empty_log_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics.jsonl has no row"):
        write_report(tmp_path)


@pytest.mark.parametrize(("line", "message"), [("{oops}", "is not JSON"), ('{"loss": 1}', "has no integer `step`")])
def test_a_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(1)) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"line 2 of .*metrics.jsonl {message}"):
        write_report(tmp_path)


def test_the_samples_of_a_long_run_are_thinned_by_step(tmp_path, monkeypatch):
    rows = [sample(step, completion="x" * 1000) for step in range(10) for _ in range(2)]
    write_lines(tmp_path / "samples.jsonl", rows)
    size = (tmp_path / "samples.jsonl").stat().st_size
    monkeypatch.setattr(report, "_SAMPLE_BYTES", size * 3 // 10)
    text, shown, total = report._packed_samples(tmp_path / "samples.jsonl")
    assert (shown, total) == (8, 20)
    assert [r["step"] for r in json.loads(unpacked(text))] == [0, 0, 4, 4, 8, 8, 9, 9]  # every 4th and the last, whole
    monkeypatch.setattr(report, "_PACKED_BYTES", len(text) - 1)
    text, shown, _ = report._packed_samples(tmp_path / "samples.jsonl")
    assert [r["step"] for r in json.loads(unpacked(text))] == [0, 0, 8, 8, 9, 9] and shown == 6


def test_what_is_packed_holds_no_character_that_html_reads():
    text = packed(ATTACK + "\U0001f600" * 1000)
    assert unpacked(text) == ATTACK + "\U0001f600" * 1000 and not set(text) & set("<>&\"'")


def test_smoothing_is_a_centered_mean():
    # 20 points: half = 1, so three points inside and two at the ends.
    values = [float(i * i) for i in range(20)]
    out = figures.smoothed(values)
    assert out[0] == 0.5 and out[1] == pytest.approx((0 + 1 + 4) / 3) and out[-1] == (324 + 361) / 2


@pytest.mark.parametrize(("values", "marks"), [([0.2, 0.9], None), ([0.2, 3.0], None), ([0.05, 2.0], 1), ([1.0], None)])
def test_a_logarithmic_axis_has_marks_also_between_two_powers_of_ten(values, marks):
    rows = [{"step": step, "grad_norm": value} for step, value in enumerate(values)]
    assert line_chart(rows, figures.GRADIENT_NORM)["layout"]["yaxis"].get("dtick") == marks


@pytest.mark.parametrize(("peak", "form"), [(3e-4, "e"), (2e-3, None)])
def test_a_small_learning_rate_is_written_as_a_power_of_ten(peak, form):
    rows = [{"step": step, "lr": step * peak} for step in range(2)]
    assert line_chart(rows, figures.LEARNING_RATE)["layout"]["yaxis"].get("exponentformat") == form


def test_an_evaluation_has_the_band_of_its_interval():
    rows = [{"step": 0, "eval/pass_at_1": 0.5, "eval/pass_at_1_low": 0.4, "eval/pass_at_1_high": 0.6}, {"step": 1}]
    assert figures.band(rows, "eval/pass_at_1") == ([0], [0.4], [0.6])
    traces = line_chart(rows, figures.RL_FIGURES[0])["data"]
    assert [trace.get("fill") for trace in traces] == [None, "tonexty", None] and traces[1]["y"] == [0.6]
