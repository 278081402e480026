"""Prints the parameters of every stage of a true Megatron model: build_stages.py FOLDER PARALLEL GPUS MTP_WEIGHT."""

import json
import sys
from pathlib import Path

from r1engine.config import Config, Model, Parallel
from r1engine.hf.architecture import read_architecture
from r1engine.model.stage_sizes import stage_parameters

arch = read_architecture(Path(sys.argv[1]))
cfg = Config(parallel=Parallel(**json.loads(sys.argv[2])), model=Model(mtp_loss_weight=float(sys.argv[4])))
print(json.dumps([sum(names.values()) for names in stage_parameters(arch, cfg, int(sys.argv[3]))]))
