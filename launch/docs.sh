#!/usr/bin/env bash
# From a fresh clone to the documentation as a folder of pages, to open in a browser.
#
#   bash launch/docs.sh             # builds site/; a warning, such as for a link that leads nowhere, is an error
#   bash launch/docs.sh FOLDER      # builds it there
#   .venv/bin/mkdocs serve          # afterwards: with search, and built anew when a page is saved
#
# Reads the sources and does not run them. PYTHON, REFKL_VENV and pip's own variables are honoured (launch/common.sh
# says how).
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

refkl_environment docs
export NO_MKDOCS_2_WARNING=1 # the theme's word on its successor, at each start
say "python -m mkdocs build --strict --site-dir ${1:-site}"
exec "$PY" -m mkdocs build --strict --site-dir "${1:-site}"
