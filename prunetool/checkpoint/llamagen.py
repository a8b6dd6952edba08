"""A LlamaGen file (.pt) as a checkpoint of prunetool's: names, and the rows of q and k.

LlamaGen (arXiv 2406.06525) fuses q, k and v, and its rotary pairs are neighbours. Neither the
number of heads nor the grid of a picture can be told from the shapes.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prunetool.checkpoint import checksum
from prunetool.checkpoint.rotary import half_split
from prunetool.checkpoint.torch_zip import Stored, TorchFile
from prunetool.errors import CheckpointError, ConfigError, shown

# Heads by hidden size and layers, of LlamaGen's B, L, XL, XXL, 3B, XXXL, 1B and 7B.
HEADS = {
    (768, 12): 12,
    (1024, 24): 16,
    (1280, 36): 20,
    (1536, 48): 24,
    (3200, 24): 32,
    (2560, 48): 40,
    (2048, 22): 32,
    (4096, 32): 32,
}
DOWNSAMPLE = 16  # pixels to a code, across
SIZE_IN_NAME = re.compile(r"_(256|384|512)(?=\D|$)")
EMBEDDING, CLASSES = "tok_embeddings.weight", "cls_embedding.embedding_table.weight"
GLOBAL_NAMES = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.class_embedding.weight": CLASSES,
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
FUSED = "attention.wqkv.weight"
FUSED_PARTS = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
LAYER_NAMES = {
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
UNUSED = re.compile(r"freqs_cis|causal_mask|.*\.kv_cache\.[kv]_cache")  # computed again on loading
WRAPPERS = ("model", "module", "state_dict")  # keys under which training programs keep the weights
DTYPES = ("float32", "bfloat16", "float16")


class LlamaGenFile:
    """The weights in a LlamaGen file, and the config.json of their checkpoint.

    Args:
      path: the file.
      image_size: pixels across a picture; None: as the file's name says.
      heads: attention heads; None: those of LlamaGen's size with this many layers and features.

    Attributes:
      said: what was taken from the file's name or the sizes, for the summary.

    Raises:
      CheckpointError: if it is not such a file.
      ConfigError: if its picture size or heads are not known.
    """

    def __init__(self, path: Path, image_size: int | None, heads: int | None) -> None:
        self.path, self._file = path, TorchFile(path)
        self.parts = [path]
        self._tensors = self._state()
        self.vocab_size, self.hidden_size = self._shape(EMBEDDING, 2)
        layers = filter(None, (re.match(r"layers\.(\d{1,4})\.", name) for name in self._tensors))
        self.layers = 1 + max((int(layer[1]) for layer in layers), default=-1)
        self.said: list[str] = []
        self._heads = heads or self._known_heads()
        self._grid = self._known_grid(image_size)
        if self.hidden_size % self._heads:
            raise ConfigError(
                path, f"has {self.hidden_size} features, which {self._heads} heads do not divide",
                "give another --heads",
            )  # fmt: skip
        self._read: tuple[str, np.ndarray] = ("", np.zeros(0))  # the fused matrix read last

    def _state(self) -> dict[str, Stored]:
        """The state dict in the file, wherever it is."""
        top = self._file.top if isinstance(self._file.top, dict) else {}
        for state in (top, *(top[key] for key in WRAPPERS if key in top)):
            if isinstance(state, dict):
                tensors = {
                    name: tensor
                    for name, tensor in state.items()
                    if isinstance(name, str) and isinstance(tensor, Stored)
                }
                if EMBEDDING in tensors:
                    return self._checked(tensors)
                if "quantize.embedding.weight" in tensors:
                    what, todo = "is the tokenizer of pictures", "give the model: c2i_*.pt"
                    raise CheckpointError(self.path, what, todo)
        names = ", ".join([key for key in top if isinstance(key, str)][:4])
        said = f", only {shown(names)}" if names else ""
        raise CheckpointError(self.path, f"has no {EMBEDDING}{said}", "give a LlamaGen model")

    def _checked(self, tensors: dict[str, Stored]) -> dict[str, Stored]:
        if any(name.startswith("cls_embedding.") and name != CLASSES for name in tensors):
            raise CheckpointError(
                self.path, "is text-conditional (t2i)", "give a class-conditional model: c2i_*.pt"
            )
        return {name: t for name, t in tensors.items() if not UNUSED.fullmatch(name)}

    def _shape(self, name: str, axes: int) -> tuple[int, ...]:
        if name not in self._tensors or len(self._tensors[name].shape) != axes:
            raise CheckpointError(self.path, f"has no {name} of {axes} axes", "download it again")
        return self._tensors[name].shape

    def _known_heads(self) -> int:
        found = HEADS.get((self.hidden_size, self.layers))
        if found is None:
            raise ConfigError(
                self.path,
                f"has {self.layers} layers of {self.hidden_size} features, which no size of "
                "LlamaGen has, so its heads are not known",
                "give --heads",
            )
        self.said.append(f"{found} heads, by its size")
        return found

    def _known_grid(self, image_size: int | None) -> int:
        named = sorted(set(SIZE_IN_NAME.findall(self.path.stem)))
        if image_size is None and len(named) != 1:
            raise ConfigError(
                self.path, "does not say in its name for which pictures it is (256, 384, 512)",
                "give --image-size",
            )  # fmt: skip
        if image_size is None:
            image_size = int(named[0])
            self.said.append(f"{image_size} pixels, by its name")
        if image_size % DOWNSAMPLE:
            raise ConfigError(
                "--image-size",
                f"{image_size} is not a multiple of {DOWNSAMPLE}",
                "give the pixels across a picture, such as 384",
            )
        return image_size // DOWNSAMPLE

    def config(self) -> dict[str, Any]:
        """config.json of the checkpoint."""
        channels, _ = self._shape("layers.0.feed_forward.w1.weight", 2)
        classes, _ = self._shape(CLASSES, 2)
        return {
            "model_type": "llamagen",
            "conditioning": "class",
            "num_classes": classes - 1,  # the last row is the null class
            "conditioning_tokens": 1,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self._heads,
            "head_dim": self.hidden_size // self._heads,
            "intermediate_size": channels,
            "max_position_embeddings": self._grid**2 + 1,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "llamagen_2d", "grid": self._grid},
            "tie_word_embeddings": False,
            "tokenizer_downsample": DOWNSAMPLE,
            "source": self.path.name,
        }

    @property
    def dtype(self) -> str:
        """NumPy's name of the stored dtype, if a checkpoint can have it; else ``float32``."""
        stored = self._tensors[EMBEDDING].dtype
        return stored if stored in DTYPES else "float32"

    def fingerprint(self) -> list[str]:
        """What the tensors depend on: the file's bytes, and what was said of it."""
        return [checksum.of_file(self.path), checksum.of_json(self.config())]

    def check(self, needed: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any]) -> None:
        """Refuse a model that cannot be fully converted, before anything is written.

        Args:
          needed: shape of every tensor of the checkpoint, by name.
          dtype: dtype to write.

        Raises:
          CheckpointError: if a tensor is missing, superfluous, or of another shape or kind.
        """
        known: dict[str, tuple[int, ...]] = {}
        for name, shape in needed.items():
            theirs, part = _their_name(name)
            known[theirs] = shape if part is None else (3 * shape[0], *shape[1:])
        for theirs, tensor in self._tensors.items():
            if theirs not in known:
                raise CheckpointError(
                    self.path, f"tensor {theirs} is unknown", "it has no place in this model"
                )
            if np.dtype(tensor.dtype).kind not in "fV":  # bfloat16 is of kind V
                raise CheckpointError(self.path, f"{theirs} is {tensor.dtype}", "download it again")
        for theirs, shape in known.items():
            if self._shape(theirs, len(shape)) != shape:
                raise CheckpointError(
                    self.path,
                    f"{theirs} is {self._tensors[theirs].shape}, and its other tensors require "
                    f"{shape}",
                    "give a LlamaGen model as it was trained",
                )

    def tensors(self, names: Iterable[str], dtype: np.dtype[Any]) -> dict[str, np.ndarray]:
        """Tensors of the checkpoint, by name.

        Raises:
          CheckpointError: if one cannot be read, or has values that ``dtype`` cannot represent.
        """
        return {name: self._tensor(name, dtype) for name in names}

    def _tensor(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        theirs, part = _their_name(name)
        if self._read[0] != theirs:
            self._read = theirs, self._cast(theirs, dtype)
        array = self._read[1]
        if part is not None:
            array = np.split(array, 3)[part]
            array = half_split(array, self.hidden_size // self._heads) if part < 2 else array
        return array

    def _cast(self, theirs: str, dtype: np.dtype[Any]) -> np.ndarray:
        array = self._file.read(self._tensors[theirs], theirs)
        with np.errstate(all="ignore"):  # values that are not finite are refused below
            made = array.astype(dtype)
            finite = bool(np.isfinite(made).all())
        if not finite:
            fits = np.isfinite(array.astype(np.float64)).all()
            what = f"a value beyond {dtype.name}" if fits else "NaN or infinity"
            todo = "give another --dtype" if fits else "download it again"
            raise CheckpointError(self.path, f"{theirs} holds {what}", todo)
        return made


def _their_name(name: str) -> tuple[str, int | None]:
    """The file's name of a checkpoint tensor, and which third of it, if it is fused."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name], None
    _, _, layer, part = name.split(".", 3)
    if part in FUSED_PARTS:
        return f"layers.{layer}.{FUSED}", FUSED_PARTS.index(part)
    return f"layers.{layer}.{LAYER_NAMES[part]}", None
