#!/usr/bin/env bash
# Makes the generated parts of docs/ and builds the site into site/, strictly and without a network afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install --editable . --group docs
python scripts/docs.py
NO_MKDOCS_2_WARNING=1 exec mkdocs build --strict "$@"
