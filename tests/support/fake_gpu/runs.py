"""What the engine does on a fake GPU, each in a process of its own (ranks.on_ranks)."""

from __future__ import annotations

import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from model_folders import save_model
from policies import policy_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fake_gpu
from r1engine.batch import Prompt, RowShape, Sequence, pack
from r1engine.config import Parallel, RlConfig
from r1engine.data.question import Question
from r1engine.hf.architecture import read_architecture
from r1engine.hf.folder import weights_of
from r1engine.hf.kv_shape import kv_bytes
from r1engine.model import parallel
from r1engine.ranks import World
from r1engine.rollout.draft import Draft, Sampling
from r1engine.rollout.local import memory, pages
from r1engine.rollout.local.decode_batch import PREFILL_TOKENS
from r1engine.rollout.local.decoder import Decoder
from r1engine.rollout.local.generator import LocalGenerator
from r1engine.stages.sft import cross_entropy

DEVICE = torch.device("cuda", 0)
# Two layers, of which the second has experts; sizes that the kernels of a GPU take.
WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "qk_nope_head_dim": 16, "v_head_dim": 16}
SIZES = {"num_hidden_layers": 2}
ROWS = 2  # of a pass


class Seen(NamedTuple):
    """What was noted."""

    waits: dict[str, Counter[str]]  # phase -> place -> how often
    launches: dict[str, Counter[str]]  # phase -> kernel -> how often
    made: dict[str, Counter[tuple[str, torch.dtype, tuple[int, ...]]]]  # phase -> result of an operation -> how many
    misplaced: list[str]  # parameters and buffers that are not on the device
    metrics: set[str] = frozenset()


