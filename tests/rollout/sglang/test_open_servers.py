"""Servers with OpenAI's interface: their command lines, and what is refused before one starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.rollout.sglang.open_servers import OpenServers


def wanted(folders, **settings) -> OpenServers:
    return OpenServers(folders["qwen2"][0], Path("/sglang/bin/python"), Path("logs"), **settings)


def test_a_server_has_a_tokenizer_and_leaves_thoughts_in_the_text(folders):
    command = wanted(folders).command(30000, on_gpu=False)
    assert command[:3] == ["/sglang/bin/python", "-m", "sglang.launch_server"]
    assert "--skip-tokenizer-init" not in command and "--reasoning-parser" not in command
    assert command[command.index("--served-model-name") + 1] == folders["qwen2"][0].name
    parsed = wanted(folders, reasoning="deepseek-r1", args=["--x"]).command(30000, on_gpu=True)
    assert parsed[parsed.index("--reasoning-parser") + 1] == "deepseek-r1" and parsed[-1] == "--x"
    assert parsed[parsed.index("--dtype") + 1] == "bfloat16"


def test_each_server_has_its_own_gpus(folders, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    servers = wanted(folders, servers=2, tensor=2)
    assert [servers.environment(i, on_gpu=True)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["4,5", "6,7"]


def test_a_python_without_sglang_is_named_and_nothing_is_left_running(folders):
    servers = OpenServers(folders["qwen2"][0], Path(sys.executable), Path("logs"))
    with pytest.raises(ValueError, match="has no sglang; install it"):
        servers.start(print)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "found nothing, required CONFIG or --eval FOLDER"),
        (["--eval", "gone"], "found no config.json in gone, required a Hugging Face folder"),
        (["--eval", "{model}"], "found no --python, required the Python of an environment with sglang"),
        (["run.yaml", "--eval", "{model}"], "found CONFIG run.yaml and --eval"),
    ],
)
def test_what_serve_refuses(words, message, folders):
    words = [word.format(model=folders["qwen2"][0]) for word in words]
    done = CliRunner().invoke(app, ["serve", *words])
    assert done.exit_code == 2 and message in done.output


def test_serve_says_which_servers_speak_openais_interface():
    told = " ".join(CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output.split())
    assert "Servers of a training run take token ids alone and have no OpenAI interface; those of --eval have." in told
