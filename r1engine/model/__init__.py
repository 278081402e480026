"""Everything that touches Megatron-core: parallel layout, model construction, weights, optimizer, checkpoints."""

import logging
import sys
import types
import warnings
from typing import Any

import torch

# At import Megatron warns of every optional package that is absent (TE, APEX), and of its own deprecations: nothing
# that a user of this engine can act on.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)  # of Megatron's checkpoints, by PyTorch
logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)  # announces that it is off


def _without_torch_compile() -> types.ModuleType:
    """megatron.core.jit for the CPU: what it would compile with Inductor stays as written.

    The decorator alone imports Inductor, which takes seconds at the start of every process.
    """
    jit: Any = types.ModuleType("megatron.core.jit")
    jit.jit_fuser = jit.noop_decorator = lambda function: function
    jit.enable_jit_fuser = jit.disable_jit_fuser = lambda: None
    return jit


if not torch.cuda.is_available():
    sys.modules.setdefault("megatron.core.jit", _without_torch_compile())
