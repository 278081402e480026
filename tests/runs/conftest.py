"""A run of each kind of stage that nothing disturbs, against which the tests of this folder hold others."""

from pathlib import Path

import pytest
from cases import Case
from shared import alone, session_folder

KINDS = ("rl", "sft", "reward_model")


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=pytest.mark.turn(n)) for n, kind in enumerate(KINDS)])
def case(request, tiny_base, tmp_path_factory) -> Case:
    folder = session_folder(tmp_path_factory) / request.param
    with alone(folder):
        folder.mkdir(exist_ok=True)
        return Case(request.param, tiny_base, folder)


@pytest.fixture(scope="module")
def undisturbed(case, world) -> Path:
    return case.undisturbed_on(1)
