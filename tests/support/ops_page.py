"""Writes docs/ops.md from the docstrings of r1kernels: `make docs`."""

from __future__ import annotations

import inspect
from pathlib import Path

import r1kernels

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ops.md"
INTRODUCTION = """# The ops

Made from the docstrings by `make docs`. Everything is imported from `r1kernels`, which needs only PyTorch (Python 3.11
or later). The examples are run by the tests. On a CPU the ops are PyTorch, a block of rows at a time; on a GPU Triton
and CUDA C++.

All of them take plain tensors; DTensors, torch.vmap and torch.func are refused with what to do instead. All of them are
registered with `torch.library` (`torch.ops.r1kernels`), with gradients where they have any, and shapes:
`torch.compile(fullgraph=True)`, `torch.export`, fake and meta tensors work, and one graph serves all lengths. Arguments
are checked when the graph runs. In eager mode the ops are called directly. `moe_balance_loss` and `moe_update_bias` are
plain PyTorch, which graphs take as it is; a `RowPlan` passes as its five tensors.
"""


def page() -> str:
    """The page, from the package as it is imported."""
    functions = [name for name in r1kernels.__all__ if inspect.isfunction(getattr(r1kernels, name))]
    classes = [name for name in r1kernels.__all__ if inspect.isclass(getattr(r1kernels, name))]
    index = " · ".join(f"[{name}](#{name.lower()})" for name in functions + classes)
    parts = [INTRODUCTION, index, *(_function(name) for name in functions), *(_class(name) for name in classes)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _function(name: str) -> str:
    function = getattr(r1kernels, name)
    text, _, example = inspect.cleandoc(function.__doc__).partition("\nExample:\n")
    source = inspect.getsource(function)
    signature = source[: source.index('    """')].strip()
    shown = inspect.cleandoc(example)
    return f"## {name}\n\n```python\n{signature} ...\n```\n\n```text\n{text.strip()}\n```\n\n```pycon\n{shown}\n```"


def _class(name: str) -> str:
    source = inspect.getsource(getattr(r1kernels, name))
    fields = source.partition("\n    def ")[0].partition("\n    @property")[0].rstrip()
    return f"## {name}\n\n```python\n{fields}\n```"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
