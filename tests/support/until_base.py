"""Runs the first two stages of the demo's pipeline: until_base.py CONFIG [key=value ...]."""

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

warnings.filterwarnings("ignore")


def main() -> None:
    from r1engine.config.pipeline import load_pipeline
    from r1engine.pipeline.driver import run_pipeline

    os.chdir(Path(sys.argv[1]).parents[1])
    pipeline = load_pipeline(Path(sys.argv[1]), sys.argv[2:])
    run_pipeline(replace(pipeline, stages=pipeline.stages[:2]))


if __name__ == "__main__":
    main()
