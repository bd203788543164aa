#!/usr/bin/env bash
# Everything that only a GPU can tell, in at most nine minutes, without a network, the most important first:
#   bash benchmarks/gpu.sh FOLDER            each part writes its record into FOLDER as soon as it is done
#   bash benchmarks/gpu.sh FOLDER --small    the same parts on a CPU, at sizes that say nothing: the script still works
# A part that fails or runs over its time does not stop the others; the exit status is then 1.
set -uo pipefail
out="${1:?usage: bash benchmarks/gpu.sh FOLDER [--small]}"
small="${2:-}"
mkdir -p "$out" && out="$(cd "$out" && pwd)"
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONPATH="src:benchmarks${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python}"
failed=0
slower=1 && [ "$small" = --small ] && slower=10  # a CPU is given more time

# part SECONDS NAME COMMAND...: runs one part and tells how it ended.
part() {
    local limit=$(($1 * slower)) name="$2" started=$SECONDS status=0
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    [ "$status" = 0 ] || failed=1
    printf '%-22s exit %-4s %4d s of %s\n' "$name" "$status" $((SECONDS - started)) "$limit" | tee -a "$out/parts.txt"
}
benchmark() {
    local limit="$1" name="$2" script="$3"
    shift 3
    part "$limit" "$name" "$python" "benchmarks/$script.py" "$@" --json "$out/$name.json"
}

: >"$out/parts.txt"
if [ "$small" = --small ]; then
    shape=(--hidden 64 --intermediate 128 --layers 1 --vocabulary 128 --tokens 64)
    one="${shape[*]}" three="${shape[*]}" seven="${shape[*]}"
    layers=(--shapes 64x48 --tokens 32 --ranks 4) rounds=(--rounds 1 --device cpu --threads 1)
    start=(--parts svd --side 64 --r 4) plan=(--hidden 64 --intermediate 128 --layers 1 --vocabulary 128 --length 32)
    answer=(--prompt 8 --new 2 --layers 1)
else
    # Shapes of models with 1, 3 and 7 billion parameters, with fewer of their equal layers.
    one="--hidden 2048 --intermediate 5632 --layers 6 --vocabulary 32000 --tokens 2048"
    three="--hidden 3072 --intermediate 8192 --layers 6 --vocabulary 32000 --tokens 2048"
    seven="--hidden 4096 --intermediate 11008 --layers 6 --vocabulary 32000 --tokens 2048"
    layers=(--shapes 4096x4096,11008x4096 --tokens 4096 --ranks 16,64,128) rounds=(--rounds 7 --device cuda)
    start=(--parts svd --side 4096 --r 16)
    plan=(--hidden 4096 --intermediate 11008 --layers 4 --vocabulary 32000 --length 1024 --dtype bfloat16)
    answer=(--prompt 128 --new 64)
fi
cases="DuDe,PEFT DoRA,our lora"
# The options of a shape are words without spaces, so that they may be split.
# shellcheck disable=SC2086
{
    part 80 kernels-correct "$python" -m pytest -q -p no:cacheprovider tests/test_kernels.py -m "not slow"
    benchmark 80 step-7b step model --dtype bfloat16 $seven --cases "$cases" "${rounds[@]}"
    [ "$small" = --small ] || benchmark 60 kernels-bandwidth gpu_kernels
    benchmark 50 step-layers step layer --dtype bfloat16 "${layers[@]}" --cases "DuDe,our lora" "${rounds[@]}"
    benchmark 40 step-7b-checkpointed step model --dtype bfloat16 $seven --cases DuDe --checkpointing "${rounds[@]}"
    benchmark 60 step-7b-compiled step model --dtype bfloat16 $seven --cases DuDe --compile "${rounds[@]}"
    benchmark 40 plan plan "${plan[@]}" "${rounds[@]}"
    benchmark 30 start init "${start[@]}" "${rounds[@]}"
    benchmark 40 decoding generate --dtype bfloat16 "${answer[@]}" "${rounds[@]}"
    benchmark 30 step-3b step model --dtype bfloat16 $three --cases DuDe "${rounds[@]}"
    benchmark 30 step-1b step model --dtype bfloat16 $one --cases DuDe "${rounds[@]}"
}
exit "$failed"
