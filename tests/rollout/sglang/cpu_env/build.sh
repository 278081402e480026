#!/usr/bin/env bash
# build.sh VENV: makes a virtual environment that runs an unmodified sglang server on CPUs. For tests only.
set -euo pipefail
trap 'echo "sglang-cpu: the environment in $1 could not be built (see above); it needs Python 3.11 and the packages of" \
    "tests/rollout/sglang/cpu_env from a package index" >&2' ERR
here=$(cd "$(dirname "$0")" && pwd)
venv=$1
test -x "$venv/bin/python" || "${PYTHON:-python3.11}" -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0
"$venv/bin/pip" install --quiet --no-deps sglang==0.5.23 torchvision==0.28.0 apache-tvm-ffi==0.1.11 \
    xgrammar==0.2.7 compressed-tensors==0.18.0
"$venv/bin/pip" install --quiet --requirement "$here/requirements.txt"
# Found through a .pth file, not PYTHONPATH: the hook must be there before any import of transformers.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\nimport sglang_on_cpu\n' "$here" >"$site/zz_sglang_on_cpu.pth"
