"""A GGUF file, or all parts of a split one -> a checkpoint's tensors and config.json.

The gguf library reads and dequantises; this module undoes what llama.cpp's converter did: it
interleaves the rows of q and k for its rotary embedding (for llama, which includes Mistral, but not
for qwen2 and qwen3), and turns rope scaling into a tensor.
Keys and their defaults are read as llama.cpp reads them (src/llama-model.cpp, load_hparams).
"""

import glob
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from prunetool.checkpoint import checksum
from prunetool.checkpoint.rotary import half_split
from prunetool.errors import ConfigError

GLOBAL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Supported architectures, and the class of each.
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "deci": "PrunedLlamaForCausalLM",  # layers of unequal sizes
}
UNEQUAL, UNEQUAL_TYPE = "deci", "pruned_llama"
INTERLEAVED = ("llama", UNEQUAL)  # whose rows of q and k are
ROPE_FACTORS = "rope_freqs.weight"
UNUSED = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")  # llama.cpp makes these frequencies itself
BLOCK = re.compile(r"blk\.(\d{1,9})\.")
PART_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
# What Llama 3.1 to 3.3 were published with; a GGUF keeps only the resulting factors.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL = 1.0, 4.0, 8192

# Most that a damaged or forged count may make the reader hold; no model comes near.
MOST_TENSORS, MOST_STRINGS = 1 << 17, 1 << 21
FLOATS = (
    gguf.GGMLQuantizationType.F32,
    gguf.GGMLQuantizationType.F16,
    gguf.GGMLQuantizationType.BF16,
)
CHECKED_VALUES = 1 << 22  # values of a tensor checked at a time

# Architecture keys that are read here, and those that do not change the result.
READ_KEYS = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count",
    "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.attn_factor", "rope.scaling.original_context_length",
    "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scaling.finetuned", "tensor_data_layout", "attention.layer_norm_epsilon",
}  # fmt: skip
# Other keys that llama.cpp knows, with the values that leave the model plain.
PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
}
TYPES = {int: "integer", float: "float", str: "string", bool: "boolean"}  # as a GGUF names them
# Special tokens of a SentencePiece vocabulary if its header does not name them.
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}


