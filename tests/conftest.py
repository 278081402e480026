"""Shared fixtures. Every test process is one Megatron rank; layouts of several ranks are in tests/parallel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton, which decides once and for all

# tests/model_folders.py, tests/parallel/reshard_worker.py
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "parallel")]


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
