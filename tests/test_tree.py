"""Rules of the source tree: who may import whom, names, sizes."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE, KERNELS = ROOT / "r1engine", ROOT / "kernels" / "r1kernels"
SOURCES = sorted([*ENGINE.rglob("*.py"), *KERNELS.rglob("*.py")])
MAX_LINES = 400


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported(path: Path, *, for_types: bool = True) -> tuple[str, ...]:
    """Dotted name of every import in a file, also those inside functions; relative ones made absolute."""
    return tuple(_imported(path, for_types=for_types))


def _imported(path: Path, *, for_types: bool) -> Iterator[str]:
    base = ROOT if path.is_relative_to(ENGINE) else ROOT / "kernels"
    package = path.relative_to(base).with_suffix("").parts[:-1]
    tree = parsed(path)
    if not for_types:
        own = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
        tree = ast.Module(own, [])
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


def test_no_code_of_a_models_folder_is_run():
    # docs/security.md
    named = [path for path in SOURCES if "trust_remote_code" in path.read_text(encoding="utf-8")]
    assert named == []


def test_config_data_rewards_and_pipeline_name_no_torch():
    files = [*under("config"), *under("rewards"), *under("data"), *under("pipeline")]
    assert offenders(files, "torch", "r1kernels", "megatron") == []


NO_TORCH = [
    "config",
    "cli",
    "data.questions",
    "data.prompts",
    "rewards",
    "hf.architecture",
    "hf.tensors",
    "hf.layout",
    "hf.tokenizer",
    "evaluation.benchmarks",
    "evaluation.lines",
    "evaluation.evaluate",
    "evaluation.show",
]


def test_modules_load_no_torch_even_through_others():
    names = [f"r1engine.{name}" for name in [*NO_TORCH, "plan.sizes", "plan.command"]]
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    if heavy := {{"torch", "sympy", "transformers"}} & set(sys.modules):
        sys.exit(f"{{name}} loads {{sorted(heavy)}}")
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode == 0


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


def test_nothing_imports_sglang():
    # It lives in an environment of its own and is spoken to over HTTP.
    assert offenders(SOURCES, "sglang") == []


# Rooms from the bottom up; a room may import those above it in this list, and what LAZY adds.
ROOMS = (
    "cores", "config", "web", "ending", "ranks", "run_lock", "checkpoint", "remote", "saving", "observe", "data",
    "rewards", "hf", "batch", "convert", "grpo", "model", "rollout", "evaluation", "search", "demo", "plan", "stages",
    "sampling", "run", "pipeline", "doctor", "cluster", "verbs", "cli", "train", "__main__",
)  # fmt: skip
BOTH_WAYS = {
    ("data", "rewards"),  # a file of questions is checked by the rules; a record holds a question
    ("data", "batch"),  # a prompt holds a question; prompts are made of questions
    ("data", "hf"),  # for types: the tokenizer
}


def test_rooms_import_only_what_is_below_them():
    place = {room: number for number, room in enumerate(ROOMS)}
    wrong = []
    for path in under(""):
        room = path.relative_to(ENGINE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in imported(path):
            other = name.split(".")[1] if name.startswith("r1engine.") else room
            if other in place and place[other] > place[room] and (room, other) not in BOTH_WAYS:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_every_room_has_its_place():
    rooms = {path.name.removesuffix(".py") for path in ENGINE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__init__", "__pycache__"} == set(ROOMS)


def test_no_modules_import_each_other_in_a_circle():
    modules = {}
    for path in under(""):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    needs = {module: set[str]() for module in modules}
    for module, path in modules.items():
        for name in imported(path, for_types=False):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and name != module:
                needs[module].add(name)
    while leaves := {module for module, others in needs.items() if not others}:
        needs = {module: others - leaves for module, others in needs.items() if module not in leaves}
    assert needs == {}, "these modules are in a circle or need one that is"


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


def functions(folder: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """("file:name", node) of every function below a folder."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.name}", node


def test_functions_are_short():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions(ENGINE)}
    long = {name: length for name, length in lengths.items() if length > 40}
    assert len(long) <= 15, long  # docstrings included


def test_functions_have_at_most_eight_parameters():
    many = []
    for name, node in functions(ENGINE):
        arguments = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if len([arg for arg in arguments if arg not in ("self", "cls")]) > 8:
            many.append(name)
    assert many == []


def test_no_public_class_has_the_name_of_another():
    where: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


def test_types_are_believed_without_a_check_in_few_places_each_with_its_reason():
    lines = [line for path in SOURCES for line in path.read_text().splitlines() if "# type: ignore" in line]
    assert not [line for line in lines if not re.search(r"# type: ignore\[[a-z-]+\]  # \w", line)]
    assert len(lines) < 15
    for package in (ENGINE, KERNELS):
        assert (package / "py.typed").is_file()  # a checker believes the annotations of an installed package


def test_every_op_has_its_parts():
    # The compiled and Triton implementations are optional, the contract and the reference are not.
    ops = [path for path in KERNELS.iterdir() if path.is_dir() and path.name not in ("__pycache__", "integrations")]
    assert [op.name for op in ops if not all((op / name).is_file() for name in ("__init__.py", "reference.py"))] == []
