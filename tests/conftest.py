"""Shared fixtures. Every test process is one Megatron rank; layouts of several ranks are in tests/parallel."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton, which decides once and for all

sys.path.insert(0, str(Path(__file__).parent))  # tests/model_folders.py


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
