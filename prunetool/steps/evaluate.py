"""The mean loss of a checkpoint on sequences, layer by layer."""

import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunetool import __version__, console, overlap, streaming, workdir
from prunetool.checkpoint.writer import MANIFEST, need_room, sketches_of
from prunetool.errors import CheckpointError, CorpusError
from prunetool.llama import forward
from prunetool.llama.weights import Layer
from prunetool.model import Model
from prunetool.plan import LOGIT_TOKENS
from prunetool.steps.run import recall_weights

USED = 0.05  # of a text; below, its common phrases may be all that is shared


@contextmanager
def claimed(
    work: Path, model: Model, token_ids: str, how: Mapping[str, Any], overwrite: bool
) -> Iterator[None]:
    """Keep other runs out of a work directory, and delete it once the result is there.

    Args:
      work: the directory; a killed run leaves it for resuming.
      model: the checkpoint.
      token_ids: digest of the tokens.
      how: everything else that determines the result.
      overwrite: delete another run there.
    """
    with workdir.lock(work):
        run = workdir.identity("evaluate", model.identity(), token_ids, __version__, how)
        workdir.claim(work, run, overwrite=overwrite)
        yield
        workdir.clear(work)


def used_before(
    model: Model, tokens: np.ndarray, where: str, *, allowed: bool
) -> dict[str, float | None]:
    """Refuse a text that a checkpoint was calibrated or trained on.

    Args:
      model: the checkpoint; nothing is known of one that export did not write.
      tokens: (samples, N), int32.
      where: the text, for the message.
      allowed: measure all the same.

    Returns:
      The fraction of the text that was used, for the result (`overlap.share`; None if the text is
      too short to tell); nothing if the checkpoint's text is not known.

    Raises:
      CorpusError: if it is at least `USED`.
    """
    if not (sketches := sketches_of(model.directory)):
        return {}
    try:
        used = overlap.share(tokens, sketches)
    except ValueError as error:
        raise CheckpointError(
            model.directory / MANIFEST, f"has a damaged sketch ({error})", "export it again"
        ) from error
    if used is None:
        return {"calibrated": None}
    if used >= USED and not allowed:
        raise CorpusError(
            where,
            f"was used to prune {model.directory} (about {used:.0%} of it)",
            "measure on other text, or give --allow-calibrated",
        )
    return {"calibrated": round(used, 4)}


def perplexity(loss: float) -> float | None:
    """exp(loss); None if too large for a float64, above 709 nats."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else None


def mean_loss(
    model: Model,
    tokens: np.ndarray,
    dtype: str,
    work: Path | None = None,
    *,
    overwrite: bool = False,
) -> float:
    """Mean of -log p over every predicted token, in nats.

    Args:
      model: the checkpoint.
      tokens: (samples, N), int32.
      dtype: dtype of the products.
      work: an empty directory, or that of a killed run of the same; None for a temporary one.
      overwrite: start again if the checkpoint has changed since that run.
    """
    if work is None:
        with tempfile.TemporaryDirectory(prefix="prunetool-") as directory:
            return mean_loss(model, tokens, dtype, Path(directory))
    stream = final_stream(model, tokens, dtype, work, overwrite=overwrite)
    return _mean_loss(model, stream, tokens, dtype)


def final_stream(
    model: Model, tokens: np.ndarray, dtype: str, work: Path, *, overwrite: bool = False
) -> streaming.HiddenStates:
    """The residual stream after the last layer, of all sequences; arguments as in `mean_loss`."""
    samples, length = tokens.shape
    config = model.config

    def before(layer: int) -> streaming.HiddenStates:
        path = streaming.path_before(work, layer)
        return streaming.HiddenStates(path, config.size_before(layer), samples, length)

    done = streaming.layers_done(before, model.layers)
    if done and not recall_weights(model, work, overwrite=overwrite):
        done = 0
    if done < model.layers:
        need_room(work, 2 * before(0).size_bytes - workdir.size_bytes(work, *workdir.CALIBRATED))
    stream = before(done)
    streaming.keep_only(stream.path)
    if done == 0:
        streaming.embed(model, tokens, stream)
    step = layer_step(config.head_dim, config.rms_norm_eps, config.window)
    rope = streaming.rotation(model, length)
    layers = console.progress(model.padded_layers(done), model.layers, done)
    for number, layer in layers:
        weights = streaming.to_device(layer, dtype)
        behind = before(number + 1)
        with behind.writing() as write:
            for batch in streaming.batches(0, samples, streaming.batch_size(length)):
                h = np.asarray(step(jnp.asarray(stream.read(batch)), weights, rope)[0])
                streaming.check_finite(h, number)
                write(batch, h)
                console.within(batch.stop, samples, "sequence")
            model.remember(work / workdir.WEIGHTS_NAME)
        stream.path.unlink()
        stream = behind
    return stream


@cache
def layer_step(
    head_dim: int, eps: float, window: int | None
) -> Callable[[jax.Array, Layer, forward.Rotation], tuple[jax.Array, jax.Array]]:
    """The compiled layer: maps h to the next h, and its attention's input."""

    @jax.jit
    def step(h: jax.Array, w: Layer, rope: forward.Rotation) -> tuple[jax.Array, jax.Array]:
        out, inputs = forward.decoder_layer(h, w, rope, head_dim=head_dim, eps=eps, window=window)
        return out, inputs.attention

    return step


