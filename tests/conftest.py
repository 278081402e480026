"""Shared fixtures, and which tests a session runs, in which order. Every test process is one Megatron rank; layouts of
several ranks are in tests/parallel."""

import os
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton, which decides once and for all

HERE = Path(__file__).parent
# A day runs a third of the tests that are marked `rotating`, and of those marked `turn(n)`, n in 0 .. 2, one n. The
# next day has the next n, and after three days the next third is run: nine days run everything.
TURNS = 9
# The files of ten CPU seconds or more, longest first: xdist deals files in this order, so that none ends alone.
LONGEST = (
    "runs/test_resume.py",
    "runs/test_signals.py",
    "runs/test_torchrun.py",
    "runs/test_written.py",
    "parallel/test_layouts.py",
    "rewards/test_hostile_programs.py",
    "parallel/test_reshard.py",
    "rewards/test_math_corpus.py",
    "kernels/test_csrc.py",
    "test_grading_servers.py",
    "stages/test_dry_run_then_start.py",
    "model/test_fp8_linears.py",
    "kernels/test_paged_attention.py",
)


def pytest_configure() -> None:
    missing = [name for name in LONGEST if not (HERE / name).is_file()]
    if missing:
        raise pytest.UsageError(f"tests/conftest.py: LONGEST names {missing}, required files of tests/")
    # In the environment, for the processes of xdist to have the same at midnight.
    os.environ.setdefault("R1_TURN", str(datetime.now(UTC).toordinal() % TURNS))


def pytest_report_header() -> str:
    return f"tests that take turns: R1_TURN={os.environ['R1_TURN']} (0 .. {TURNS - 1} by the day, or all)"


@pytest.hookimpl(tryfirst=True)  # turns are counted before -k and -m leave out anything
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.relative_to(HERE).as_posix(), len(order)))
    turn, is_named = os.environ["R1_TURN"], config.option.keyword or any("::" in name for name in config.args)
    if turn == "all" or is_named:
        return
    third, today = divmod(int(turn) % TURNS, 3)
    left_out = {item for item in items if (mark := item.get_closest_marker("turn")) and mark.args[0] != today}
    rotating = [item for item in items if item.get_closest_marker("rotating") and item not in left_out]
    left_out |= set(rotating) - set(rotating[third::3])
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def world():
    """Megatron's process groups of a single rank."""
    from r1engine.config import Parallel
    from r1engine.model.parallel import join

    return join(Parallel())


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """family -> (folder, transformers model), made once."""
    from model_folders import FAMILIES, save_model

    root = tmp_path_factory.mktemp("models")
    return {family: (root / family, save_model(root / family, family)) for family in FAMILIES}


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline whose stages are `tiny` (questions, texts) and `base` (a model trained on them).

    All processes of one session share it: the first that asks makes it, and nobody writes into it.
    """
    from ranks import forked
    from shared import alone, session_folder

    folder = session_folder(tmp_path_factory) / "tiny_base"
    settings = [
        f"run_dir={folder}",
        "stages.tiny.hidden_size=32",
        "stages.tiny.texts=3840",
        "stages.tiny.heldout=4",
        "stages.base.sft.batch_size=24",
        "stages.base.max_row_tokens=2048",
        "stages.base.optimizer.warmup_steps=30",
        "stages.base.threads=1",
        "stages.base.log.tensorboard=false",
    ]
    root = Path(__file__).resolve().parents[1]
    script = root / "tests" / "support" / "until_base.py"
    with alone(folder):
        done = forked(1, script, root / "configs" / "demo.yaml", *settings)  # does nothing where it is done
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def serve():
    """Starts a fake of a model behind HTTP that answers with `reply`, see model_server.py; stopped at the end."""
    from model_server import ModelServer

    servers = []

    def start(reply):
        servers.append(ModelServer(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA library for the architectures that a user gets: the installed one unless csrc/ is newer, else compiled
    now; skips without nvcc."""
    from r1kernels import cuda_lib

    root, installed = Path(__file__).resolve().parents[1], cuda_lib.library_path()
    sources = [root / "CMakeLists.txt", *(root / "csrc").glob("*.*")]
    if installed is not None and os.path.getmtime(installed) > max(map(os.path.getmtime, sources)):
        return Path(installed)
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    folder = tmp_path_factory.mktemp("compiled")
    subprocess.run(["cmake", "-S", root, "-B", folder], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", folder], check=True, capture_output=True)
    return folder / "_cuda.so"


@pytest.fixture(scope="session")
def fake_gpu_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lets PyTorch take part in a GPU that does not exist (support/fake_gpu); skips without a compiler."""
    from fake_gpu import build

    if shutil.which("g++") is None:
        pytest.skip("no g++ on PATH")
    return build(tmp_path_factory.mktemp("fake_gpu"))
