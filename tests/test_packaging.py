"""The package as installed: what importing costs, what the pins promise, what the CUDA library answers."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import r1engine
import r1kernels
from r1kernels import cuda_lib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


@pytest.fixture
def fresh_library():
    cuda_lib.library.cache_clear()
    yield
    cuda_lib.library.cache_clear()


def test_importing_r1kernels_pulls_in_no_engine_and_no_optional_package():
    code = "import sys, r1kernels; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    env = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    loaded = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    heavy = {"sympy"}  # PyTorch's compiler brings it: importing that takes as long as PyTorch
    assert not {"r1engine", "triton", "transformers", "megatron", "pydantic", *heavy} & set(loaded.stdout.split())


@pytest.mark.parametrize("extra", ["core", "train", "curate", "dev"])
def test_every_requirement_has_a_pin_inside_its_range(extra: str):
    pins = constraints()
    requirements = PROJECT["dependencies"] if extra == "core" else EXTRAS[extra]
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} has no line in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is outside {requirement.specifier}"


def test_the_ops_have_no_upper_bound_of_python_and_know_their_version():
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.15.0")
    (megatron,) = (r for r in map(Requirement, EXTRAS["train"]) if r.name == "megatron-core")
    assert [megatron.marker.evaluate({"python_version": v}) for v in ("3.11", "3.12", "3.13")] == [True, True, False]
    assert r1kernels.__version__ == r1engine.__version__ == PROJECT["version"]


@pytest.mark.parametrize(("package", "extra"), [("typer", "train"), ("pydantic", "train"), ("wandb", "wandb")])
def test_the_command_names_the_extra_that_is_missing(package, extra):
    # As where only the ops are installed: importing the package fails as if it were not there.
    code = f"import sys; sys.modules[{package!r}] = None; import r1engine.__main__ as script; "
    if extra == "train":
        code += "script.main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr == f"r1engine: found no package {package}; required pip install 'r1engine[train]'\n"
    else:
        done = subprocess.run(
            [sys.executable, "-c", code + f"print(script.missing({package!r}))"], capture_output=True, text=True
        )
        assert done.stdout == f"r1engine: found no package {package}; required pip install 'r1engine[{extra}]'\n"


def test_pins_carry_no_local_version():
    # torch==2.13.0+cpu would refuse the CUDA build, and no package index but PyTorch's has it.
    assert not [name for name, version in constraints().items() if "+" in version]


def test_header_and_python_agree_on_the_interface_version():
    header = (ROOT / "csrc" / "export.h").read_text()
    assert int(re.search(r"#define R1_ABI_VERSION (\d+)", header)[1]) == cuda_lib.ABI_VERSION


def test_missing_library_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, fresh_library: None):
    monkeypatch.setattr(cuda_lib, "library_path", lambda: None)
    assert not cuda_lib.available()
    with pytest.raises(RuntimeError, match=r"_cuda\.so is not installed; it is built by `pip install \.` where nvcc"):
        cuda_lib.build_info()


def test_a_file_that_is_no_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_library: None):
    file = tmp_path / cuda_lib.FILE_NAME
    file.write_text("not a library")
    monkeypatch.setattr(cuda_lib, "library_path", lambda: str(file))
    with pytest.raises(RuntimeError, match=r"_cuda\.so cannot be loaded: .*"):
        cuda_lib.library()


def test_csrc_compiles_and_exports_only_its_own_functions(compiled: Path):
    table = subprocess.run(["nm", "-D", "--defined-only", compiled], check=True, capture_output=True, text=True).stdout
    names = {line.split()[-1] for line in table.splitlines()}
    assert {"r1_abi_version", "r1_build_info", "r1_error_string"} <= names
    assert all(name.startswith("r1_") for name in names)


def test_another_interface_version_is_refused(compiled: Path, monkeypatch: pytest.MonkeyPatch, fresh_library: None):
    monkeypatch.setattr(cuda_lib, "library_path", lambda: str(compiled))
    monkeypatch.setattr(cuda_lib, "ABI_VERSION", 99)
    with pytest.raises(RuntimeError, match="has interface version 1, 99 is required"):
        cuda_lib.library()


def test_launch_reports_cuda_errors_and_unknown_names(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, fresh_library: None
):
    monkeypatch.setattr(cuda_lib, "library_path", lambda: str(compiled))
    assert re.fullmatch(r"CUDA \d+\.\d+, architectures \S+, g\+\+ .+", cuda_lib.build_info())
    # r1_abi_version returns 1, which read as a cudaError_t is cudaErrorInvalidValue.
    with pytest.raises(RuntimeError, match="r1_abi_version: CUDA error 1: invalid argument"):
        cuda_lib.launch("r1_abi_version")
    with pytest.raises(RuntimeError, match="the library has no function r1_nothing"):
        cuda_lib.launch("r1_nothing")


def test_launch_passes_64_bit_sizes_and_32_bit_floats():
    assert isinstance(cuda_lib._c_value(1 << 40), ctypes.c_int64)
    assert cuda_lib._c_value(1 << 40).value == 1 << 40
    assert isinstance(cuda_lib._c_value(0.5), ctypes.c_float)


def test_the_image_is_made_by_the_two_commands_of_the_readme():
    steps = [line.split(maxsplit=1) for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1].isupper()]
    assert [word for word, _ in steps] == ["FROM", "RUN", "WORKDIR", "COPY", "RUN", "CMD"]
    two = re.search(r"## Two commands\n.*?\n((?:    make [^\n]*\n)+)", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    commands = [re.match(r"    (make [a-z-]+)", line)[1] for line in two.splitlines()]
    assert [steps[4][1], " ".join(json.loads(steps[5][1]))] == commands
    ignored = {*(ROOT / ".dockerignore").read_text().split()}
    assert {".venv*", "build", "runs"} <= ignored and not ignored & {path.name for path in ROOT.glob("[a-zA-Z]*.*")}
    assert not ignored & {"benchmarks", "configs", "csrc", "docs", "examples", "kernels", "r1engine", "tests"}
