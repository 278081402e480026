"""Evaluations by SGLang servers that are started for a folder, on CPUs: `make test-sglang`."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
import real
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.config.evaluation import Suite
from r1engine.evaluation.evaluate import evaluate
from r1engine.evaluation.store import Store
from r1engine.rollout.sglang.open_servers import OpenServers

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"


@pytest.fixture(scope="module")
def model(tiny_base, tmp_path_factory) -> Path:
    """The demo's base with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "tiny"
    folder.mkdir()
    for file in (tiny_base / "base" / "model").iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def asked(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.loads(reply.read())


def test_servers_for_a_folder_draw_its_replies_and_answer_openais_interface(model, tiny_base, tmp_path):
    sums = {"kind": "questions", "file": tiny_base / "tiny" / "heldout.jsonl", "samples": 2, "questions": 4}
    # Only the likeliest token is left, so that two programs with other random numbers draw the same.
    common = {"max_tokens": 16, "top_p": 1e-6, "rewards": {"workers": 1}, "benchmarks": {"sums": sums}}
    told, outs = [], {"sglang": tmp_path / "served", "local": tmp_path / "here"}
    servers = {"python": real.python(), "start_seconds": real.START_SECONDS}
    for generator, out in outs.items():
        suite = Suite.model_validate(common | {"out": out, "generator": generator, "sglang": servers})
        found = evaluate(model, suite, note=told.append)["sums"]
        assert (found["replies"], found["missing"]) == (8, 0)
    lines = {name: Store(out).replies("sums") for name, out in outs.items()}
    drawn = {name: {key: (line.text, line.finish) for key, line in found.items()} for name, found in lines.items()}
    assert drawn["sglang"] == drawn["local"] and len(set(drawn["local"].values())) > 1
    assert {line.prompt_tokens for line in lines["sglang"].values()} == {
        line.prompt_tokens for line in lines["local"].values()
    }
    assert any("is ready" in text for text in told)
    (server,) = OpenServers(model, real.python(), tmp_path / "logs", start_seconds=real.START_SECONDS).start(print)
    try:
        said = asked(
            f"{server.client.url}/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": "What is 12+34?"}], "max_tokens": 4},
        )
        assert said["choices"][0]["message"]["role"] == "assistant" and 1 <= said["usage"]["completion_tokens"] <= 4
        suite = tmp_path / "suite.yaml"
        suite.write_text(
            f"max_tokens: 16\nrewards: {{workers: 1}}\nendpoint: {{model: tiny}}\n"
            f"benchmarks: {{sums: {{kind: questions, file: {sums['file']}, samples: 1, questions: 4}}}}\n"
        )
        words = ["evaluate", f"{server.client.url}/v1", str(suite), f"out={tmp_path / 'asked'}"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    finally:
        server.stop()
    assert len(Store(tmp_path / "asked").replies("sums")) == 4