class Ends(NamedTuple):
    """Final norm and LM head: they turn the last layer's output into logits."""

    norm: jax.Array
    head: jax.Array
    eps: float

    @classmethod
    def of(cls, model: Model, dtype: str) -> "Ends":
        """The final norm and the head of a model, in the dtype of the head's product."""
        norm = jnp.asarray(model.final_norm(), jnp.float32)
        return cls(norm, jnp.asarray(model.head(), jnp.dtype(dtype)), model.config.final_eps)


def pieces(
    streams: Sequence[streaming.HiddenStates], tokens: np.ndarray
) -> Iterator[tuple[jax.Array, list[jax.Array]]]:
    """Targets, (n,), and for each of ``streams`` the part that predicts them, (D, 1, n).

    Every token but a sequence's first is a target once; n is at most `LOGIT_TOKENS`.
    """
    samples, length = tokens.shape
    for batch in streaming.batches(0, samples, streaming.batch_size(length)):
        whole = [stream.read(batch) for stream in streams]
        for i, sample in enumerate(batch):
            for start in range(0, length - 1, LOGIT_TOKENS):
                stop = min(start + LOGIT_TOKENS, length - 1)
                targets = jnp.asarray(tokens[sample, start + 1 : stop + 1])
                yield targets, [jnp.asarray(h[:, i : i + 1, start:stop]) for h in whole]


def count_pieces(tokens: np.ndarray) -> int:
    """Number of `pieces`."""
    samples, length = map(int, tokens.shape)
    return samples * -(-(length - 1) // LOGIT_TOKENS)


def _mean_loss(
    model: Model, stream: streaming.HiddenStates, tokens: np.ndarray, dtype: str
) -> float:
    """Mean -log p(next token) from the stream after the last layer, in nats."""
    ends = Ends.of(model, dtype)
    losses = _losses(ends.eps)
    total = 0.0
    of_logits = console.progress(pieces([stream], tokens), count_pieces(tokens), what="logits")
    for targets, (h,) in of_logits:
        total += float(losses(h, targets, ends.norm, ends.head))
    predicted: int = tokens.shape[0] * (tokens.shape[1] - 1)
    return total / predicted


@cache
def _losses(eps: float) -> Callable[..., jax.Array]:
    """The compiled sum of -log p of the targets of a piece."""

    @jax.jit
    def losses(h: jax.Array, targets: jax.Array, norm: jax.Array, head: jax.Array) -> jax.Array:
        scores = forward.logits(h, norm, head, eps=eps)
        return jnp.sum(forward.token_losses(scores, targets), dtype=jnp.float64)

    return losses
