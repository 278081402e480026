"""The tests of the compiled CPU functions once more, under the address and undefined-behaviour sanitizers."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from r1kernels import cpu_lib

ROOT = Path(__file__).resolve().parents[2]
RUNTIMES = ["libasan.so", "libubsan.so", "libstdc++.so.6"]
# Memory of a vector behind its last number is out of bounds, too.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_SANITIZE_VECTOR=1"]


@pytest.mark.slow
@pytest.mark.skipif(cpu_lib.library_path() is None, reason="_cpu.so is not built: no C++ compiler")
def test_the_sanitizers_find_nothing(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    found = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in RUNTIMES]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("g++ has no sanitizers")
    library = tmp_path / cpu_lib.FILE_NAME
    machine = ["-march=x86-64-v3"] if platform.machine() == "x86_64" else []
    options = ["-std=c++17", "-O1", "-ffp-contract=fast", "-Wno-psabi", "-fPIC", "-shared", *machine, *SANITIZE]
    subprocess.run(["g++", *options, *(ROOT / "csrc" / "cpu").glob("*.cpp"), "-o", library], check=True)
    plugin = f"from r1kernels import cpu_lib\ncpu_lib.library_path = lambda: {str(library)!r}\n"
    (tmp_path / "sanitized.py").write_text(plugin)
    env = os.environ | {"LD_PRELOAD": ":".join(found), "PYTHONPATH": str(tmp_path)}
    env["ASAN_OPTIONS"] = "detect_leaks=0"  # Python's own
    file = Path(__file__).with_name("test_cpu_lib.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "sanitized", file]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
