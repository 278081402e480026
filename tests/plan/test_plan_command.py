"""`r1engine plan`: what it prints, its page, and requests that it refuses."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest
from ranks import on_ranks
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.observe.packed import unpacked

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model:\n  path: {ROOT / 'configs/models/DeepSeek-V3'}\n  recompute: true\ndata:\n  train: x.jsonl\n"
        "parallel:\n  tensor: 8\n  pipeline: 16\n  expert: 32\n  first_stage_layers: 4\n  last_stage_layers: 1\n"
        "  distributed_optimizer: true\n"
        "rollout:\n  engine: sglang\n  sglang: {mode: disaggregated, python: /x, servers: 8, tensor: 16}\n"
    )
    return file


def run_command(*arguments: str) -> tuple[str, int]:
    """(what the command prints, the most kB of memory that this process has held)."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.slow
def test_the_command_prints_json_and_a_page(config, tmp_path):
    page = tmp_path / "plan.html"
    arguments = [
        "plan",
        str(config),
        "--gpus",
        "512",
        "--gpu",
        "h800",
        "--json",
        "--assume",
        "gpu_hour_price=2",
        "--html",
        str(page),
    ]
    ((printed, memory),) = on_ranks(1, run_command, *arguments)  # needs groups of its own
    assert memory < 8e6
    plan = json.loads(printed)
    assert plan["parameters_total"] == 671_026_404_352 and plan["fits"] and plan["ranks"] == 512
    assert {"weights", "gradients", "optimizer", "activations"} <= plan["memory_gib"]["update"].keys()
    assert set(plan["phase_seconds"]) == {"generate", "logprobs", "update", "optimizer", "refresh", "switch"}
    text = page.read_text()
    assert (
        "<h1>" in text and " on 512 x H800</h1>" in text and "GiB on the fullest GPU" in text and len(text) < 2_000_000
    )
    charts = json.loads(unpacked(re.search(r'id="charts">(.*?)</script>', text)[1]))
    assert {"weights", "activations"} <= {trace["name"] for chart in charts for trace in chart["data"]}
    assert plan["gpus_in_all"] == 512 + 8 * 16 and plan["run"]["price"] == pytest.approx(2 * plan["run"]["gpu_hours"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--gpu", "b300", "--gpus", "512"],
            "found --gpu b300, required one of h100, h800, h200, h20, b200, gb200, a100,",
        ),
        (
            ["--gpu", "a100", "--gpus", "512", "model.fp8=true"],
            "model.fp8: found true with --gpu a100, required one of",
        ),
        (["--gpu", "h800", "--gpus", "500"], "does not divide 500"),
        (["--gpu", "h800", "--gpus", "512", "--assume", "speed=2"], "found --assume speed=2, required one of"),
        (["--gpus", "768", "parallel.expert=48"], "parallel.expert: 48 does not divide the model's 256 experts"),
        (
            ["--gpus", "512", "rollout.sglang.mode=colocated"],
            "rollout.sglang.mode: found colocated with 512 GPUs, required a single node, of 8",
        ),
    ],
)
def test_bad_requests_are_named(config, arguments, message):
    result = CliRunner().invoke(app, ["plan", str(config), *arguments])
    assert result.exit_code == 2 and message in " ".join(result.output.split())
