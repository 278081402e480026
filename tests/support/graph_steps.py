"""Steps of training in graphs and outside of them: a compiler that counts its graphs, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


class CountingCompiler:
    """Compiles without a break, from an empty cache; `graphs` counts."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, step: Callable[..., torch.Tensor], **options: Any) -> Callable[..., torch.Tensor]:
        from torch._dynamo.backends.debugging import aot_eager

        def backend(graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
            self.graphs += 1
            return aot_eager(graph, example)

        return torch.compile(step, fullgraph=True, backend=backend, **options)


def value_and_grads(step: Callable[[Tensors], torch.Tensor], x: Tensors, names: tuple[str, ...]) -> list[torch.Tensor]:
    """The step's value and its gradients in the named tensors."""
    inputs = {name: x[name].clone().requires_grad_() for name in names}
    loss = step(x | inputs)
    return [loss.detach(), *torch.autograd.grad(loss, list(inputs.values()))]
