"""Replaces functions of an installed trainer, and puts them back."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

_REPLACED: list[object] = []  # what active patches have put somewhere


class Seam(NamedTuple):
    """A name that a trainer looks up when it computes log-probabilities."""

    module: str
    name: str
    make: Callable[[Any, Patch], object]  # (what is there, the patch to count calls in) -> what is to be there
    everywhere: bool = True  # also in the package's modules that did `from ... import`


@dataclass
class Patch:
    """What `patch` has replaced; leaving it as a context manager, or `undo`, puts everything back."""

    trainer: str  # such as "trl 1.16.0"
    replaced: list[str] = field(default_factory=list)  # "module.name" of every place
    calls: Counter[str] = field(default_factory=Counter)  # calls that were served, by name
    notes: list[str] = field(default_factory=list)  # what stayed the trainer's, and why
    _undo: list[tuple[ModuleType, str, object]] = field(default_factory=list, repr=False)

    def note(self, text: str) -> None:
        """Keeps and logs, once, what is left to the trainer."""
        if text not in self.notes:
            self.notes.append(text)
            logging.getLogger("r1kernels").warning("%s: %s", self.trainer, text)

    def undo(self) -> None:
        """Puts back what was there; also in modules that imported a replacement meanwhile. Twice is once."""
        for module, name, original in reversed(self._undo):
            replacement = getattr(module, name)
            for holder, held in _holders(module.__name__.partition(".")[0], replacement):
                setattr(holder, held, original)
            _REPLACED[:] = [x for x in _REPLACED if x is not replacement]
        self._undo.clear()

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{self.trainer}: r1kernels in the place of"]
        lines += [f"  {place} ({self.calls[place.rpartition('.')[2]]} calls)" for place in self.replaced]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def patch_package(package: str, distribution: str, seams: tuple[Seam, ...], tried: str) -> Patch:
    """Replaces the seams that the installed version has.

    Args:
        package:      top-level module.
        distribution: its name for pip.
        seams:        where the versions that were tried call their log-probabilities.
        tried:        these versions, for the message.

    Raises:
        RuntimeError: the package is not installed, has none of the seams, or is patched already.
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise RuntimeError(f"r1kernels.integrations: found no {package}; required pip install {distribution}") from None
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    patch = Patch(f"{package} {version}")
    for seam in seams:
        module = _imported(seam.module)
        # None also where a version defines a name only beside a package that is not installed.
        if module is None or (original := getattr(module, seam.name, None)) is None:
            continue
        if any(original is x for x in _REPLACED):
            patch.undo()
            raise RuntimeError(f"r1kernels.integrations: {patch.trainer} is patched already; undo that patch first")
        _replace(patch, module, seam, original)
    if not patch.replaced:
        wanted = ", ".join(f"{seam.module}.{seam.name}" for seam in seams)
        raise RuntimeError(
            f"r1kernels.integrations: found none of the functions to replace in {patch.trainer}; required one of "
            f"{wanted} (tried with {tried})"
        )
    logging.getLogger("r1kernels").info("%s", patch)
    return patch


def _replace(patch: Patch, module: ModuleType, seam: Seam, original: object) -> None:
    replacement = seam.make(original, patch)
    if replacement is original:
        return  # noted why
    _REPLACED.append(replacement)
    places = [(module, seam.name)]
    if seam.everywhere:
        package = module.__name__.partition(".")[0]
        places += [place for place in _holders(package, original) if place != (module, seam.name)]
    for holder, name in places:
        setattr(holder, name, replacement)
        patch.replaced.append(f"{holder.__name__}.{name}")
    patch._undo.append((module, seam.name, original))


def _imported(name: str) -> ModuleType | None:
    """The module, or None where this version has none of that name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # it is there, and lacks something else
        return None


def _holders(package: str, what: object) -> list[tuple[ModuleType, str]]:
    """Every module of the package that has `what`, and under which name."""
    return [
        (module, name)
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType) and module.__name__.partition(".")[0] == package
        for name, value in list(vars(module).items())
        if value is what
    ]


def counted(name: str, function: Callable[..., object]) -> Callable[[Any, Patch], object]:
    """For `Seam.make`: `function` itself, with its calls counted under `name`."""

    def make(original: object, patch: Patch) -> object:
        def replacement(*args: object, **options: object) -> object:
            patch.calls[name] += 1
            return function(*args, **options)

        replacement.__doc__, replacement.__name__ = function.__doc__, name
        return replacement

    return make
