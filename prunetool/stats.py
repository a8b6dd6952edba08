"""What calibrate sums at which input or output of a layer, and the files that store it.

A file has ``tokens``, (1,), and for each site the arrays of `array_shapes`, named ``SITE.SUM``
(``o.gram``) after the fields of `gram.Sums`; Gram matrices as packed triangles (`gram.pack_tiles`).
Files of first tokens have only ``SITE.gram`` and ``SITE.total`` of units (`at_the_scale_of`).
A file of gradients has those of `gradient_shapes` instead, named after the matrix. With labels that
the model drew they are of the gradients g at its output: ``o.gram``, Σ g gᵀ; ``q.square``, Σ g².
With the text's own they are of its weights w, with g the gradient of the mean loss of all sequences
and F the mean over sequences of the squared gradient of each one's mean loss, by row of q, k, v,
gate, up and by column of o, down: `WEIGHT_SUMS`, ``q.first``.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunetool import records, workdir
from prunetool.errors import RecordError
from prunetool.llama.config import LayerShape, LlamaConfig
from prunetool.llama.forward import Taps, dot
from prunetool.llama.parts import MATRICES, PARTS, UNIT_MATRICES
from prunetool.llama.weights import axis_sizes
from prunetool.pruning import gram

EVERY = ("all", "residual")  # the ``--stats`` that sum the inputs of all matrices


class Site(NamedTuple):
    """An input of a layer that is summed, named after its field of `forward.Taps`.

    Attributes:
      matrices: the matrices that take this input.
      joins: field of `forward.Taps` with the residual stream that their output joins.
      of_units: its features are produced by units, so scores and refits need it.
      only: the ``--stats`` that sum it, if not of units.
      blocks: keep the token-weighted diagonal blocks of KV groups.
      diagonal: keep the token-weighted diagonal.
    """

    matrices: tuple[str, ...]
    joins: str
    of_units: bool = False
    blocks: bool = False
    diagonal: bool = False
    only: tuple[str, ...] = EVERY

    @property
    def axis(self) -> str:
        """The axis of `axis_sizes` that its features are on."""
        return PARTS[self.matrices[0]].axes[1] if self.matrices else "hidden"

    def is_kept(self, stats: str | None) -> bool:
        """Whether it is summed for ``--stats``; None: for any."""
        return self.of_units or stats is None or stats in self.only


SITES = {
    "o": Site(("o",), "before_attention", of_units=True, blocks=True),
    "down": Site(("down",), "before_mlp", of_units=True, diagonal=True),
    "attention": Site(("q", "k", "v"), "before_attention"),
    "mlp": Site(("gate", "up"), "before_mlp"),
    # The residual stream itself.
    "before_attention": Site((), "before_attention", only=("residual",)),
    "before_mlp": Site((), "before_mlp", only=("residual",)),
}
# Where the inputs of each matrix are summed.
GIVEN = {matrix: name for name, site in SITES.items() for matrix in site.matrices}


def zeros(kept: str, sizes: dict[str, int], head_dim: int) -> dict[str, gram.Sums]:
    """Empty sums at every site.

    Args:
      kept: ``--stats``: ``structural``, ``token``, ``all`` or ``residual``.
      sizes: `axis_sizes`, padded or not.
      head_dim: d.
    """
    return {
        name: gram.zeros(
            sizes[site.axis],
            blocks=sizes["groups"] // head_dim if site.blocks else 0,
            diagonal=site.diagonal,
            full=site.of_units and kept == "token",
        )
        for name, site in SITES.items()
        if site.is_kept(kept)
    }


def of_first_tokens(sums: Mapping[str, gram.Sums]) -> dict[str, gram.Sums]:
    """Those that are kept of first tokens."""
    return {
        name: gram.Sums(sum_.gram, sum_.total)
        for name, sum_ in sums.items()
        if SITES[name].of_units
    }


def given(inputs: Taps, name: str) -> tuple[jax.Array, jax.Array]:
    """The input at a site, and the residual stream that its output joins."""
    return getattr(inputs, name), getattr(inputs, SITES[name].joins)


def arrays(
    sums: dict[str, gram.Sums], tokens: int, config: LlamaConfig, shape: LayerShape, dtype: str
) -> dict[str, np.ndarray]:
    """The sums of a layer in the form of a file, without padding.

    Args:
      sums: sums by site, on the host.
      tokens: number of tokens in the sums.
      config: the model's config.
      shape: the layer's shape.
      dtype: dtype of the arrays.
    """
    found = {"tokens": np.array([tokens])}
    sizes = axis_sizes(config, shape)
    for name, sum_ in sums.items():
        size = sizes[SITES[name].axis]
        for kind, value in sum_._asdict().items():
            if value is None:
                continue
            if kind.endswith("gram"):
                found[f"{name}.{kind}"] = gram.pack_tiles(value, size, dtype)
            else:
                extent = shape.kv_heads if kind == "token_blocks" else size
                found[f"{name}.{kind}"] = value[:extent].astype(dtype)
    return found


def at_the_scale_of(
    fit: Mapping[str, np.ndarray] | workdir.TensorFile, first: dict[str, np.ndarray], share: float
) -> dict[str, np.ndarray]:
    """Sums over first tokens, as if they were a ``share`` as many as the other tokens.

    The stream of a token that others attend to is large from some layer on, and the next norm
    divides by it. So each counts relative to its own norm behind the output, times that of other
    tokens before it: the median over features of Σx² / Σ(x²/‖h‖²) is their ‖h‖². Where others' norm
    grows much in one layer, as it may in the first ones, they count less than their share.

    A bias is next to nothing beside a stream that large: their ``total`` and ``tokens`` are zero,
    so that a refit with a bias takes its mean from the others alone.

    Args:
      fit: arrays of the other tokens' file.
      first: of the first tokens' file, each token scaled so that its stream has norm 1.
      share: of the others' number of tokens.
    """
    weight = round(share * float(fit["tokens"][0])) / float(first["tokens"][0])
    found = {}
    for name, array in first.items():
        site, _, kind = name.partition(".")
        scale = weight * _norm_squared(fit, site) if kind == "gram" else 0.0
        found[name] = (array * scale).astype(array.dtype)
    return found


def _norm_squared(fit: Mapping[str, np.ndarray] | workdir.TensorFile, site: str) -> float:
    """The usual ‖h‖² of the stream that a site's output joins, as `at_the_scale_of` says."""
    if SITES[site].blocks:
        weighted = np.diagonal(fit[f"{site}.token_blocks"], axis1=1, axis2=2).ravel()
    else:
        weighted = fit[f"{site}.token_diagonal"]
    seen = weighted > 0
    ratios = gram.diagonal(fit[f"{site}.gram"])[seen] / weighted[seen]
    return float(np.median(ratios)) if seen.any() else 0.0