class GGUFModel:
    """A model in a GGUF file, or in several that were split.

    Args:
      path: the file, or any part of a split model; the others are expected beside it.

    Raises:
      ConfigError: not GGUF, damaged, a part missing, another architecture, or a variant that is
        not plain.
    """

    def __init__(self, path: Path) -> None:
        readers = _open_parts(path)
        self.parts = list(readers)
        self.path = self.parts[0]
        self._reader = readers[self.path]
        self._tensors: dict[str, gguf.ReaderTensor] = {}
        self._files: dict[str, Path] = {}
        for part, reader in readers.items():
            for tensor in reader.tensors:
                if tensor.name in self._tensors:
                    other = self._files[tensor.name].name
                    raise ConfigError(
                        part, f"tensor {tensor.name} is also in {other}", "download all parts again"
                    )
                self._tensors[tensor.name], self._files[tensor.name] = tensor, part
        self.architecture = self.required("general.architecture", str)
        if self.architecture not in CLASSES:
            raise ConfigError(
                self.path, f"architecture {self.architecture!r}", f"supported: {', '.join(CLASSES)}"
            )
        self._refuse_variants()
        self.layers = self.required(self.key("block_count"), int)
        blocks = {int(found[1]) for name in self._tensors if (found := BLOCK.match(name))}
        if len(blocks) != self.layers or not blocks:
            raise ConfigError(
                self.path,
                f"{self.key('block_count')} = {self.layers}, but there are tensors for "
                f"{len(blocks)} blocks",
                "download it again",
            )
        self.heads = max(self._counts("attention.head_count"))
        self.head_dim = self._head_dim()

    def _refuse_variants(self) -> None:
        for key in self._reader.fields:
            name = key.removeprefix(self.key(""))
            if name == key or name in READ_KEYS:
                continue
            value, plain = _contents(self.path, self._reader, key), PLAIN_VALUES.get(name, ())
            if value not in plain:
                todo = f"supported: {' or '.join(map(str, plain))}" if plain else "unknown key"
                raise ConfigError(self.path, f"{key} = {value!r} is not supported", todo)

    def key(self, name: str) -> str:
        """The metadata key of one of the architecture's settings."""
        return f"{self.architecture}.{name}"

    def has(self, key: str) -> bool:
        """Whether the metadata has a value for this key."""
        return key in self._reader.fields

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """A metadata value, or ``default``.

        Raises:
          ConfigError: if it is of another kind.
        """
        return _value(self.path, self._reader, key, kind, default)

    def values(self, key: str, *kinds: type) -> list[Any]:
        """A required metadata list of one of these kinds.

        Raises:
          ConfigError: if it is missing, or not such a list.
        """
        found = _contents(self.path, self._reader, key)
        if found is None:
            raise ConfigError(self.path, f"has no {key}", "download it again")
        if not isinstance(found, list) or any(type(item) not in kinds for item in found):
            raise ConfigError(
                self.path, f"{key} is not an array of type {TYPES[kinds[0]]}", "download it again"
            )
        return found

    def required(self, key: str, kind: type) -> Any:
        """A required metadata value.

        Raises:
          ConfigError: if it is missing, or not of this kind.
        """
        found = self.value(key, kind)
        if found is None:
            raise ConfigError(self.path, f"has no {key}", "download it again")
        return found

    def _count(self, key: str, default: int | None = None) -> int:
        """A positive count of the architecture; the metadata may list one per layer, all equal."""
        counts = self._counts(key, default)
        if len(set(counts)) != 1:
            raise ConfigError(
                self.path,
                f"{self.key(key)} is not the same number in every layer",
                "cannot be converted",
            )
        return counts[0]

    def _counts(self, key: str, default: int | None = None) -> list[int]:
        """A positive count of the architecture in every layer; in unequal layers, one of each."""
        key = self.key(key)
        if isinstance(_contents(self.path, self._reader, key), list):
            numbers = self.values(key, int)
            whole = len(numbers) == self.layers
            if self.architecture != UNEQUAL and (not whole or len(set(numbers)) != 1):
                raise ConfigError(
                    self.path, f"{key} is not the same number in every layer", "cannot be converted"
                )
            if not whole:
                what = f"{key} has {len(numbers)} values for {self.layers} layers"
                raise ConfigError(self.path, what, "download it again")
        elif default is None:
            numbers = [self.required(key, int)] * self.layers
        else:
            numbers = [self.value(key, int, default)] * self.layers
        for number in numbers:
            if not 0 < number < 2**31:
                raise ConfigError(self.path, f"{key} = {number}", "it must be from 1 to 2**31 - 1")
        return [int(number) for number in numbers]

    def _number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """A positive number of the architecture, as config.json spelled it; or 0 if ``zero``."""
        key = self.key(key)
        stated = self.required(key, float) if default is None else self.value(key, float, default)
        number = float(str(np.float32(stated)))  # the header has float32: its shortest decimal
        if not 0 <= number < math.inf or (number == 0 and not zero):
            raise ConfigError(self.path, f"{key} = {number}", "it must be positive and finite")
        return number

    def _head_dim(self) -> int:
        size = self._count("embedding_length") // self.heads or None
        head_dim = self._count("attention.key_length", size)
        for key in ("attention.value_length", "rope.dimension_count"):
            default = size if key.endswith("value_length") else head_dim
            other = self._count(key, default)
            if other != head_dim:
                raise ConfigError(
                    self.path,
                    f"{self.key(key)} = {other} with heads of {head_dim}",
                    "not supported",
                )
        if head_dim % 2:
            raise ConfigError(
                self.path, f"head size {head_dim}", "rotary embedding needs an even number"
            )
        return head_dim

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding.

        Raises:
          ConfigError: if there is none, or ``vocab_size`` contradicts it.
        """
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise ConfigError(self.path, "has no token_embd.weight", "download it again")
        rows = math.prod(_shape(embedding)[:-1])
        stated = self.value(self.key("vocab_size"), int, rows)
        if stated != rows:
            raise ConfigError(
                self.path,
                f"{self.key('vocab_size')} = {stated}, but token_embd.weight has {rows} rows",
                "download it again",
            )
        return rows

    def special_id(self, name: str) -> int | None:
        """Id of the token ``bos``, ``eos``, ``unknown`` or ``padding``; None if there is none.

        Raises:
          ConfigError: if it is outside the vocabulary.
        """
        key = f"tokenizer.ggml.{name}_token_id"
        found = self.value(key, int)
        if found is None:
            sentencepiece = self.value("tokenizer.ggml.model", str) == "llama"
            default = SENTENCEPIECE_IDS.get(name) if sentencepiece else None
            return default if default is not None and default < self.vocab_size else None
        if not 0 <= found < self.vocab_size:
            raise ConfigError(
                self.path,
                f"{key} = {found}, outside the vocabulary of {self.vocab_size}",
                "download it again",
            )
        return int(found)

    def config(self, dtype: str) -> dict[str, Any]:
        """The config.json of the model.

        Raises:
          ConfigError: if a value is missing, impossible, or changes the model in a way that is
            not computed here.
        """
        theta = self._number("rope.freq_base", 10000.0)
        biased = {name.split(".")[-2] for name in self._tensors if name.endswith(".bias")}
        three = {"attn_q", "attn_k", "attn_v"}
        qwen2 = self.architecture == "qwen2"  # no key names its biases of q, k and v
        if self.architecture == UNEQUAL and three <= biased and "attn_output" not in biased:
            qwen2 = True
        biased -= three if qwen2 else set()
        unequal = self._unequal(qwen2=qwen2) if self.architecture == UNEQUAL else {}
        return {
            "architectures": [CLASSES[self.architecture]],
            "attention_bias": any(part.startswith("attn") for part in biased),
            "bos_token_id": self.special_id("bos"),
            "eos_token_id": self.special_id("eos"),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self._count("embedding_length"),
            "intermediate_size": max(self._counts("feed_forward_length")),
            "max_position_embeddings": self._count("context_length"),
            "mlp_bias": any(part.startswith("ffn") for part in biased),
            "model_type": self.architecture,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": max(self._counts("attention.head_count_kv", self.heads)),
            "pad_token_id": self.special_id("padding"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon", zero=True),
            "rope_scaling": self._rope_scaling(theta),
            "rope_theta": int(theta) if theta.is_integer() else theta,
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "torch_dtype": dtype,
            "transformers_version": "5.0.0",
            "vocab_size": self.vocab_size,
            **unequal,
        }

    def _unequal(self, *, qwen2: bool) -> dict[str, Any]:
        """The keys of the pruned form: its type, its family, and the sizes of every layer."""
        counts = zip(
            self._counts("attention.head_count"),
            self._counts("attention.head_count_kv", self.heads),
            self._counts("feed_forward_length"),
            strict=True,
        )
        keys = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        return {
            "model_type": UNEQUAL_TYPE,
            **({"family": "qwen2"} if qwen2 else {}),
            "per_layer_config": {
                str(layer): dict(zip(keys, of, strict=True)) for layer, of in enumerate(counts)
            },
        }

    def _rope_scaling(self, theta: float) -> dict[str, Any] | None:
        kind = self.value(self.key("rope.scaling.type"), str, "linear")
        if kind not in ("none", "linear", "yarn"):
            raise ConfigError(
                self.path, f"rope scaling {kind!r}", "supported: linear, yarn, llama3"
            )
        # The older key counts only if the newer is absent; 0 means none.
        older = self._number("rope.scale_linear", 0.0, zero=True)
        factor = self._number("rope.scaling.factor", older, zero=True) or 1.0
        if kind == "none":
            factor = 1.0
        stretch = self._number("rope.scaling.attn_factor", 1.0)  # of cosine and sine
        ext_factor = self.value(self.key("rope.scaling.yarn_ext_factor"), float, -1.0)
        if ext_factor not in (-1.0, 1.0 if kind == "yarn" else 0.0):  # -1: by type
            raise ConfigError(
                self.path,
                f"{self.key('rope.scaling.yarn_ext_factor')} = {ext_factor}",
                "not supported",
            )
        llama3 = self._llama3_scaling(theta) if ROPE_FACTORS in self._tensors else None
        if (factor, stretch) == (1.0, 1.0):
            return llama3
        if llama3:
            raise ConfigError(
                self.path, f"has both {ROPE_FACTORS} and rope scaling {kind!r}", "not supported"
            )
        if kind == "yarn":
            return self._yarn(factor, stretch)
        if stretch != 1.0:
            raise ConfigError(
                self.path,
                f"{self.key('rope.scaling.attn_factor')} = {stretch} with rope scaling {kind!r}",
                "it is supported only with yarn",
            )
        return {"rope_type": "linear", "factor": factor}

    def _yarn(self, factor: float, stretch: float) -> dict[str, Any]:
        key = "rope.scaling.original_context_length"
        context = self._count("context_length")
        scaling: dict[str, Any] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self.value(self.key(key), int, context) or context,
        }
        if stretch != 1.0:  # times what llama.cpp and transformers apply themselves
            scaling["attention_factor"] = stretch * (0.1 * math.log(max(factor, 1.0)) + 1.0)
        for beta in ("beta_fast", "beta_slow"):
            if self.has(self.key(f"rope.scaling.yarn_{beta}")):
                scaling[beta] = self._number(f"rope.scaling.yarn_{beta}")
        return scaling

    def _llama3_scaling(self, theta: float) -> dict[str, Any] | None:
        """Llama 3's parameters from the divisors of the frequencies, checked by recomputing them.

        Returns:
          None if all divisors are 1.
        """
        divisors = self._read(ROPE_FACTORS, np.dtype(np.float32)).astype(np.float64)
        if divisors.shape == (self.head_dim // 2,) and (divisors == 1).all():
            return None
        factor = float(np.float32(divisors.max(initial=1.0)))
        inverse = theta ** -(np.arange(0, self.head_dim, 2) / self.head_dim)
        turns = LLAMA3_ORIGINAL * inverse / (2 * np.pi)
        blend = np.clip((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0, 1)
        made = 1 / ((1 - blend) / factor + blend)
        if divisors.shape != made.shape or not np.allclose(made, divisors, rtol=1e-4):
            raise ConfigError(
                self.path, f"{ROPE_FACTORS} is not Llama 3's scaling", "cannot be converted"
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LLAMA3_LOW,
            "high_freq_factor": LLAMA3_HIGH,
            "original_max_position_embeddings": LLAMA3_ORIGINAL,
        }

    def fingerprint(self) -> list[str]:
        """Checksums of the bytes of all parts, in order."""
        return [checksum.of_file(part) for part in self.parts]

    def check(self, needed: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any]) -> None:
        """Refuse a model that cannot be fully converted, before anything is written.

        The values of a quantised tensor are seen only when it is dequantised.

        Args:
          needed: shape of every tensor of the checkpoint, by name.
          dtype: dtype to write.

        Raises:
          ConfigError: if a tensor is missing, superfluous, of another shape or of an unsupported
            kind, or a float tensor has values that ``dtype`` cannot represent.
        """
        known = {gguf_name(theirs): shape for theirs, shape in needed.items()}
        for name in self._tensors:
            if name not in known and name != ROPE_FACTORS and not UNUSED.fullmatch(name):
                raise ConfigError(
                    self._files[name], f"tensor {name} is unknown", "it has no place in this model"
                )
        for name, shape in known.items():
            if name not in self._tensors:
                raise ConfigError(self.path, f"has no tensor {name}", "download it again")
            stored = _shape(self._tensors[name])
            if stored != shape:
                raise ConfigError(
                    self._files[name],
                    f"tensor {name} is of shape {stored}, but its header requires {shape}",
                    "download it again",
                )
        for name, shape in known.items():
            if len(shape) == 1:
                self._read(name, dtype)
            elif self._tensors[name].tensor_type not in FLOATS:
                self._read(name, dtype, slice(1))
            else:
                step = max(1, CHECKED_VALUES // shape[1])
                for start in range(0, shape[0], step):
                    self._read(name, dtype, slice(start, start + step))

    def tensors(self, names: Iterable[str], dtype: np.dtype[Any]) -> dict[str, np.ndarray]:
        """Tensors of the checkpoint, by name.

        Raises:
          ConfigError: if one has values that ``dtype`` cannot represent.
        """
        return {name: self._unpermuted(gguf_name(name), dtype) for name in names}

    def _unpermuted(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        """Read a tensor; rows of q and k are put back in Hugging Face's half-split order."""
        array = self._read(name, dtype)
        if self.architecture not in INTERLEAVED or name.split(".")[-2] not in ("attn_q", "attn_k"):
            return array
        return half_split(array, self.head_dim)

    def _read(self, name: str, dtype: np.dtype[Any], rows: slice = slice(None)) -> np.ndarray:
        tensor = self._tensors[name]
        with np.errstate(all="ignore"):  # values that are not finite are refused below
            try:
                array = gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type)
            except NotImplementedError:
                raise ConfigError(
                    self._files[name],
                    f"{name} is {tensor.tensor_type.name}",
                    "convert from another quantisation",
                ) from None
            array = np.asarray(array, np.float32)
            made = array.astype(dtype)
        if not np.isfinite(made).all():
            if np.isfinite(array).all():
                what, todo = f"a value beyond {dtype.name}", "give another --dtype"
            else:
                what, todo = "NaN or infinity", "download it again"
            raise ConfigError(self._files[name], f"tensor {name} holds {what}", todo)
        return made


