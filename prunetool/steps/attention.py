"""Learn masks for a layer's q and k from its attention matrices, on the stored sequences."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunetool import records, streaming, workdir
from prunetool.errors import NumericalError, RecordError
from prunetool.llama import forward
from prunetool.model import Model
from prunetool.pruning import attention_loss, attention_mask
from prunetool.pruning.attention_loss import AttentionInputs, Pair, Turn

# Measured on layers 5, 10 and 20 of SmolLM2-135M, 8 sequences of 256 tokens: held-out error.
RELATIVE_LAMBDA = 1e-3  # of λ_max; 1e-4 … 1e-2 within 0.002 of it
REFINE_RATE = 0.01  # Adam's step, relative to a matrix's RMS; 0.003 and 0.03 were worse
CHECK_STEPS = 20  # between checks of the held-out loss


class Learned(NamedTuple):
    """Result of a descent."""

    result: Pair
    steps: int


class Settings(NamedTuple):
    """Settings of Algorithm 1: λ, η and T; None: set by the layer's curvature."""

    lam: float | None
    learning_rate: float | None
    iterations: int


class AttentionLayer:
    """A layer's attention: its weights, and the sequences to learn from and to check on.

    Args:
      turns: the model's `turn_of`, by length; the same object for all layers.
      work: the work directory.
      record: the layer's record.
      w: W_q and W_k of the kept KV groups, (out, in).
      biases: their biases, or None.
      norms: weights of the norms of queries and keys, or None.
      window: the window of the model's attention.

    Raises:
      RecordError: if calibrate kept no attention inputs.
    """

    def __init__(
        self,
        turns: Callable[[int], Turn],
        work: Path,
        record: records.LayerRecord,
        w: Any,
        biases: Any,
        norms: Any,
        window: int | None,
    ) -> None:
        if "attention" not in record.files:
            raise RecordError(
                f"layer {record.index}",
                "has no attention inputs",
                "run calibrate with --attention-samples",
            )
        samples = workdir.load(work, record.files["attention"])
        if any(part not in samples or samples[part].ndim != 3 for part in ("fit", "held_out")):
            raise RecordError(
                work / record.files["attention"], "lacks the attention inputs", workdir.AGAIN
            )
        self.turn = turns(samples["fit"].shape[2])
        self.w: Pair = tuple(jnp.asarray(W, jnp.float32) for W in w)  # type: ignore[assignment]
        b_q, b_k, *weights = (
            None if b is None else jnp.asarray(b, jnp.float32) for b in (*biases, *norms)
        )
        self.fit, self.held_out = (
            AttentionInputs(
                jnp.asarray(samples[part], jnp.float32), b_q, b_k, tuple(weights), window
            )
            for part in ("fit", "held_out")
        )
        self._targets = [
            attention_loss.queries_keys(self.turn, self.w, inputs)
            for inputs in (self.fit, self.held_out)
        ]
        self.key = jax.random.key(record.index)

    def errors(self, w: Any) -> tuple[float, float]:
        """Relative error of the attention matrices, mean over heads: calibration, held-out."""
        pair = tuple(jnp.asarray(W, jnp.float32) for W in w)
        fit, held_out = (
            float(jnp.mean(attention_loss.measure(self.turn, pair, inputs, target)[1]))
            for inputs, target in zip((self.fit, self.held_out), self._targets, strict=True)
        )
        return fit, held_out

    def saliency(self) -> Pair:
        """The diagonal of the Hessian on the masks: W²∘diag of the Hessian on the weights."""
        diagonal = attention_loss.hessian_diagonal(self.turn, self.w, self.fit, self.key)
        return self.w[0] ** 2 * diagonal[0], self.w[1] ** 2 * diagonal[1]

    def descend(self, how: Settings, to_the_end: bool) -> tuple[Learned, float, float]:
        """Algorithm 1 from M = 1; stops when the held-out loss rises, unless ``to_the_end``.

        Returns:
          Both masks, real-valued; the λ and η used.

        Raises:
          NumericalError: if the steps diverge.
        """
        lam, rate = how.lam, how.learning_rate
        if lam is None or rate is None:
            largest = float(attention_loss.mask_curvature(self.turn, self.w, self.fit))
            if not 0 < largest < float("inf"):
                raise NumericalError(
                    "attention",
                    f"the largest curvature of its loss is {largest}",
                    "check the model, or calibrate on other text",
                )
            lam = RELATIVE_LAMBDA * largest if lam is None else lam
            rate = 1 / (largest + lam) if rate is None else rate
        M: Pair = (jnp.ones_like(self.w[0]), jnp.ones_like(self.w[1]))
        best = M
        start = lowest = float(attention_loss.regularisation(M, lam))
        done, used = 0, 0
        while done < how.iterations:
            count = min(CHECK_STEPS, how.iterations - done)
            M, losses = attention_loss.descend_mask(
                self.turn, M, self.w, self.fit, self._targets[0],
                jnp.float32(lam), jnp.float32(rate), steps=count,
            )  # fmt: skip
            done += count
            reached = self._mask_loss(M, lam, held_out=False)
            # Short enough steps never raise the loss; the margin is for float32.
            if not max(reached, float(jnp.max(losses))) <= start * 1.001 + 1e-12:
                raise NumericalError(
                    "attention",
                    f"the loss went from {start:.3g} to {reached:.3g} in {done} "
                    f"steps of {rate:.3g}",
                    "lower --learning-rate",
                )
            held_out = self._mask_loss(M, lam, held_out=True)
            if held_out > lowest and not to_the_end:
                break
            lowest, best, used = held_out, M, done
        return Learned(best, used), lam, rate

    def _mask_loss(self, M: Pair, lam: float, held_out: bool) -> float:
        data = self._loss((M[0] * self.w[0], M[1] * self.w[1]), held_out)
        return data + float(attention_loss.regularisation(M, lam))

    def _loss(self, w: Pair, held_out: bool) -> float:
        """The loss without λ, on the sequences to learn from or the held-out ones."""
        inputs = self.held_out if held_out else self.fit
        return float(attention_loss.measure(self.turn, w, inputs, self._targets[held_out])[0])

    def refine(self, support: Any, steps: int) -> Learned:
        """Descend on the kept weights' values; keeps the best result on the held-out sequences.

        Raises:
          NumericalError: if a loss is not finite.
        """
        on: Pair = tuple(jnp.asarray(s, jnp.float32) for s in support)  # type: ignore[assignment]
        w: Pair = (on[0] * self.w[0], on[1] * self.w[1])
        zero: Pair = (jnp.zeros_like(w[0]), jnp.zeros_like(w[1]))
        state = attention_loss.Refining(w, zero, zero)
        rates = tuple(jnp.float32(REFINE_RATE) * jnp.sqrt(jnp.mean(W**2)) for W in self.w)
        best, lowest = Learned(w, 0), self._loss(w, held_out=True)
        for start in range(0, steps, CHECK_STEPS):
            count = min(CHECK_STEPS, steps - start)
            state, losses = attention_loss.refine(
                self.turn, state, on, self.fit, self._targets[0], rates,
                jnp.float32(start), jnp.float32(steps), steps=count,
            )  # fmt: skip
            if not np.isfinite(losses).all():
                raise NumericalError(
                    "attention", "the loss is not finite while refining", "leave out --refine"
                )
            held_out = self._loss(state.w, held_out=True)
            if held_out < lowest:
                lowest, best = held_out, Learned(state.w, start + count)
        return best


