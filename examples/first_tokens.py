"""How many tokens of the vocabulary are no attention sink when a text begins with them.

    python examples/first_tokens.py MODEL [PRUNED …]

In a model whose texts begin with no fixed token, the residual stream of the first one becomes
large, whichever it is, and later tokens attend to it. Each entry of the vocabulary is run alone
through the first half of the layers, in transformers; one whose stream stays below a tenth of the
median norm in MODEL is counted. Needs the test extra (torch, transformers).
"""

import argparse

import torch
from transformers import AutoModelForCausalLM

BATCH = 2048
LARGE = 0.1  # of the first model's median


@torch.inference_mode()
def norms(path: str) -> torch.Tensor:
    """‖h‖ of every token after the first half of the layers, alone in its text, (V,)."""
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True)
    half, ids = whole.model, torch.arange(whole.config.vocab_size)
    half.layers, half.norm = half.layers[: len(half.layers) // 2], torch.nn.Identity()
    batches = ids[:, None].split(BATCH)
    return torch.cat([half(batch, use_cache=False)[0][:, 0].norm(dim=-1) for batch in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    given = parser.parse_args()
    least = None
    for path in given.models:
        found = norms(path)
        least = LARGE * found.median() if least is None else least
        share = (found < least).float().mean()
        print(f"{path}: {share:.3%} of {len(found):,} tokens stay below {least:.0f}")


if __name__ == "__main__":
    main()