def array_shapes(
    config: LlamaConfig, shape: LayerShape, kept: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Shape of every array of a layer's file, by name.

    Args:
      config: the model's config.
      shape: the layer's shape.
      kept: ``--stats``; None for all possible arrays.
    """
    sizes, groups = axis_sizes(config, shape), shape.kv_heads
    found: dict[str, tuple[int, ...]] = {"tokens": (1,)}
    for name, site in SITES.items():
        if not site.is_kept(kept):
            continue
        size = sizes[site.axis]
        triangle = (size * (size + 1) // 2,)
        found |= {f"{name}.gram": triangle, f"{name}.total": (size,)}
        if site.blocks:
            found[f"{name}.token_blocks"] = (groups, size // groups, size // groups)
        if site.diagonal:
            found[f"{name}.token_diagonal"] = (size,)
        if site.of_units and kept in ("token", None):
            found[f"{name}.token_gram"] = triangle
    return found


MODEL, TEXT = "model", "text"  # whose tokens are the labels of a loss: ``--labels``
# By name, the sum over the weights w of a row or column (LLM-Pruner, arXiv 2305.11627).
WEIGHT_SUMS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "vector": lambda wg, wwF: np.abs(wg.sum(1, dtype=np.float64)),
    "first": lambda wg, wwF: np.abs(wg).sum(1, dtype=np.float64),
    "second": lambda wg, wwF: wwF.sum(1, dtype=np.float64),
    "mix": lambda wg, wwF: np.abs(wg - wwF / 2).sum(1, dtype=np.float64),
}


def gradient_zeros(kept: str, sizes: dict[str, int], labels: str) -> dict[str, Any]:
    """Empty sums over a loss's gradients.

    Args:
      kept, sizes: as in `zeros`.
      labels: ``model`` or ``text``.
    """
    if labels == TEXT:
        shapes = {matrix: tuple(sizes[axis] for axis in PARTS[matrix].axes) for matrix in MATRICES}
        return {
            f"{matrix}.{kind}": jnp.zeros(shape, jnp.float32)
            for matrix, shape in shapes.items()
            for kind in ("sum", "squares")
        }
    sums: dict[str, Any] = {
        f"{matrix}.gram": gram.zero_tiles(sizes["hidden"]) for matrix in UNIT_MATRICES
    }
    if kept in EVERY:
        for matrix in MATRICES:
            sums[f"{matrix}.square"] = jnp.zeros(sizes[PARTS[matrix].axes[0]], jnp.float64)
    return sums


def add_gradients(
    sums: dict[str, Any], outputs: Mapping[str, jax.Array], inputs: Taps
) -> dict[str, Any]:
    """Add a batch of gradients.

    Args:
      sums: as from `gradient_zeros`.
      outputs: at the outputs of matrices, (O, B, N), float32.
      inputs: the inputs of matrices, (I, B, N).
    """
    if "q.sum" in sums:
        return _add_of_weights(sums, outputs, inputs)
    added = {}
    for name, so_far in sums.items():
        matrix, _, kind = name.partition(".")
        g = outputs[matrix].reshape(len(outputs[matrix]), -1)
        if kind == "gram":
            added[name] = gram.add_to_tiles(so_far, g)
        else:
            added[name] = so_far + jnp.sum(jnp.square(g), axis=1).astype(jnp.float64)
    return added


def _add_of_weights(
    sums: dict[str, Any], outputs: Mapping[str, jax.Array], inputs: Taps
) -> dict[str, Any]:
    """Add the gradients of matrices, Σ_t g_t x_tᵀ, (O, I), and their squares, of each sequence."""
    of = {matrix: (outputs[matrix], getattr(inputs, GIVEN[matrix])) for matrix in MATRICES}

    def add(so_far: dict[str, Any], one: dict[str, tuple[jax.Array, jax.Array]]) -> Any:
        found = {}
        for matrix, (g, x) in one.items():
            gradient = dot(g.astype(x.dtype), x, (1, 1))
            found[f"{matrix}.sum"] = so_far[f"{matrix}.sum"] + gradient
            found[f"{matrix}.squares"] = so_far[f"{matrix}.squares"] + jnp.square(gradient)
        return found, None

    by_sequence = jax.tree.map(lambda array: array.swapaxes(0, 1), of)
    return jax.lax.scan(add, sums, by_sequence)[0]


def weight_arrays(
    sums: dict[str, Any], sequences: int, length: int, weights: Mapping[str, np.ndarray], dtype: str
) -> dict[str, np.ndarray]:
    """`WEIGHT_SUMS` of a layer in the form of a file, without padding.

    Args:
      sums: over sequences, of gradients of the loss summed over tokens, on the host.
      sequences, length: how many, and the tokens of each, the last of which has no label.
      weights: the seven matrices, unpadded.
      dtype: dtype of the arrays.
    """
    found, labels = {"tokens": np.array([sequences * (length - 1)])}, np.float32(length - 1)
    for matrix, w in weights.items():
        place = tuple(map(slice, w.shape))
        g = sums[f"{matrix}.sum"][place] / (labels * np.float32(sequences))
        F = sums[f"{matrix}.squares"][place] / (np.square(labels) * np.float32(sequences))
        w = w.astype(np.float32)
        wg, wwF = w * g, np.square(w) * F
        if matrix in UNIT_MATRICES:  # whose columns are the units'
            wg, wwF = wg.T, wwF.T
        for name, sum_ in WEIGHT_SUMS.items():
            found[f"{matrix}.{name}"] = sum_(wg, wwF).astype(dtype)
    return found


def gradient_arrays(
    sums: dict[str, Any], tokens: int, config: LlamaConfig, shape: LayerShape, dtype: str
) -> dict[str, np.ndarray]:
    """The gradient sums of a layer in the form of a file, without padding; as in `arrays`."""
    found = {"tokens": np.array([tokens])}
    sizes = axis_sizes(config, shape)
    for name, value in sums.items():
        matrix, _, kind = name.partition(".")
        size = sizes[PARTS[matrix].axes[0]]
        if kind == "gram":
            found[name] = gram.pack_tiles(value, size, dtype)
        else:
            found[name] = value[:size].astype(dtype)
    return found


def gradient_shapes(
    config: LlamaConfig, shape: LayerShape, labels: str, kept: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Shape of every array of a layer's file of gradients; as in `array_shapes`."""
    D, sizes = config.hidden_size, axis_sizes(config, shape)
    found: dict[str, tuple[int, ...]] = {"tokens": (1,)}
    if labels == TEXT:
        for matrix in MATRICES:
            size = sizes[PARTS[matrix].axes[matrix in UNIT_MATRICES]]
            found |= {f"{matrix}.{name}": (size,) for name in WEIGHT_SUMS}
        return found
    found |= {f"{matrix}.gram": (D * (D + 1) // 2,) for matrix in UNIT_MATRICES}
    if kept in (*EVERY, None):
        found |= {f"{matrix}.square": (sizes[PARTS[matrix].axes[0]],) for matrix in MATRICES}
    return found


class _Sums:
    """Sums of a layer in one file or several alike, read on demand.

    Args:
      work: the work directory.
      names: names of the files below it; an array is summed over them.
      shapes: shape of every array.
    """

    def __init__(self, work: Path, names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._files = [workdir.TensorFile(work, name) for name in names]
        self._where = work / names[0]
        self._shapes = shapes

    def __contains__(self, name: str) -> bool:
        return name in self._files[0]

    def __getitem__(self, name: str) -> np.ndarray:
        """The named sum (``o.total``, ``down.gram``: packed), float64."""
        first, *others = (file[name] for file in self._files)
        due = self._shapes[name]
        for array in (first, *others):
            if array.dtype.kind not in "fi" or array.shape != due:
                raise RecordError(
                    self._where,
                    f"{name} is {array.dtype} {array.shape}, not of shape {due}",
                    workdir.AGAIN,
                )
        out = first.astype(np.float64)
        for other in others:
            out += other
        return out

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self["tokens"][0])


class Stats(_Sums):
    """A layer's sums over the calibration tokens.

    Args:
      work: the work directory.
      record: the layer's record.
      config: the model's config.

    Attributes:
      splits: kinds of the files: the tokens to fit (``stats``), any held out (``held_out``), and
        tokens as the first of a text (``first``), in their share of the others.
        All requested arrays are summed over ``splits``.

    Raises:
      RecordError: if the stream does not come from calibrate.
    """

    def __init__(
        self,
        work: Path,
        record: records.LayerRecord,
        config: LlamaConfig,
        splits: tuple[str, ...] = ("stats", "held_out"),
    ) -> None:
        if "stats" not in record.files:
            raise RecordError(
                f"layer {record.index}", "has no stats", "run prunetool calibrate before this step"
            )
        self.splits = tuple(split for split in splits if split in record.files)
        names = [record.files[split] for split in self.splits]
        super().__init__(work, names, array_shapes(config, config.layer_shapes[record.index]))


class Gradients(_Sums):
    """A layer's sums over gradients of -log p(y), in nats.

    Args:
      work: the work directory.
      record: the layer's record.
      config: the model's config.
      labels: whose tokens y are: ``model`` or ``text``.

    Raises:
      RecordError: if calibrate kept no gradients.
    """

    def __init__(
        self, work: Path, record: records.LayerRecord, config: LlamaConfig, labels: str = MODEL
    ) -> None:
        if "gradients" not in record.files:
            raise RecordError(
                f"layer {record.index}", "has no gradients", "calibrate with --gradients"
            )
        shapes = gradient_shapes(config, config.layer_shapes[record.index], labels)
        super().__init__(work, [record.files["gradients"]], shapes)


def need_gradients(
    calibration: Mapping[str, Any], labels: str, why: str, instead: str = ""
) -> None:
    """Refuse a calibration without the gradients that a score needs.

    Args:
      calibration: calibrate's options.
      labels: ``model`` or ``text``.
      why: the option that needs them.
      instead: an option that does without.

    Raises:
      RecordError: if it kept none, or of other labels.
    """
    option = "" if labels == MODEL else f" --labels {labels}"
    instead = f", or give {instead}" if instead else ""
    if not calibration.get("gradients"):
        raise RecordError(
            why, "needs gradients, and calibrate kept none",
            f"run calibrate with --gradients 32{option}{instead}",
        )  # fmt: skip
    if (labels_were := calibration.get("labels", MODEL)) != labels:
        raise RecordError(
            why, f"needs gradients of --labels {labels}, and calibrate took --labels {labels_were}",
            f"run calibrate with --labels {labels} into another --work{instead}",
        )  # fmt: skip
