"""Which files here a machine can run: a bare GPU machine has torch and Triton, not the packages of the engine."""

from importlib.util import find_spec

NEEDS = {
    "test_context_gpu.py": ("megatron",),
    "test_fp8_linears_gpu.py": ("megatron", "pydantic", "ruamel", "transformers"),
    "test_generator_gpu.py": ("transformers", "pydantic"),
    "test_policy_gpu.py": ("megatron", "pydantic", "ruamel", "transformers"),
}
MISSING = {file: [name for name in names if find_spec(name) is None] for file, names in NEEDS.items()}

collect_ignore = [file for file, names in MISSING.items() if names]


def pytest_report_header() -> list[str]:
    return [f"left out: {file} needs {', '.join(names)}" for file, names in MISSING.items() if names]
