#!/bin/sh
# The whole run as one pipe: pipe.sh MODEL TEXT OUT [SPARSITY]
set -eu
prunetool calibrate "$1" --text "$2" --samples "${SAMPLES:-32}" --sequence-length "${LENGTH:-2048}" \
    | prunetool score --sparsity "${4:-0.2}" \
    | prunetool compensate \
    | prunetool export "$3"