class _Reader(gguf.GGUFReader):
    """The library's reader, which trusts every count, limited to what the file can hold."""

    def _get(
        self, offset: int, dtype: Any, count: int = 1, override_order: Any = None
    ) -> np.ndarray:
        found: np.ndarray = super()._get(offset, dtype, count, override_order)
        if len(found) != count:
            raise ValueError("it is cut off, or damaged")
        return found

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], Any, Any]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            made: tuple[int, list[Any], Any, Any] = super()._get_field_parts(orig_offs, raw_type)
            return made
        kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        number = self.gguf_scalar_to_np.get(gguf.GGUFValueType(kind[0]))
        if number is None:
            if kind[0] != gguf.GGUFValueType.STRING or length[0] > MOST_STRINGS:
                raise ValueError(f"it claims {length[0]} {gguf.GGUFValueType(kind[0]).name}s")
            made = super()._get_field_parts(orig_offs, raw_type)
            return made
        numbers = self._get(orig_offs + 12, number, length[0])  # the library makes arrays of them
        types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(kind[0])]
        return 12 + numbers.nbytes, [kind, length, numbers], [2], types

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[Any]]:
        if count > MOST_TENSORS:
            raise ValueError(f"it claims {count} tensors")
        made: tuple[int, list[Any]] = super()._build_tensor_info(offs, count)
        return made


