#!/bin/sh
# Several sparsities from one calibration: sweep.sh MODEL TEXT DIRECTORY SPARSITY…
set -eu
model=$1 text=$2 out=$3
shift 3
mkdir -p "$out"
prunetool calibrate "$model" --text "$text" --samples "${SAMPLES:-32}" \
    --sequence-length "${LENGTH:-2048}" --work "$out/work" -o "$out/stats.jsonl"
for sparsity; do
    prunetool score --sparsity "$sparsity" "$out/stats.jsonl" \
        | prunetool compensate \
        | prunetool export "$out/pruned-$sparsity"
done
