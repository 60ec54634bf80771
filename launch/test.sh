#!/usr/bin/env bash
# From a fresh clone to the passed tests.
#
#   bash launch/test.sh                      # installs into .venv (once), then runs the tests
#   bash launch/test.sh -k estimators -x     # anything after it goes to pytest
#   bash launch/test.sh --slow               # the long ones too
#   bash launch/test.sh --faults -k faults   # runs that are killed: 20 of them, not 1
#   bash launch/test.sh -n 0                 # in one process, with output as it comes; two workers otherwise
#
# Needs a C++ compiler: the DeepSpeed tests compile one small op, once. PYTHON, REFKL_VENV and pip's own variables are
# honoured (launch/common.sh says how).
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

refkl_need_compiler
refkl_environment dev,demo,deepspeed
export HF_HUB_OFFLINE=1
# launchers and compilers that the tests start (accelerate, deepspeed, ninja) are looked up on PATH
export PATH="$REFKL_VENV/bin:$PATH"
# the tests' tensors are tiny: a thread for each worker is quicker than two that wait for each other
export OMP_NUM_THREADS=1
say "python -m pytest -n 2 $*"
exec "$PY" -m pytest -n 2 "$@"
