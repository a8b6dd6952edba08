"""A checkpoint of random weights in the shape of a published model, and random tokens for it.

    python examples/synthetic.py llama-2-7b OUT [--layers 32] [--samples 8] [--sequence-length 512]

Makes a sharded bfloat16 checkpoint, to measure memory and speed with where the real one is too
large to get, and OUT/tokens.npy. A layer is made and written at a time.
"""

import argparse
from pathlib import Path

import ml_dtypes
import numpy as np

from prunetool.checkpoint.shards import TensorSpec
from prunetool.checkpoint.writer import CheckpointWriter, write_json
from prunetool.llama.config import parse_config
from prunetool.llama.weights import tensor_chunks

SHAPES = {
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": 16, "vocab_size": 128256,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "num_key_value_heads": 32, "num_hidden_layers": 32, "vocab_size": 32000,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    },
    "llama-3-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
        "num_key_value_heads": 8, "num_hidden_layers": 80, "vocab_size": 128256,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
}  # fmt: skip


def random_matrix(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal entries of the usual initialisation's size; a norm's weight is near one."""
    normal = random.standard_normal(shape, np.float32)
    values = 1 + 0.1 * normal if len(shape) == 1 else normal * shape[1] ** -0.5
    return values.astype(ml_dtypes.bfloat16)


def make_checkpoint(out: Path, shape: dict[str, object]) -> CheckpointWriter:
    """Write a checkpoint of these entries of config.json."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **shape,
    }
    chunks = [
        {name: TensorSpec("bfloat16", shape) for name, shape in chunk.items()}
        for chunk in tensor_chunks(parse_config(raw, out / "config.json"))
    ]
    random = np.random.default_rng(0)
    writer = CheckpointWriter(out)
    for _ in writer.write(
        chunks,
        lambda n: {name: random_matrix(random, spec.shape) for name, spec in chunks[n].items()},
        max_shard_bytes=5 * 10**9,
    ):
        pass
    write_json(out / "config.json", raw)
    writer.close()
    return writer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    given = parser.parse_args()
    shape = dict(SHAPES[given.shape])
    shape["num_hidden_layers"] = given.layers or shape["num_hidden_layers"]
    shape["vocab_size"] = given.vocab_size or shape["vocab_size"]
    made = make_checkpoint(given.out, shape)
    tokens = np.random.default_rng(1).integers(
        0, shape["vocab_size"], (given.samples, given.sequence_length), np.int32
    )
    np.save(given.out / "tokens.npy", tokens)
    print(f"{made.parameters:,} parameters, {made.size_bytes / 1e9:.2f} GB in {given.out}")


if __name__ == "__main__":
    main()
