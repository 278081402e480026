"""The typed configuration: one class for each kind of stage, whose defaults are the paper's. No torch.

A YAML file holds only what differs. `r1engine config --defaults [KIND]` prints every key of a kind of stage with its
meaning.
"""

from __future__ import annotations

from r1engine.config.curate import CurateConfig
from r1engine.config.drawing import DrawingConfig
from r1engine.config.evaluate import EvaluateConfig
from r1engine.config.kind import KindConfig
from r1engine.config.label import LabelConfig, Labelling
from r1engine.config.pairs import PairJudge, PairsConfig
from r1engine.config.process import ProcessRewardConfig, ProcessTraining, StepData, StepMarking, StepScorerSection
from r1engine.config.read import KINDS, check_files, check_world, dump, load, load_rewards, to_yaml
from r1engine.config.reward_model import RatedData, RewardModelConfig, RewardTraining
from r1engine.config.rewards import GradingServer, JudgeServer, RewardModelServer, Rewards
from r1engine.config.rl import Grpo, QuestionData, RlConfig, SampledEvaluation
from r1engine.config.rollout import Rollout, Sglang
from r1engine.config.sample import SampleConfig
from r1engine.config.search import Search
from r1engine.config.search_data import SearchDataConfig
from r1engine.config.searching import SearchConfig
from r1engine.config.sft import Sft, SftConfig, TextData
from r1engine.config.source import ConfigError
from r1engine.config.stage import Checkpoint, Data, Evaluation, Log, Model, Optimizer, Parallel, StageConfig
from r1engine.config.tiny import TinyConfig
from r1engine.config.tiny_chain import TinyChainConfig, TinyChainReportConfig, TinyChainTruthConfig
from r1engine.config.tiny_r1 import TinyR1Config

__all__ = [
    "KINDS", "Checkpoint", "ConfigError", "CurateConfig", "Data", "DrawingConfig", "EvaluateConfig", "Evaluation",
    "GradingServer", "Grpo", "JudgeServer", "KindConfig", "LabelConfig", "Labelling", "Log", "Model", "Optimizer",
    "PairJudge", "PairsConfig", "Parallel", "ProcessRewardConfig", "ProcessTraining", "QuestionData", "RatedData",
    "RewardModelConfig", "RewardModelServer", "RewardTraining", "Rewards", "RlConfig", "Rollout", "SampleConfig",
    "SampledEvaluation", "Search", "SearchConfig", "SearchDataConfig", "Sft", "SftConfig", "Sglang", "StageConfig",
    "StepData", "StepMarking", "StepScorerSection", "TextData", "TinyChainConfig", "TinyChainReportConfig",
    "TinyChainTruthConfig", "TinyConfig", "TinyR1Config", "check_files", "check_world", "dump", "load",
    "load_rewards", "to_yaml",
]  # fmt: skip
