"""What the ops share to be single nodes for torch.compile, torch.export, fake and meta tensors.

Called on plain tensors an op runs at once, as a torch.autograd.Function or a plain function: as a registered op each
call would take longer. Where something looks on that only knows what is registered, the op of the same name in
torch.ops.r1kernels takes its place (`torch_op.py` of each op), which calls the plain function when the graph runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch

from r1kernels.dispatch import Impl, choose_on


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether a compiler, an exporter or fake or meta tensors ask."""
    if torch.compiler.is_compiling():
        return True
    # A fake tensor is the one subclass that the ops take; its module is slow to import.
    return tensor.is_meta or type(tensor).__name__ == "FakeTensor"


def has_values(tensor: torch.Tensor) -> bool:
    """Whether the values can be looked at without waiting: on the CPU, and no stand-in of a graph's."""
    return tensor.device.type == "cpu" and not is_traced(tensor)


def traced_choice(op: str, impl: str | None, device: str, have: tuple[str, ...]) -> str:
    """`dispatch.choose` for a graph: the same for as long as the process lives."""
    return choose_on(op, impl, device, have)


# What torch.compiler.assume_constant_result sets, which imports the compiler: as long again as PyTorch itself takes.
setattr(traced_choice, "_dynamo_marked_constant", True)  # noqa: B010  # no attribute that a function declares


def wish(impl: str | None) -> Impl | None:
    """The caller's wish again, which an op of PyTorch takes as any string; the function that it is for checks it."""
    return cast("Impl | None", impl)


@contextmanager
def autograd_in_op() -> Iterator[None]:
    """Lets an op's implementation differentiate by autograd, which torch.library switches off around it."""
    nothing = torch._C.DispatchKeySet.from_raw_repr(0)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), nothing), torch.enable_grad():
        yield