def turn_of(model: Model, length: int) -> Turn:
    """The model's `forward.turn`, for sequences of ``length``.

    Functions that take it are compiled anew for every object: make one per run.
    """
    rope, config = streaming.rotation(model, length), model.config
    return partial(forward.turn, rope=rope, head_dim=config.head_dim, eps=config.rms_norm_eps)


def saliency(layer: AttentionLayer) -> tuple[Pair, dict[str, float]]:
    """Score the weights of W_q and W_k by ``attention-diag``."""
    return layer.saliency(), {}


def learned_by_descent(
    layer: AttentionLayer, *, published: bool, **how: Any
) -> tuple[Pair, dict[str, float]]:
    """Scores by ``attention-gd``, and its steps. `attention_mask` says which parts are the paper's.

    Args:
      layer: the layer.
      published: use the paper's printed settings instead of ``how``.
      how: the `Settings`.
    """
    settings = Settings(*attention_mask.PUBLISHED) if published else Settings(**how)
    (M, steps), lam, rate = layer.descend(settings, to_the_end=published)
    said = {"iterations": float(steps), "lambda": lam, "learning_rate": rate}
    if published:
        return M, said
    curvature = layer.saliency()
    return (M[0] ** 2 * curvature[0], M[1] ** 2 * curvature[1]), said
