"""Compare a pruned checkpoint with the dense one, layer by layer on the same sequences."""

import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunetool import console, streaming
from prunetool.checkpoint.writer import need_room
from prunetool.errors import ConfigError
from prunetool.llama import decode, forward
from prunetool.llama.config import LlamaConfig
from prunetool.llama.weights import Layer
from prunetool.model import Model
from prunetool.pruning import attention_loss
from prunetool.steps.evaluate import Ends, count_pieces, layer_step, perplexity, pieces

NAMES = {"classes": "number of classes", "layers": "number of layers"}


class Comparison(NamedTuple):
    """Result of `compare`.

    Attributes:
      loss, dense_loss: mean -log p of the predicted tokens, nats, for both models.
      divergence: mean KL(dense‖pruned) of the next-token distributions, nats.
      own, same_input: ‖P̃ − P‖_F/‖P‖_F of every query head, (layers, H); NaN for heads that are
        gone or beyond the dense layer's own, and for a whole layer if its heads differ. own: each
        model on its own residual stream, so errors of earlier layers count. same_input: both on
        the dense model's.
      null_divergence, guided_divergence: of a model of pictures, the same KL with the null class,
        and of classifier-free guidance's mixture of both (`decode.guided`); None if not asked for.
    """

    loss: float
    dense_loss: float
    divergence: float
    own: np.ndarray
    same_input: np.ndarray
    null_divergence: float | None = None
    guided_divergence: float | None = None

    def as_json(self, against: str) -> dict[str, Any]:
        """The result as JSON, with the other model's name; NaN is null."""
        errors = {}
        for name in ("own", "same_input"):
            by_head = getattr(self, name)
            known = np.isfinite(by_head)
            layer, head = np.unravel_index(np.argmax(np.where(known, by_head, -1)), by_head.shape)
            errors[name] = {
                "mean": float(by_head[known].mean()) if known.any() else None,
                "worst": float(by_head[layer, head]) if known.any() else None,
                "worst_layer": int(layer),
                "worst_head": int(head),
                "by_head": [[float(e) if e == e else None for e in row] for row in by_head],
            }
        return {
            "model": against,
            "perplexity": perplexity(self.dense_loss),
            "loss": self.dense_loss,
            "kl": self.divergence,
            "attention_error": errors,
            **{
                name: kl
                for name, kl in (
                    ("kl_null", self.null_divergence), ("kl_guided", self.guided_divergence)
                )
                if kl is not None
            },
        }  # fmt: skip


def compare(
    model: Model, dense: Model, tokens: np.ndarray, dtype: str, cfg_scale: float | None = None
) -> Comparison:
    """Run both models over the sequences.

    Args:
      model, dense: the checkpoints; must share vocabulary and kind of attention. Attention is
        compared only where the hidden size is the same.
      tokens: (samples, N), int32.
      dtype: dtype of the products.
      cfg_scale: of pictures, also compare with the null class, and guided with this scale.

    Raises:
      ConfigError: if the two cannot be compared.
    """
    for name in ("vocab_size", "classes", "head_dim", "rope", "qk_norm", "window", "layers"):
        mine, theirs = getattr(model.config, name), getattr(dense.config, name)
        if mine != theirs:
            name = NAMES.get(name, name)
            raise ConfigError(
                "--against",
                f"its {name} is {theirs} but the model's is {mine}",
                "name the checkpoint that was pruned",
            )
    count = len(tokens)  # errors of attention are those of these alone
    if cfg_scale is not None:
        null = tokens.copy()
        null[:, 0] = dense.config.ids - 1
        tokens = np.concatenate([tokens, null])
    sizes = [each.config.hidden_size for each in (model, dense)]
    with tempfile.TemporaryDirectory(prefix="prunetool-") as directory:
        need_room(Path(directory), 4 * tokens.size * max(sizes) * 4)
        streams = [
            streaming.HiddenStates(Path(directory) / name, size, *tokens.shape)
            for name, size in zip(("pruned", "dense"), sizes, strict=True)
        ]
        own, same_input = _errors((model, dense), streams, tokens, count, dtype)
        if cfg_scale is not None:
            streams += [stream.behind(count) for stream in streams]
        loss, dense_loss, kl, *more = _losses(
            (model, dense), streams, tokens[:count], dtype, cfg_scale
        )
        return Comparison(loss, dense_loss, kl, own, same_input, *more)


