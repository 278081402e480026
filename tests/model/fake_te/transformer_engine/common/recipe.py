"""FAKE, see the package: the recipes that Megatron names; only block scaling does anything."""

from dataclasses import dataclass
from enum import Enum


class Format(Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


@dataclass
class Float8BlockScaling:
    fp8_format: Format = Format.E4M3


class DelayedScaling:
    pass
