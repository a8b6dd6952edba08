#!/bin/sh
# Prune a model through the pipe, and print its size and perplexity before and after.
#   demo.sh MODEL CALIBRATION_TEXT HELD_OUT_TEXT SPARSITY DIRECTORY
set -eu
model=$1 text=$2 held_out=$3 sparsity=$4 out=$5/pruned
prunetool=${BIN:+$BIN/}prunetool
python=${BIN:+$BIN/}python3
samples=${SAMPLES:-32} measured=${MEASURED:-8} length=${LENGTH:-1024}

measure() {
    "$prunetool" evaluate "$1" --text "$held_out" --samples "$measured" --sequence-length "$length"
}

"$prunetool" calibrate "$model" --text "$text" --samples "$samples" --sequence-length "$length" \
    --work "$5/work" --overwrite \
    | "$prunetool" score --sparsity "$sparsity" \
    | "$prunetool" compensate \
    | "$prunetool" export "$out" --overwrite
measure "$model" > "$5/before.json"
measure "$out" > "$5/after.json"

"$python" - "$model" "$out" "$5" <<'PYTHON'
import json, sys
from pathlib import Path

model, out, where = map(Path, sys.argv[1:])
sizes = [sum(f.stat().st_size for f in d.glob("*.safetensors")) / 1e6 for d in (model, out)]
before, after = (json.loads((where / f"{n}.json").read_text()) for n in ("before", "after"))
print(f"{'':22}{'before':>14}{'after':>14}")
print(f"{'parameters':22}{before['parameters']:>14,}{after['parameters']:>14,}")
print(f"{'file size, MB':22}{sizes[0]:>14.1f}{sizes[1]:>14.1f}")
print(f"{'perplexity':22}{before['perplexity']:>14.3f}{after['perplexity']:>14.3f}")
print(f"on {after['tokens']:,} tokens of held-out text; the pruned model is in {out}")
PYTHON