class Phases:
    """Waits, launches and results, phase by phase."""

    def __init__(self, gpu: fake_gpu.FakeGpu) -> None:
        self._gpu = gpu
        self.waits: dict[str, Counter[str]] = {}
        self.launches: dict[str, Counter[str]] = {}
        self.made: dict[str, Counter] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside is of this phase."""
        self._gpu.waits.clear()
        self._gpu.launches.clear()
        self._gpu.made.clear()
        yield
        self.waits[name] = Counter(self._gpu.waits)
        self.launches[name] = Counter(launch.name for launch in self._gpu.launches)
        self.made[name] = Counter(self._gpu.made)


def model_folder(family: str) -> Path:
    """A tiny model of the family."""
    folder = Path(tempfile.mkdtemp())
    has_experts = family in ("qwen3-moe", "deepseek", "moonlight", "deepseek-mtp")
    save_model(folder, family, **SIZES, **(WIDE if has_experts else {}))
    return folder


def train(library: Path, family: str, experts: str, offload: bool, ranks: int = 1) -> Seen:
    """A policy is built, asked for log-probabilities, updated, and its weights are handed on.

    The experts are dealt to `ranks` ranks, of which this is the first; nothing comes from the others.
    """
    folder, layout = model_folder(family), Parallel(expert=ranks)
    gpu = fake_gpu.start(library)
    dist.init_process_group("fake", store=fake_gpu.store(), rank=0, world_size=ranks)
    parallel.start_groups(layout)
    items = [Sequence(list(range(2, 2 + n)), 1, 0.01) for n in (5, 17, 40)]
    phases, mtp = Phases(gpu), {"mtp_loss_weight": 0.3} if family.endswith("mtp") else {}
    cfg = RlConfig(model={"path": folder, "experts": experts} | mtp, optimizer={"offload": offload}, parallel=layout)
    with gpu:
        with phases.phase("build"):
            policy = policy_of(cfg, World(0, ranks, DEVICE, dp_size=ranks, ep_size=ranks))
        held = [item for chunk in policy.chunks for item in (*chunk.named_parameters(), *chunk.named_buffers())]
        rows = [row.to(DEVICE) for row in pack(items, RowShape(max_tokens=48))[0]]
        assert len(rows) == ROWS
        with phases.phase("logprobs"):
            held += [("logp", logp) for logp in policy.logprobs(rows)]
        with phases.phase("reference"):
            policy.reference_logprobs(policy.snapshot(), rows)
        with phases.phase("update"):
            metrics = policy.update(rows, cross_entropy, 1e-3).metrics
        with phases.phase("weights"):
            held += list(policy.weights())
    misplaced = [name for name, tensor in held if tensor.device != DEVICE]
    return Seen(phases.waits, phases.launches, phases.made, misplaced, set(metrics))


class Drawn(NamedTuple):
    """What was noted of a generator."""

    waits: Counter[str]
    draws: int  # decode steps and batches of first tokens
    graphs: int
    launches: Counter[str]
    lengths: list[int]  # of the drafts


def draw(library: Path, family: str, fewest: int = 20, num_pages: int | None = None) -> Drawn:
    """A generator takes weights, and draws more samples than it has rows for.

    Args:
        library:   of `build`.
        family:    of model_folders.
        fewest:    tokens of the first draft; each of the next ones has one more.
        num_pages: of 16 tokens, that the device has memory for; None: of the usual size, for all.
    """
    folder = model_folder(family)
    gpu, counts = fake_gpu.start(library), []
    if num_pages is not None:
        arch, (rows, prefill, size) = read_architecture(folder), (4, PREFILL_TOKENS, 2)
        num_bytes = memory._other_bytes(arch, rows, fewest + 9, prefill, size)
        num_bytes += (num_pages + 1.5) * 16 * kv_bytes(arch, size)
        memory.PAGE_TOKENS = pages.PAGE_TOKENS = 16
        torch.cuda.mem_get_info = lambda *_: (num_bytes / memory.USED,) * 2
    with gpu:
        generator = LocalGenerator(folder, seed=1, slots=4, device=DEVICE, dtype=torch.bfloat16)
        generator.load_weights(weights_of(folder))
        assert not gpu.waits, gpu.waits
        prompts = [Prompt(i, [2, 3, 4 + i][: 2 + i % 2], "", Question("")) for i in range(7)]
        drafts = [Draft(prompt, 0, 0, 0, fewest + i) for i, prompt in enumerate(prompts)]
        generator.draw(drafts, Sampling(), on_tokens=counts.append)
    launches = Counter(launch.name for launch in gpu.launches)
    return Drawn(Counter(gpu.waits), len(counts), gpu.recorded, launches, [len(draft.tokens) for draft in drafts])


class Peak(TorchDispatchMode):
    """Counts the bytes on the device that operations have made and somebody holds."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._holders, self._sizes = 0, Counter(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                storage = tensor.untyped_storage()
                self._sizes[storage._cdata] = storage.nbytes()
                self._holders[storage._cdata] += 1
                weakref.finalize(tensor, self._let_go, storage._cdata)
        self.most = max(self.most, sum(self._sizes.values()))
        return found

    def _let_go(self, storage: int) -> None:
        self._holders[storage] -= 1
        if not self._holders[storage]:
            del self._sizes[storage]


def prefill(library: Path, family: str, sizes: dict[str, int]) -> tuple[int, int]:
    """Bytes that a prompt of PREFILL_TOKENS takes at most, and what is reckoned for it."""
    folder = Path(tempfile.mkdtemp())
    save_model(folder, family, **SIZES, max_position_embeddings=PREFILL_TOKENS, **sizes)
    arch, gpu = read_architecture(folder), fake_gpu.start(library)
    with gpu, torch.inference_mode():
        decoder = Decoder(arch, device=DEVICE, dtype=torch.bfloat16)
        decoder.weights.load(weights_of(folder))
        with Peak() as peak:
            decoder.prefill([[2] * PREFILL_TOKENS])
    return peak.most, memory._other_bytes(arch, 1, 0, PREFILL_TOKENS, 2)
