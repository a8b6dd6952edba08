#!/usr/bin/env bash
# Accuracy of a checkpoint on the sets that papers about pruning report, by lm-evaluation-harness
# (pip install 'lm-eval[hf]'), which downloads them. Its names of tasks were looked up; nothing was run yet.
# The first seven need no examples in the prompt.
#   examples/tasks.sh OUT [results]
set -euo pipefail
out=$1 results=${2:-results}
evaluate() {
    lm_eval run --model hf --model_args "pretrained=$out,trust_remote_code=True" \
        --batch_size auto --output_path "$results" "$@"
}
evaluate --tasks boolq,piqa,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa
evaluate --tasks mmlu --num_fewshot 5
evaluate --tasks gsm8k --num_fewshot 5
