"""A backward pass over some of the calibration sequences, layer by layer, and its sums.

The loss is -log p(y) of every token, in nats. With y drawn from the model's own next-token
distribution the sums Σ g gᵀ of its gradients are those of the Fisher information, the curvature of
the loss where a model fits its data; with y the text's next token, g is the loss's slope. Gradients
go from the last layer to the first in files, as the residual stream goes forward; memory holds one
layer and one batch, and for the text's labels two sums of the size of the layer's matrices.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunetool import console, stats, streaming, workdir
from prunetool.checkpoint import checksum
from prunetool.devices import BY_DEVICE, BY_SEQUENCE, EVERYWHERE, Spread, Team
from prunetool.errors import ConfigError
from prunetool.llama import backward, decode, forward
from prunetool.llama.parts import EMBEDDING, FINAL_NORM, LM_HEAD, MATRICES, PARTS
from prunetool.llama.weights import Layer, part_shapes, tensor_name
from prunetool.model import Model
from prunetool.plan import LOGIT_TOKENS
from prunetool.profiling import Profile
from prunetool.steps.evaluate import Ends

LABEL_SEED = 0  # with the number of a sequence: of the tokens drawn


class Precision(NamedTuple):
    """Dtypes of the products, of the stored stats, and of the streams kept for gradients."""

    dtype: str
    stats_dtype: str
    stream_dtype: str


@dataclass
class Backward:
    """One backward pass.

    A layer's sums are written first and the gradient before it last, so a layer is done once a
    ``gradient-`` file with its number or a lower one exists.

    Attributes:
      tokens: all calibration sequences, (samples, N).
      every: numbers of the sequences to use.
      mine: those of this process, whose streams it has.
      batch: sequences processed at a time.
      kept: ``--stats``.
      labels: ``--labels``.
    """

    model: Model
    tokens: np.ndarray
    every: np.ndarray
    mine: np.ndarray
    work: Path
    precision: Precision
    batch: int
    team: Team
    profile: Profile
    kept: str
    labels: str

    def stream(self, layer: int, kind: str = "residual") -> streaming.HiddenStates:
        """The residual stream of this process's sequences before a layer, or its ``gradient``."""
        path = streaming.path_before(self.work, layer, self.team.suffix, kind)
        return streaming.HiddenStates(
            path,
            self.model.config.hidden_size,
            len(self.mine),
            self.tokens.shape[1],
            self.precision.stream_dtype,
        )

    @contextmanager
    def keeping(self, layer: int) -> Iterator[Callable[[list[int], np.ndarray], None]]:
        """Yield a function that keeps the stream before a layer, given with sequences' numbers."""
        if not len(self.mine):
            yield lambda numbers, h: None
            return
        with self.stream(layer).writing() as write:
            place = 0

            def keep(numbers: list[int], h: np.ndarray) -> None:
                nonlocal place
                if count := int(np.isin(numbers, self.mine).sum()):
                    write(range(place, place + count), h[:, np.isin(numbers, self.mine)])
                    place += count

            yield keep

    def has_streams(self, layers: int) -> bool:
        """Whether the streams before and between the first layers are as written."""
        for layer in range(layers + 1) if len(self.mine) else ():
            stream = self.stream(layer)
            if not stream.is_whole():
                console.log.warning("%s: is missing or damaged; starting again", stream.path)
                return False
        return True

    def forget(self) -> None:
        """Delete the gradients of an earlier pass."""
        for path in self.work.glob(f"gradient-?????{self.team.suffix}"):
            path.unlink()

    def layers(self) -> Iterator[int]:
        """Yield each layer's number once its sums are written, the last layer first."""
        last = self.model.layers
        left = -self.team.least(-self._left())
        there = left > last or self.stream(left, "gradient").is_whole()
        left = left if self.team.least(there) else last + 1
        for other in range(left):  # behind the slowest process
            self.stream(other, "gradient").path.unlink(missing_ok=True)
        if left > last:
            left = last
            self._top()
        yield from range(left, last)
        numbers = console.progress(self._compute(left), last, last - left, "gradients of layer")
        yield from numbers

    def _left(self) -> int:
        """How many layers are left; one more if the top is."""
        last = self.model.layers
        for layer in range(last + 1):
            stream = self.stream(layer, "gradient")
            if not stream.path.exists():
                continue
            if not stream.is_whole():
                console.log.warning("%s: is damaged; made again", stream.path)
            elif self._are_intact(layer):
                return layer
        return last + 1

    def _are_intact(self, first: int) -> bool:
        """Whether the sums of the layers from ``first`` on are as written."""
        layers = range(first, self.model.layers) if self.team.index == 0 else ()
        return all(workdir.is_intact(self.work, self._file(layer)) for layer in layers)

    def _file(self, layer: int) -> str:
        return workdir.layer_file("stats", layer, ".gradients")

    def _top(self) -> None:
        """Write the gradient after the last layer."""
        length, last = self.tokens.shape[1], self.model.layers
        ends = Ends.of(self.model, self.precision.dtype)
        head = EMBEDDING if self.model.config.tied else LM_HEAD
        refuse_other_weights(self.team, self.model, head, [FINAL_NORM, head])

        gradient = _top_gradient(self.labels, ends.eps)
        below = self.stream(last)
        with self.stream(last, "gradient").writing() as write:
            for place in console.progress(range(len(self.mine)), len(self.mine), what="labels of"):
                h, g = below.read(range(place, place + 1)), []
                given = self._given(int(self.mine[place]))
                for start in range(0, length, LOGIT_TOKENS):
                    block = slice(start, start + LOGIT_TOKENS)
                    g.append(
                        np.asarray(gradient(h[:, :, block], given[block], ends.norm, ends.head))
                    )
                found = np.concatenate(g, axis=2)
                streaming.check_finite(
                    found, last - 1, "the gradients after it are NaN or infinite"
                )
                write(range(place, place + 1), found)
            if self.team.index == 0:
                self.model.remember(self.work / workdir.WEIGHTS_NAME)

    def _given(self, sequence: int) -> np.ndarray:
        """The tokens that follow, (N,), -1 behind the last; or the numbers that draw them."""
        if self.labels == stats.TEXT:
            return np.append(self.tokens[sequence, 1:], -1).astype(np.int32)
        generator = np.random.default_rng([LABEL_SEED, sequence])
        return generator.random((self.tokens.shape[1],))

    def _compute(self, left: int) -> Iterator[int]:
        """The layers below ``left``, of whose outputs the gradient is there."""
        config = self.model.config
        step = layer_function(config.head_dim, config.rms_norm_eps, config.window)
        everywhere = step.spread.everywhere
        rope = everywhere(streaming.rotation(self.model, self.tokens.shape[1]))
        above = self.stream(left, "gradient")
        for number, layer in self.model.padded_layers(left, backwards=True):
            weights = everywhere(streaming.to_device(layer, self.precision.dtype))
            refuse_other_weights(
                self.team, self.model, f"layer {number}", names(self.model, number)
            )
            sums = step.spread.zeros(
                jax.eval_shape(
                    partial(stats.gradient_zeros, self.kept, padded_sizes(layer), self.labels)
                )
            )
            before, below = self.stream(number), self.stream(number, "gradient")
            with below.writing() as write:
                for batch in streaming.batches(0, len(self.mine), self.batch):
                    with self.profile.phase("gradients"):
                        h, g = before.read(batch), above.read(batch)
                        g, sums = step(h, g, weights, rope, sums)
                    streaming.check_finite(g, number, "its gradients are NaN or infinite")
                    write(batch, g)
                    console.within(batch.stop, len(self.mine), "sequence")
                self._write(number, self.team.total(sums))
                self.team.wait(f"gradients of layer {number}")
            self.team.wait(f"gradient before layer {number}")
            above.path.unlink()
            above = below
            streaming.return_free_memory()
            yield number

    def _write(self, layer: int, sums: dict[str, Any]) -> None:
        if self.team.index == 0:
            count, length = len(self.every), self.tokens.shape[1]
            config, dtype = self.model.config, self.precision.stats_dtype
            if self.labels == stats.TEXT:
                weights = {part: self.model.part(layer, part) for part in MATRICES}
                arrays = stats.weight_arrays(sums, count, length, weights, dtype)
            else:
                shape = config.layer_shapes[layer]
                arrays = stats.gradient_arrays(sums, count * length, config, shape, dtype)
            workdir.write(self.work, self._file(layer), arrays)


