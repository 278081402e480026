"""Names of the Hub become local paths; a server on this machine stands for it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pyarrow
import pyarrow.parquet
import pytest

from r1engine.config import ConfigError
from r1engine.config.pipeline import load_pipeline
from r1engine.pipeline import manifest

ROOT = Path(__file__).resolve().parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"


def parquet(*rows: dict) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return file.getvalue()


SOLUTION = {"question": "1+1?", "answer": "2\n#### 2"}
FILES = {
    "datasets/openai/gsm8k": {
        "main/train/0000.parquet": parquet(SOLUTION, SOLUTION),
        "main/test/0000.parquet": parquet(SOLUTION),
        "socratic/train/0000.parquet": parquet(SOLUTION),
    },
    "datasets/a/two": {"x/train/0000.parquet": parquet(SOLUTION), "y/train/0000.parquet": parquet(SOLUTION)},
    "models/a/tiny": {"config.json": b"{}", "model.safetensors": b"x", "pytorch_model.bin": b"no"},
}


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the Hub to take a snapshot."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            files = FILES.get("/".join(parts[1:4]))
            about = {"id": "/".join(parts[2:4]), "sha": SHA, "siblings": [{"rfilename": name} for name in files or {}]}
            tree = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in (files or {}).items()]
            self._answer(files and json.dumps(tree if "tree" in parts else about).encode())
            return
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if kind == "datasets" else parts
        self._answer(FILES.get("/".join([kind, *parts[:2]]), {}).get("/".join(parts[4:])))

    def _answer(self, data: bytes | None) -> None:
        self.send_response(200 if data else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{hashlib.sha1(data or b"").hexdigest()}"')
        if not data:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data or b"")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


CODE = """
import sys
from pathlib import Path
from r1engine.config import RlConfig
from r1engine.hf.hub import data_folder, fetched, model_folder
for words in sys.argv[1:]:
    try:
        key, _, path = words.partition("=")
        if key == "both":
            cfg = fetched(RlConfig(model={"path": "hf:a/tiny"}, data={"train": path, "heldout": path}))
            found = f"{cfg.model.path} {cfg.data.train} {cfg.data.heldout}"
        else:
            made = model_folder(Path(path)) if key == "model" else data_folder(Path(path), "train")
            found = f"{made} {sorted(file.name for file in made.iterdir())}"
    except ValueError as error:
        found = f"ValueError: {error}"
    print(found.replace("\\n", " "))
"""


def ask(endpoint: str, home: Path, *words: str) -> list[str]:
    """What each line of CODE says; the library reads its settings when it is imported."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
    }
    env |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", CODE, *words], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_names_of_the_hub_are_fetched_once_and_found_without_a_network(hub, tmp_path):
    words = ["model=hf:a/tiny", "data=hf:openai/gsm8k", "data=hf:openai/gsm8k/socratic", "both=hf:openai/gsm8k"]
    first = ask(hub, tmp_path, *words)
    assert first[0].endswith("['config.json', 'model.safetensors']")
    assert "/main/train ['0000.parquet']" in first[1] and "/socratic/train ['0000.parquet']" in first[2]
    _, train, heldout = first[3].split()
    assert train.endswith("/main/train") and heldout.endswith("/main/test")
    again = ask("http://127.0.0.1:9", tmp_path, *words)
    assert again == first


def test_what_is_not_there_is_named_with_what_to_do(hub, tmp_path):
    none, split, two, short, key = ask(
        hub, tmp_path, "model=hf:a/none", "data=hf:openai/gsm8k:dev", "data=hf:a/two", "model=hf:tiny", "both=hf:a/two"
    )
    assert key.startswith("ValueError: data.train: found the configurations x, y in hf:a/two")
    assert none.startswith("ValueError: cannot fetch the model a/none from the Hugging Face Hub: ")
    assert none.endswith("without a network download it elsewhere and give the local path")
    assert "found no split 'dev' in hf:openai/gsm8k:dev, required hf:OWNER/NAME[/CONFIG][:SPLIT]" in split
    assert "found the configurations x, y in hf:a/two, required one: hf:a/two/NAME" in two
    assert "found hf:tiny, required hf:OWNER/NAME" in short
    (offline,) = ask("http://127.0.0.1:9", tmp_path / "empty", "data=hf:openai/gsm8k")
    assert "cannot fetch the dataset openai/gsm8k from the Hugging Face Hub: " in offline


PIPELINE = """
run_dir: {folder}/p
stages:
  base: {{stage: sft, model: {{path: hf:a/tiny}}, data: {{train: hf:openai/gsm8k, heldout: hf:openai/gsm8k}}}}
"""


def test_a_pipeline_takes_names_of_the_hub_and_keeps_them_in_its_manifest(tmp_path):
    """Without a server: what fetches is given."""
    (tmp_path / "p.yaml").write_text(PIPELINE.format(folder=tmp_path))
    asked = []

    def fetch(name: str, key: str, what: str) -> Path:
        asked.append((name, key, what))
        folder = tmp_path / key
        folder.mkdir(exist_ok=True)
        (folder / "0000.parquet").write_bytes(key.encode())
        return folder

    (stage,) = load_pipeline(tmp_path / "p.yaml", [], fetch).stages
    assert asked == [
        ("hf:a/tiny", "model.path", "model"),
        ("hf:openai/gsm8k", "data.train", "data"),
        ("hf:openai/gsm8k", "data.heldout", "data"),
    ]
    assert (stage.cfg.model.path, stage.needs) == (tmp_path / "model.path", {})
    made_from = manifest.inputs(stage)
    assert {key: found["from"] for key, found in made_from.items()} == {key: name for name, key, _ in asked}
    assert len({found["sha256"] for found in made_from.values()}) == 3


def test_a_pipeline_without_a_network_names_stage_line_and_key(tmp_path):
    (tmp_path / "p.yaml").write_text(PIPELINE.format(folder=tmp_path))

    def fetch(name: str, key: str, what: str) -> Path:
        raise ValueError("cannot fetch the model a/tiny")

    with pytest.raises(ConfigError, match=r"stage base: .*p\.yaml:4: model\.path: cannot fetch the model a/tiny"):
        load_pipeline(tmp_path / "p.yaml", [], fetch)
    (stage,) = load_pipeline(tmp_path / "p.yaml", []).stages  # who only plans needs no network
    assert str(stage.cfg.model.path) == "hf:a/tiny"
