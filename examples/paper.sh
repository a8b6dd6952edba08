#!/bin/sh
# The papers' experiments on a model: paper.sh MODEL CALIBRATION TEST OTHER DIRECTORY [ROWS…]
#
# Tables (CSV, Markdown) and plots (SVG, PNG) in DIRECTORY: examples/papers.md says which is which
# table or figure. Needs prunetool[plots], transformers and torch. ROWS are options of quality.py
# that limit its rows: --seed 0 --sparsity 0.2. All of it takes days on two cores; what is there is
# not made again.
set -eu
here=$(dirname "$0")
model=$1 text=$2 test=$3 other=$4 out=$5
shift 5
mkdir -p "$out"

for table in published "every method" samples; do
    file=$out/$(echo "$table" | tr ' ' '-')
    python "$here/quality.py" "$model" "$text" "$test" "$other" "$out/quality.csv" \
        --rows "$table" "$@"
    python "$here/quality.py" "$model" "$text" "$test" "$other" "$out/quality.csv" \
        --table "$table" --plot "$file.svg" > "$file.md"
done

# Speed and memory by the fraction removed; which units go makes no difference.
prunetool calibrate "$model" --text "$text" --samples 2 --gradients 0 \
    --work "$out/speed.prunetool" -o "$out/speed.jsonl"
for sparsity in 0.1 0.2 0.3 0.4 0.5; do
    [ -f "$out/speed-$sparsity/model.safetensors.index.json" ] ||
        prunetool score "$out/speed.jsonl" --method magnitude --allocation uniform \
            --sparsity "$sparsity" | prunetool export "$out/speed-$sparsity"
done
if [ ! -f "$out/speed.json" ]; then
    prunetool bench "$model" "$out"/speed-0.? --prompt 64 --plot "$out/speed.svg" > "$out/speed.part"
    mv "$out/speed.part" "$out/speed.json"
fi

python "$here/attention.py" "$out/attention.csv" --table --plots "$out" > "$out/attention.md"
python "$here/masks.py" "$model" "$text" "$test" "$out/masks.csv"
python "$here/masks.py" "$model" "$text" "$test" "$out/masks.csv" --table > "$out/masks.md"
