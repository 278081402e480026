"""Public sets of questions by name (`data.preset`): which of their columns is which."""

from __future__ import annotations

from dataclasses import replace

from r1engine.config import RlConfig
from r1engine.data.reading import Reading

# As the sets stand on the Hugging Face Hub; where a set has a reference beside the solution, that one is taken.
PRESETS: dict[str, Reading] = {
    "gsm8k": Reading({"question": "question", "answer": "answer"}, "hashes"),  # openai/gsm8k
    "math": Reading({"question": "problem", "answer": "solution"}, "boxed"),  # MATH: DigitalLearningGmbH/MATH-lighteval
    "dapo_math": Reading(  # BytedTsinghua-SIA/DAPO-Math-17k
        {"question": "prompt", "answer": "reward_model.ground_truth"},
        "value",
        around=(
            "Solve the following math problem step by step. The last line of your response should be of the form "
            "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n",
            '\n\nRemember to put your answer on its own line after "Answer:".',
        ),
    ),
    "deepscaler": Reading({"question": "problem", "answer": "answer"}),  # agentica-org/DeepScaleR-Preview-Dataset
    "openr1_math": Reading({"question": "problem", "answer": "answer"}),  # open-r1/OpenR1-Math-220k
    "numinamath": Reading({"question": "problem", "answer": "solution"}, "boxed"),  # AI-MO/NuminaMath-CoT
    "big_math": Reading(  # SynthLabsAI/Big-Math-RL-Verified, whose domain is a list of paths
        {"question": "problem", "answer": "answer"}, foreign=("domain",)
    ),
}


def reading_of(cfg: RlConfig) -> Reading:
    """How a run reads its questions."""
    data, keeps = cfg.data, bool(cfg.rewards.functions)
    if data.preset is not None:
        made = PRESETS[data.preset]
        return replace(made, name=f"data.preset {data.preset}", keeps_columns=keeps)
    return Reading(data.columns, data.answer_form, keeps_columns=keeps)
