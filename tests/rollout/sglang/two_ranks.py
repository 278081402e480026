"""What both ranks of a trainer run against real servers: export, refresh, verify, sample, compare.

two_ranks.py FOLDER URLS LAYOUT ROUTE OUT RECEIVERS: URLS are separated by commas, as are the parallel sizes of LAYOUT
that are 2, and RECEIVERS, which only their route takes; writes OUT/result.json.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

warnings.filterwarnings("ignore")

from r1engine.batch import Prompt, Sample, pack, to_sequences  # noqa: E402
from r1engine.config import RlConfig  # noqa: E402
from r1engine.data.question import Question  # noqa: E402
from r1engine.model.parallel import join, leave  # noqa: E402
from r1engine.model.policy import Policy  # noqa: E402
from r1engine.ranks import spread  # noqa: E402
from r1engine.rollout import generate  # noqa: E402
from r1engine.rollout.sglang.generator import SglangGenerator  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    folder, urls, layout, route, out = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], Path(sys.argv[5])
    cfg = RlConfig(
        run_dir=out / "run",
        model={"path": folder},
        parallel=dict.fromkeys(layout.split(","), 2),
        data={"max_prompt_tokens": 32},
        rollout={
            "engine": "sglang",
            "max_tokens": 64,
            "sglang": {
                "mode": "remote",
                "urls": urls.split(","),
                "key_variable": "R1_SERVERS_KEY",
                "route": route,
                "receivers": sys.argv[6].split(",") if route == "receivers" else [],
                "stall_seconds": 60.0,
                "bucket_mib": 1,
            },
        },
    )
    world = join(cfg.parallel)
    policy = Policy(cfg.model, cfg.parallel, cfg.optimizer, world)
    engine = SglangGenerator(cfg, world, dtype=torch.float32, note=print)
    engine.load_weights(policy.weights(dealt=engine.takes_shares))  # raises if a digest differs
    canary = engine.check_canaries(policy.logprobs, row_multiple=policy.row_multiple)
    prompts = [Prompt(i, [5 + i, 6, 7, 8 + i], "", Question("")) for i in range(4)]

    def draw(own: list[Prompt]) -> list:
        completions = generate(engine, own, num_samples=3, step=0, max_tokens=16)
        return [completions[i : i + 3] for i in range(0, len(completions), 3)]

    completions = [c for group in spread(prompts, world, draw) for c in group]
    samples = [Sample(c, 1.0) for c in completions]
    rows = pack(to_sequences(samples), policy.row_shape(512))[world.dp_rank]
    largest = max(
        float((logp - row.rollout_logp)[row.loss_weight != 0].abs().max())
        for row, logp in zip(rows, policy.logprobs(rows), strict=True)
    )
    if world.is_first:
        assert engine.report is not None
        share = engine.report.most_bytes / engine.report.num_bytes
        result = {"canary": canary, "logp_diff": largest, "samples": len(completions), "share": share}
        (out / "result.json").write_text(json.dumps(result))
    engine.close()
    leave()


if __name__ == "__main__":
    main()
