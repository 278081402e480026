"""What every rank of test_measured.py runs: one update in each layout, and the bytes that weights, gradients and
optimizer state take, and that the forward pass keeps for the backward pass.

measure_worker.py CASES FOLDER OUT: CASES is JSON, {name: parallel section}; writes OUT/<name>.<rank>.json.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

warnings.filterwarnings("ignore")

from megatron.core import parallel_state  # noqa: E402
from megatron.core.optimizer import ChainedOptimizer  # noqa: E402

from r1engine.batch import PackedBatch, Sequence, pack_sequences  # noqa: E402
from r1engine.config import Config  # noqa: E402
from r1engine.model.parallel import join, leave  # noqa: E402
from r1engine.model.policy import Policy  # noqa: E402
from r1engine.sft import cross_entropy  # noqa: E402


def measure(policy: Policy) -> dict[str, int]:
    optimizer, chunk = policy.optimizer, policy.chunks[0]
    chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    state = [x for part in chain for entry in part.optimizer.state.values() for x in entry.values() if x.numel() > 1]
    masters = [p for part in chain for group in part.optimizer.param_groups for p in group["params"]]
    assert all(p.dtype == torch.float32 for p in masters)
    return {
        "weights": sum(p.nbytes for p in chunk.module.parameters()),
        "gradients": sum(b.grad_data.nbytes for b in [*chunk.buffers, *chunk.expert_parallel_buffers]),
        "optimizer": sum(x.nbytes for x in [*state, *masters]),
    }


def update(policy: Policy, row: PackedBatch) -> int:
    """One update; bytes that its forward pass keeps, but for the weights."""
    weights = {p.untyped_storage().data_ptr() for p in policy.chunks[0].module.parameters()}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        policy.update([row], cross_entropy, 1e-3)
    return sum(kept.values())


def main() -> None:
    torch.set_num_threads(1)
    cases, folder, out = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    items = [Sequence([2 + (7 * i + j) % 90 for j in range(32)], 1, 0.1) for i in range(2)]
    for name, parallel in cases.items():
        model = {"path": folder, "dtype": "bfloat16", "mtp_loss_weight": 0.3}
        cfg = Config(model=model, parallel=parallel | {"distributed_optimizer": True})
        world = join(cfg.parallel)
        policy = Policy(cfg, world)
        rows = pack_sequences(items, max_tokens=64, shards=world.dp_size, multiple=policy.row_multiple)
        kept = update(policy, *rows[world.dp_rank])
        found = measure(policy) | {"stage": world.pp_rank, "kept": kept}
        (out / f"{name}.{world.rank}.json").write_text(json.dumps(found))
        parallel_state.destroy_model_parallel()
    leave()


if __name__ == "__main__":
    main()
