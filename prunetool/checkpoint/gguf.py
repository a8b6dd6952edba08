"""A llama GGUF file -> the tensors and config.json of a Hugging Face checkpoint.

The gguf library reads and dequantises; what is ours is the way back: llama.cpp's converter
interleaves the rows of q and k for its rotary embedding, and turns rope scaling into a tensor.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from prunetool.errors import ConfigError

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
# What Llama 3.1 to 3.3 were published with; a GGUF keeps only the resulting factors.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL = 1.0, 4.0, 8192


class GGUFModel:
    """A GGUF file of architecture llama.

    Raises:
      ConfigError: not GGUF, another architecture, or a variant that is no plain Llama.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except FileNotFoundError:
            raise ConfigError(path, "no such file", "give a .gguf file") from None
        except (ValueError, IndexError, OSError, KeyError, AssertionError) as error:
            raise ConfigError(path, f"cannot be read as GGUF ({error})", "get it again") from error
        architecture = self.value("general.architecture")
        if architecture != "llama":
            raise ConfigError(path, f"architecture {architecture!r}", "only llama is converted")
        if self.value("llama.expert_count", 0):
            raise ConfigError(path, "is a mixture of experts", "only dense models are converted")
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        known = {*GLOBAL_NAMES, ROPE_FACTORS}
        for name in self._tensors:
            parts = name.split(".")
            if name not in known and not (
                len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES
            ):
                raise ConfigError(path, f"tensor {name} is unknown", "only llama is converted")

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value, or ``default``."""
        found = self._reader.get_field(key)
        return default if found is None else found.contents()

    def required(self, key: str) -> Any:
        """A metadata value that must be there."""
        found = self.value(key)
        if found is None:
            raise ConfigError(self.path, f"has no {key}", "get the file again")
        return found

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.required("llama.block_count"))

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        default = self.required("llama.embedding_length") // self.required(
            "llama.attention.head_count"
        )
        return int(self.value("llama.attention.key_length", default))

    def config(self, dtype: str) -> dict[str, Any]:
        """The config.json of the model.

        Raises:
          ConfigError: where a value is missing or the rotary scaling is not one we know.
        """
        vocabulary = self._tensors.get("token_embd.weight")
        if vocabulary is None:
            raise ConfigError(self.path, "has no token_embd.weight", "get the file again")
        heads = self.required("llama.attention.head_count")
        rotated = self.value("llama.rope.dimension_count", self.head_dim)
        if rotated != self.head_dim:
            raise ConfigError(
                self.path, f"rotates {rotated} of {self.head_dim} dimensions", "not computed here"
            )
        if not isinstance(heads, int):
            raise ConfigError(self.path, "has layers of different head counts", "not converted")
        theta = float(self.value("llama.rope.freq_base", 10000.0))
        theta = int(theta) if theta.is_integer() else theta
        scaling = self._rope_scaling(theta)
        # The header stores float32; its shortest decimal is what config.json said.
        eps = float(str(np.float32(self.required("llama.attention.layer_norm_rms_epsilon"))))
        names = set(self._tensors)
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": "blk.0.attn_q.bias" in names,
            "bos_token_id": self.value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.value("tokenizer.ggml.eos_token_id"),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.required("llama.embedding_length"),
            "intermediate_size": self.required("llama.feed_forward_length"),
            "max_position_embeddings": self.required("llama.context_length"),
            "mlp_bias": "blk.0.ffn_gate.bias" in names,
            "model_type": "llama",
            "num_attention_heads": heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.value("llama.attention.head_count_kv", heads),
            "pad_token_id": self.value("tokenizer.ggml.padding_token_id"),
            "rms_norm_eps": eps,
            "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": theta},
            "rope_scaling": scaling,
            "rope_theta": theta,
            "tie_word_embeddings": "output.weight" not in names,
            "torch_dtype": dtype,
            "transformers_version": "5.0.0",
            "vocab_size": int(vocabulary.shape[1]),
        }

    def _rope_scaling(self, theta: float) -> dict[str, Any] | None:
        kind = self.value("llama.rope.scaling.type", "none")
        if ROPE_FACTORS in self._tensors:
            return self._llama3_scaling(theta)
        if kind == "none":
            return None
        factor = float(self.required("llama.rope.scaling.factor"))
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            original = self.required("llama.rope.scaling.original_context_length")
            return {
                "rope_type": "yarn", "factor": factor,
                "original_max_position_embeddings": original,
            }  # fmt: skip
        raise ConfigError(self.path, f"rope scaling {kind!r}", "known: linear, yarn, llama3")

    def _llama3_scaling(self, theta: float) -> dict[str, Any]:
        """Llama 3's parameters from the divisors of the frequencies, checked by making them."""
        divisors = self._read(ROPE_FACTORS).astype(np.float64)
        factor = float(np.float32(divisors.max()))
        inverse = theta ** -(np.arange(0, self.head_dim, 2) / self.head_dim)
        turns = LLAMA3_ORIGINAL * inverse / (2 * np.pi)
        blend = np.clip((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0, 1)
        if not np.allclose(1 / ((1 - blend) / factor + blend), divisors, rtol=1e-4):
            raise ConfigError(
                self.path, f"{ROPE_FACTORS} is not Llama 3's scaling", "not converted"
            )
        return {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": LLAMA3_LOW,
            "high_freq_factor": LLAMA3_HIGH, "original_max_position_embeddings": LLAMA3_ORIGINAL,
        }  # fmt: skip

    def shards(self) -> Iterator[dict[str, np.ndarray]]:
        """The checkpoint's tensors, float32: one dict a layer, then one of all that is global."""
        for layer in range(self.layers):
            shard = {}
            for ours, theirs in LAYER_NAMES.items():
                for kind in ("weight", "bias"):
                    name = f"blk.{layer}.{ours}.{kind}"
                    if name in self._tensors:
                        array = self._unpermuted(name, ours)
                        shard[f"model.layers.{layer}.{theirs}.{kind}"] = array
            yield shard
        yield {
            theirs: self._read(ours)
            for ours, theirs in GLOBAL_NAMES.items()
            if ours in self._tensors
        }

    def _unpermuted(self, name: str, part: str) -> np.ndarray:
        """A tensor with the rows of q and k back in half-split order, as Hugging Face has it."""
        array = self._read(name)
        if part not in ("attn_q", "attn_k"):
            return array
        pairs = array.reshape(-1, self.head_dim // 2, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)

    def _read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        except NotImplementedError:
            raise ConfigError(
                self.path,
                f"{name} is {tensor.tensor_type.name}",
                "convert from another quantisation",
            ) from None
