"""A pytest plugin (`-p bare_machine`): the packages that a bare GPU machine lacks are not found."""

import sys
from typing import Any

LACKS = {"megatron", "pydantic", "ruamel", "math_verify", "plotly", "py3langid"}


class _Without:
    """A finder of modules that does not find these."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in LACKS else self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


sys.meta_path[:] = [_Without(finder) for finder in sys.meta_path]