def names(model: Model, layer: int) -> list[str]:
    """Names of a layer's tensors."""
    parts = part_shapes(model.config, model.config.layer_shapes[layer])
    return [tensor_name(layer, part) for part in parts]


def refuse_other_weights(team: Team, model: Model, where: str, tensors: Iterable[str]) -> None:
    """Refuse processes that have read different weights.

    Raises:
      ConfigError: if they have, on every process.
    """
    if team.count == 1:
        return
    sums = {name: model.checksums.get(name) for name in tensors}
    if not team.same(int(checksum.of_json(sums)[:15], 16)):
        raise ConfigError(
            where, "the processes have different weights", "give all of them the same checkpoint"
        )


def padded_sizes(layer: Layer) -> dict[str, int]:
    """Size of every axis of a layer's padded matrices."""
    axes = [
        pair
        for part in MATRICES
        for pair in zip(PARTS[part].axes, getattr(layer, part).shape, strict=True)
    ]
    return dict(axes)


class LayerFunction:
    """The gradient before a layer, and the sums over those at its outputs.

    Args:
      head_dim, eps, window: as in `forward.decoder_layer`.
    """

    def __init__(self, head_dim: int, eps: float, window: int | None) -> None:
        def step(h: jax.Array, g: jax.Array, w: Layer, rope: forward.Rotation, sums: Any) -> Any:
            found, inputs = backward.layer_gradients(
                h, g, w, rope, head_dim=head_dim, eps=eps, window=window
            )
            sums = jax.tree.map(lambda terms: terms[0], sums)
            added = stats.add_gradients(sums, found.outputs, inputs)
            return found.before, jax.tree.map(lambda terms: terms[None], added)

        self.spread = Spread(
            step,
            (BY_SEQUENCE, BY_SEQUENCE, EVERYWHERE, EVERYWHERE, BY_DEVICE),
            (BY_SEQUENCE, BY_DEVICE),
            donated=4,
        )

    def __call__(
        self, h: np.ndarray, g: np.ndarray, w: Layer, rope: forward.Rotation, sums: Any
    ) -> tuple[np.ndarray, Any]:
        """The gradient before the layer, (D, B, N), and the sums; as in `layer_gradients`."""
        sequences = self.spread.sequences  # those that pad have no gradient
        before, sums = self.spread.call(sequences(h), sequences(g), w, rope, sums)
        return np.asarray(before)[:, : h.shape[1]], sums


layer_function = cache(LayerFunction)  # compiled once for all models of a process


@cache
def _top_gradient(labels: str, eps: float) -> Callable[..., jax.Array]:
    """The compiled gradient of a block's loss by the stream after the last layer, (D, 1, n)."""

    @jax.jit
    def gradient(h: jax.Array, given: jax.Array, norm: jax.Array, head: jax.Array) -> jax.Array:
        def loss(scores: jax.Array) -> jax.Array:
            if labels == stats.TEXT:
                losses = forward.token_losses(scores, jnp.maximum(given, 0))
                return jnp.sum(jnp.where(given < 0, 0, losses))
            drawn = decode.draw(jax.lax.stop_gradient(scores), given)
            return jnp.sum(forward.token_losses(scores, drawn))

        return backward.top(loss, h, norm, head, eps=eps)[1]

    return gradient
