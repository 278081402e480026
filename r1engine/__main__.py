"""The console script, also `python -m r1engine ...`; under torchrun: torchrun -m r1engine pipeline CONFIG."""

from __future__ import annotations

import sys

# What is not in the extra `train`, by the name it is imported under.
OTHER_EXTRAS = {"lingua": "lingua", "reasoning_gym": "gym", "wandb": "wandb", "pynvml": "gpu"}


def main() -> None:
    """Runs the command; names the extra whose packages are not installed.

    `pip install r1engine` installs the ops of r1kernels, which need PyTorch only, and this script with them.
    """
    try:
        from r1engine.cli import main as run

        run()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "r1engine", "r1kernels"):
            raise
        sys.exit(missing(package))


def missing(package: str) -> str:
    """What a user is told who lacks a package."""
    if package == "megatron" and sys.version_info >= (3, 13):
        found = ".".join(map(str, sys.version_info[:2]))
        return f"r1engine: found Python {found}, which Megatron-core has no release for; required Python 3.11 or 3.12"
    extra = OTHER_EXTRAS.get(package, "train")
    return f"r1engine: found no package {package}; required pip install 'r1engine[{extra}]'"


if __name__ == "__main__":
    main()
