"""Runs a command as a user without privileges, for tests that root starts.

Root's own folder is closed to others, and Python may be in it; in a mount namespace only what is needed of it shows.
"""

import sys
from pathlib import Path

from r1engine.rewards.sandbox.protection import probe

ROOT = Path(__file__).parents[2]
USER = 54_321
_BECOME = """
import os, runpy, sys
os.setgroups([]); os.setresgid({user}, {user}, {user}); os.setresuid({user}, {user}, {user})
sys.path[:] = {path!r}
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def as_ordinary_user(module: str, *arguments: str) -> list[str]:
    """Command that runs `python -m module` as that user; root only."""
    command = [probe().bwrap, "--dev-bind", "/", "/", "--cap-add", "ALL", "--perms", "0755", "--tmpfs", "/root"]
    paths = {sys.base_prefix, sys.prefix, str(ROOT), *sys.path}
    shown = [Path(path) for path in paths if path.startswith("/root/") and Path(path).exists()]
    for path in sorted(shown):
        for parent in reversed(path.parents):
            if parent.is_relative_to("/root") and parent != Path("/root"):
                command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", str(path), str(path)]
    code = _BECOME.format(user=USER, path=[path for path in sys.path if path])
    return [*command, "--chdir", str(ROOT), "--", sys.executable, "-B", "-c", code, module, *arguments]