def _open(path: Path, todo: str) -> _Reader:
    """Read a GGUF header; tensors stay in the file.

    Raises:
      ConfigError: if it is missing, not a regular file, or not a complete GGUF.
    """
    try:
        if not path.exists():
            raise ConfigError(path, "no such file", todo)
        if not path.is_file():
            todo = "give a .gguf file; to make one of a checkpoint, OUT ends in .gguf"
            what = "is a directory" if path.is_dir() else "is not a regular file"
            raise ConfigError(path, what, todo)
        with np.errstate(over="raise"):
            reader = _Reader(path)
            end = reader.data_offset
            for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
                if tensor.data_offset < end:
                    raise ValueError(f"tensor {tensor.name} overlaps another")
                end = tensor.data_offset + tensor.n_bytes
        if reader.endianess != gguf.GGUFEndian.LITTLE:
            raise ValueError("it is big-endian")
    except (
        ValueError, IndexError, OSError, KeyError, TypeError, ArithmeticError, AssertionError
    ) as error:  # fmt: skip
        what = f"cannot be read as GGUF ({error})"
        raise ConfigError(path, what, "download it again") from error
    return reader


def parts_of(path: Path) -> list[Path]:
    """The file of this name, then the parts of it if it was split; empty if there is neither."""
    number = "[0-9]" * 5
    parts = path.parent.glob(f"{glob.escape(path.stem)}-{number}-of-{number}{path.suffix}")
    return [*([path] if path.exists() else []), *sorted(parts)]


