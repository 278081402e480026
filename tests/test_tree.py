"""Rules of the source tree: who may import whom, names, sizes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE, KERNELS = ROOT / "r1engine", ROOT / "kernels" / "r1kernels"
SOURCES = sorted([*ENGINE.rglob("*.py"), *KERNELS.rglob("*.py")])
MAX_LINES = 400


def imported(path: Path, *, for_types: bool = True) -> Iterator[str]:
    """Dotted name of every import in a file, also those inside functions; relative ones made absolute."""
    base = ROOT if path.is_relative_to(ENGINE) else ROOT / "kernels"
    package = path.relative_to(base).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not for_types:
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*prefix, *([node.module] if node.module else [])])
            yield from (f"{module}.{name.name}" for name in node.names)


def offenders(files: list[Path], *forbidden: str) -> list[str]:
    """ "file imports name" for every import of a forbidden package."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported(path, for_types=False)
        if any(name == package or name.startswith(package + ".") for package in forbidden)
    ]


def under(folder: str) -> list[Path]:
    return [path for path in SOURCES if path.is_relative_to(ENGINE / folder)]


def outside(*folders: str) -> list[Path]:
    engine = [path for path in SOURCES if path.is_relative_to(ENGINE)]
    return [path for path in engine if not any(path.is_relative_to(ENGINE / folder) for folder in folders)]


def test_no_module_shadows_the_standard_library():
    # `torchrun r1engine/train.py` starts with r1engine/ on sys.path.
    assert not {path.stem for path in ENGINE.iterdir()} & sys.stdlib_module_names


def test_kernels_folder_is_no_package():
    # It would shadow Hugging Face's `kernels`.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_config_and_rewards_name_no_torch():
    files = [ENGINE / "config.py", ENGINE / "config_file.py", ENGINE / "config_checks.py", *under("rewards")]
    assert offenders(files, "torch", "r1kernels", "megatron") == []


NO_TORCH = ["config", "cli", "data.questions", "rewards", "hf.architecture", "hf.tensors", "hf.layout", "hf.tokenizer"]


@pytest.mark.parametrize("module", [f"r1engine.{name}" for name in [*NO_TORCH, "plan.sizes", "plan.command"]])
def test_module_loads_no_torch_even_through_others(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'sympy', 'transformers'}} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_batch_imports_nothing_of_ours_but_the_question():
    found = offenders([ENGINE / "batch.py"], "r1engine", "r1kernels")
    assert found == ["r1engine/batch.py imports r1engine.data.question.Question"]
    assert offenders([ENGINE / "data" / "question.py"], "r1engine", "r1kernels", "torch") == []


def test_model_and_rollout_never_import_each_other():
    assert offenders(under("model"), "r1engine.rollout") == []
    assert offenders(under("rollout"), "r1engine.model") == []


def test_hf_imports_neither_model_nor_rollout():
    assert offenders(under("hf"), "r1engine.model", "r1engine.rollout") == []


def test_plan_imports_neither_model_nor_torch():
    # The command itself builds the true model of every stage, to hold the closed forms to it.
    files = [path for path in under("plan") if path.name != "command.py"]
    assert offenders(files, "r1engine.model", "torch", "r1kernels") == []


def test_megatron_is_imported_only_under_model():
    assert offenders(outside("model"), "megatron", "transformer_engine") == []


def test_sglang_is_imported_only_in_its_generator():
    assert offenders([path for path in SOURCES if path.name != "sglang.py"], "sglang") == []


def test_parts_do_not_import_the_programs():
    programs = ["train", "cli", "loop", "step", "sft", "pipeline", "evaluation", "plan"]
    parts = [*under("model"), *under("rollout"), *under("rewards"), *under("observe"), *under("hf"), ENGINE / "grpo.py"]
    assert offenders(parts, *(f"r1engine.{name}" for name in programs)) == []


def test_r1kernels_imports_nothing_of_r1engine():
    assert offenders([path for path in SOURCES if path.is_relative_to(KERNELS)], "r1engine") == []


def test_nothing_imports_tests_or_benchmarks():
    assert offenders(SOURCES, "tests", "benchmarks") == []


def test_train_defines_only_main():
    # Run as __main__, a class defined there would exist twice and fail to unpickle.
    tree = ast.parse((ENGINE / "train.py").read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert [node.name for node in tree.body if isinstance(node, kinds)] == ["main"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short_ascii_and_documented(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert text.isascii()
    assert ast.get_docstring(ast.parse(text)), "a module starts with what it is"


def test_every_op_has_its_parts():
    # The compiled and Triton implementations are optional, the contract and the reference are not.
    ops = [path for path in KERNELS.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert [op.name for op in ops if not all((op / name).is_file() for name in ("__init__.py", "reference.py"))] == []