def _errors(
    models: tuple[Model, Model],
    streams: list[streaming.HiddenStates],
    tokens: np.ndarray,
    measured: int,
    dtype: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Run both streams through all layers, measuring the attention of the first ``measured``.

    The streams become those behind the last layer.
    """
    dense = models[1]
    config = dense.config
    rope = streaming.rotation(dense, tokens.shape[1])
    epsilons = [model.config.rms_norm_eps for model in models]
    steps = [layer_step(config.head_dim, eps, config.window) for eps in epsilons]
    attend = _compiled_attention(config, epsilons)
    for model, stream in zip(models, streams, strict=True):
        streaming.embed(model, tokens, stream)
    most = max(shape.heads for shape in dense.config.layer_shapes)
    rows = np.full((2, dense.layers, most), np.nan)
    size = streaming.batch_size(tokens.shape[1])
    ends = (0, measured, len(tokens))
    batches = [batch for two in pairwise(ends) for batch in streaming.batches(*two, size)]
    layers = zip(*(model.padded_layers() for model in models), strict=True)
    for (number, pruned_layer), (_, dense_layer) in console.progress(layers, dense.layers):
        weights = [streaming.to_device(w, dtype) for w in (pruned_layer, dense_layer)]
        heads = dense.config.layer_shapes[number].heads
        comparable = (
            models[0].config.layer_shapes[number].heads == heads
            and pruned_layer.q.shape == dense_layer.q.shape
            and pruned_layer.k.shape == dense_layer.k.shape
        )
        sums = np.zeros((3, heads))
        after = [
            stream.at(stream.path, model.config.size_before(number + 1))
            for model, stream in zip(models, streams, strict=True)
        ]
        with after[0].writing() as write, after[1].writing() as write_dense:
            for batch in batches:
                behind = [
                    step(jnp.asarray(stream.read(batch)), w, rope)
                    for step, stream, w in zip(steps, streams, weights, strict=True)
                ]
                for (h, _), put in zip(behind, (write, write_dense), strict=True):
                    array = np.asarray(h)
                    streaming.check_finite(array, number)
                    put(batch, array)
                console.within(batch.stop, len(tokens), "sequence")
                if comparable and batch.start < measured:
                    found = attend(behind[0][1], behind[1][1], *weights, rope)
                    sums += np.asarray(found).reshape(3, -1)[:, :heads]
        if comparable:
            by_head = np.asarray(pruned_layer.q[: heads * config.head_dim], np.float32)
            sums[:, ~by_head.reshape(heads, -1).any(axis=1)] = np.nan
            rows[:, number, :heads] = np.sqrt(sums[:2] / sums[2])
        streams[:] = after
    own, same_input = rows
    return own, same_input


def _compiled_attention(config: LlamaConfig, epsilons: list[float]) -> Any:
    """‖P̃ − P‖² on own inputs and on the dense model's, and ‖P‖²; (3, n_kv, g)."""
    pruned, dense = (
        partial(forward.queries_keys, head_dim=config.head_dim, eps=eps) for eps in epsilons
    )

    @jax.jit
    def attend(x: Any, x_dense: Any, w: Layer, w_dense: Layer, rope: Any) -> jax.Array:
        errors, energy = attention_loss.squared_errors(
            [pruned(x, w, rope), pruned(x_dense, w, rope)],
            dense(x_dense, w_dense, rope),
            config.window,
        )
        return jnp.concatenate([errors, energy[None]])

    return attend


def _losses(
    models: tuple[Model, Model],
    streams: list[streaming.HiddenStates],
    tokens: np.ndarray,
    dtype: str,
    cfg_scale: float | None,
) -> list[float]:
    """Mean -log p under both models, and mean KL(dense‖pruned).

    With streams of the null class too, two more: their KL, and that of the guided mixtures.
    """
    ends = [Ends.of(model, dtype) for model in models]
    norms, heads, epsilons = zip(*ends, strict=True)

    @jax.jit
    def sums(pieces: list[Any], targets: Any, norms: Any, heads: Any) -> jax.Array:
        by_class = [
            [
                forward.logits(h, norm, head, eps=eps)
                for h, norm, head, eps in zip(pair, norms, heads, epsilons, strict=True)
            ]
            for pair in (pieces[:2], pieces[2:])
            if pair
        ]
        pruned, original = by_class[0]
        parts = [
            forward.token_losses(pruned, targets),
            forward.token_losses(original, targets),
            forward.divergences(original, pruned),
        ]
        if cfg_scale is not None:
            scale = jnp.float32(cfg_scale)
            mixed = [
                decode.guided(jnp.concatenate(each, axis=1), scale)
                for each in zip(*by_class, strict=True)
            ]
            parts += [forward.divergences(q, p) for p, q in (by_class[1], mixed)]
        return jnp.stack([jnp.sum(part, dtype=jnp.float64) for part in parts])

    total = np.zeros(3 if cfg_scale is None else 5)
    of_logits = console.progress(pieces(streams, tokens), count_pieces(tokens), what="logits")
    for targets, found in of_logits:
        total += np.asarray(sums(found, targets, norms, heads))
    return [float(value) for value in total / (tokens.shape[0] * (tokens.shape[1] - 1))]