def _open_parts(path: Path) -> dict[Path, _Reader]:
    """Readers of all parts, by file and in order, whichever part is given.

    Raises:
      ConfigError: if a part is missing, damaged or of another model; names it.
    """
    given = _open(path, "give a .gguf file")
    count = _value(path, given, "split.count", int, 1)
    if count <= 1:
        return {path: given}
    again = f"download all {count} parts into one directory"
    named = PART_NAME.fullmatch(path.name)
    if not named or int(named[3]) != count:
        raise ConfigError(
            path,
            f"is one of {count} parts, but its name does not say which",
            f"restore its name: NAME-00001-of-{count:05d}.gguf",
        )
    parts: dict[Path, _Reader] = {}
    for number in range(count):
        part = path.with_name(f"{named[1]}-{number + 1:05d}-of-{count:05d}.gguf")
        reader = parts[part] = given if part == path else _open(part, again)
        says = [_value(part, reader, f"split.{key}", int, -1) for key in ("no", "count")]
        if says != [number, count]:
            raise ConfigError(part, f"says that it is part {says[0] + 1} of {says[1]}", again)
        first_path, first = next(iter(parts.items()))
        for key in reader.fields:
            if reader is first or key.startswith(("split.", "GGUF.")):
                continue
            if _contents(part, reader, key) != _contents(first_path, first, key):
                raise ConfigError(
                    part, f"is of another model: {key} is not that of {first_path.name}", again
                )
    total = sum(len(reader.tensors) for reader in parts.values())
    for part, reader in parts.items():
        stated = _value(part, reader, "split.tensors.count", int, total)
        if stated != total:
            raise ConfigError(
                part, f"says that the parts hold {stated} tensors, but they hold {total}", again
            )
    return parts


def _contents(path: Path, reader: _Reader, key: str) -> Any:
    """A metadata value of any kind, decoded only now; None if there is none."""
    field = reader.get_field(key)
    try:
        return None if field is None else field.contents()
    except ValueError as error:
        raise ConfigError(path, f"{key} cannot be read ({error})", "download it again") from error


def _value(path: Path, reader: _Reader, key: str, kind: type, default: Any) -> Any:
    found = _contents(path, reader, key)
    if found is None:
        return default
    if type(found) is not kind:
        raise ConfigError(path, f"{key} = {found!r}", f"it must be of type {TYPES[kind]}")
    return found


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """Shape in NumPy's order; the header lists the fastest dimension first."""
    return tuple(int(extent) for extent in reversed(tensor.shape))


def gguf_name(theirs: str) -> str:
    """The GGUF name of a checkpoint tensor."""
    if theirs in GLOBAL_NAMES:
        return GLOBAL_NAMES[theirs]
    _, _, layer, part = theirs.split(".", 3)
    part, kind = part.rsplit(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[part]}.{kind}"
