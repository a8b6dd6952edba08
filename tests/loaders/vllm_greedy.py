"""Print the ids with which vLLM continues a prompt: MODEL IDS COUNT."""

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"


def main() -> None:
    from vllm import LLM, SamplingParams

    model, ids, count = sys.argv[1:]
    llm = LLM(
        model, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=128,
        skip_tokenizer_init=True,
    )  # fmt: skip
    how = SamplingParams(temperature=0, max_tokens=int(count), ignore_eos=True, detokenize=False)
    made = llm.generate([{"prompt_token_ids": json.loads(ids)}], how)
    print(json.dumps(list(made[0].outputs[0].token_ids)))


if __name__ == "__main__":  # vLLM imports this file again
    main()
