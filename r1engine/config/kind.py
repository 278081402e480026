"""What every kind of stage has, whether it trains or not: a name, a folder, a seed, inputs, and what it makes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from r1engine.config.section import Count, LocalPath, Section


class KindConfig(Section):
    """The keys of every stage. A kind that trains nothing is this, a row in `KINDS` and one in pipeline/kinds.py."""

    # What the stage makes: name -> path in its folder. Of these "model" and "data" are what its bare name stands for.
    MAKES: ClassVar[dict[str, str]] = {}
    # Keys of it, beside those of every kind, that do not change what comes out.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ()
    # Whether the first rank does it while the others wait at the file system, however long it takes.
    ALONE: ClassVar[bool] = False

    stage: str = ""
    """Kind of stage."""
    run_dir: LocalPath = Path("runs/default")
    """Folder of the stage."""
    seed: Count = 0
    """Seed of everything that is drawn at random."""

    def inputs(self) -> dict[str, Path]:
        """Key -> file or folder that the stage reads."""
        return {}

    def source_problems(self) -> list[str]:
        """What the configuration lacks to find what it reads. Checked by `load`, not by the class."""
        return []
