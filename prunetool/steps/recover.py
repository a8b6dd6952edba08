"""Train the kept weights to predict as the dense model does, layer by layer.

The loss is KL(dense ‖ pruned) of the next-token distributions, in nats, over one sequence a step. A
step runs the sequence forward through the pruned layers, with the residual stream in files, then
its loss's gradient back; each layer's weights are updated as soon as their gradient is there. The
dense model runs once over all sequences: its last residual stream is kept, from which its final
norm and head make the distribution again. That is exact and, for D below 1000, smaller than the 256
largest probabilities of each token.
"""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prunetool import console, corpus, overlap, records, streaming, workdir
from prunetool.checkpoint import checksum
from prunetool.checkpoint import writer as files
from prunetool.corpus import Text
from prunetool.errors import CheckpointError, NumericalError, RecordError
from prunetool.kept import FINAL, kept_shape, kept_units, pruned_layer
from prunetool.llama import backward, forward
from prunetool.llama.config import LayerShape
from prunetool.llama.parts import MATRICES, PARTS
from prunetool.llama.weights import Layer, part_shapes, scatter
from prunetool.plan import LOGIT_TOKENS
from prunetool.stats import GIVEN
from prunetool.steps.evaluate import Ends, final_stream, layer_step
from prunetool.steps.run import Run, as_fed, read_text, reopen
from prunetool.steps.selftext import Sampler, refuse_pictures
from prunetool.steps.trained import Gradient, Trained
from prunetool.tokenizer import bos_id

# Largest learning rates: for each nat of held-out loss before; at most; of the norms alone.
RATE_OF_LOSS, HIGHEST_RATE, RATE_OF_NORMS = 2.5e-4, 5e-4, 5e-3
WARM_UP, FIRST = 0.1, 1 / 25  # of the steps; the first learning rate as a fraction of the largest
MEASURED = 4  # times per epoch that the held-out loss is measured
WORSE = 2.0  # a held-out loss this many times the first means divergence
SIZES = 4  # different numbers of channels that layers are padded to, each compiled once
NORMS = (*backward.NORMS, FINAL)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """One cycle: from ``peak`` / 25 up for a tenth of the steps, then down to 0, by cosines."""
    top = WARM_UP * steps
    if step < top:
        along, low = 1 - step / top, FIRST * peak
    else:
        along, low = (step - top) / max(steps - top, 1), 0.0
    return low + (peak - low) * (1 + math.cos(math.pi * along)) / 2


def prepare(
    header: records.Header,
    made: list[records.LayerRecord],
    text: Text | None,
    samples: int,
    held_out: int,
    how: dict[str, Any],
    peak: float | None,
    profile: Path | None,
) -> "Recovery":
    """Find the tokens and the learning rate, and open the run.

    Args:
      header, made: the stream.
      text: text to train on, or that the dense model writes it; None for the calibration's tokens.
      samples: sequences of it to train on.
      held_out: further ones that only measure; of the calibration's, at most this many.
      how: the command's other options, by name.
      peak: largest learning rate; None for the default.
      profile: as in `Run.of`.

    Raises:
      WorkError: if the work directory is not the stream's.
      RecordError: if it has other tokens.
      CorpusError: if the text is too short.
    """
    model = reopen(header)
    dtype = model.product_dtype(how["dtype"])
    if not any(
        any(mask["removed"] for mask in record.values.get("masks", {}).values())
        or kept_shape(shape, kept_units(Path(header.work), record, shape)) != shape
        for shape, record in zip(model.config.layer_shapes, made, strict=True)
    ):
        raise RecordError("layer 0", "nothing was pruned", "run prunetool score before this step")
    cut: dict[str, Any] = {}  # how the text was, by option
    if text is None:
        tokens, held_out = _calibrated(header, samples, held_out)
    elif text.by_model:
        refuse_pictures(model)
        bos = bos_id(model.directory, model.config.vocab_size, text.bos)
        sampler = Sampler(model, text.length, bos, dtype, how["seed"])
        tokens = sampler.load(Path(header.work), samples + held_out)
        cut = {"sequence_length": text.length, "bos": bos}
    else:
        tokens, bos = read_text(model, text, samples + held_out)
        if not model.config.classes:  # a picture has its own
            cut = {"sequence_length": text.length, "bos": bos}
        tokens = as_fed(model, tokens, "class")
    if peak is None and how["what"] == "norms":
        peak = RATE_OF_NORMS
    random = np.random.default_rng(how["seed"])
    trained = len(tokens) - held_out
    order = [int(n) for _ in range(how["epochs"]) for n in random.permutation(trained)]
    header = header.after(
        "recover",
        **how | {"dtype": dtype},
        learning_rate=peak,
        samples=trained,
        held_out=held_out,
        text=_named(text),
        tokens=corpus.fingerprint(tokens),
        **cut,
        **(text.said if text else {}),
    )
    run = Run.of(header, profile, discard=False)
    return Recovery(run, made, tokens, held_out, order, how["what"], peak, dtype)


def _named(text: Text | None) -> str | None:
    """The option --text as the card has it."""
    if text is None or text.dataset or text.tokens_path:
        return None
    return "self" if text.by_model else "TEXT"


def _calibrated(header: records.Header, samples: int, held_out: int) -> tuple[np.ndarray, int]:
    """The calibration's sequences: the first ones, and those held out, which come last."""
    work, said = Path(header.work), header.calibration
    tokens = workdir.TensorFile(work, workdir.TOKENS_NAME)["tokens"]
    if corpus.fingerprint(tokens) != said["tokens"]:
        raise RecordError(
            work / workdir.TOKENS_NAME, "has the tokens of another run", "calibrate again"
        )
    fit = len(tokens) - int(said["held_out"])
    if fit == len(tokens):
        fit -= 1  # there is no other to measure on
    if not fit:
        raise RecordError("recover", "there is one sequence only", "give --text with more")
    return np.concatenate([tokens[: min(samples, fit)], tokens[fit:][:held_out]]), min(
        held_out, len(tokens) - fit
    )


@dataclass
class Recovery:
    """One training: everything its layers share.

    Attributes:
      run: the run.
      made: the records of all layers.
      tokens: the sequences, (samples, N), int32; the last ``held_out`` only measure.
      order: numbers of the sequences to descend on, one a step.
      what: ``all`` or ``norms``.
      peak: largest learning rate; None for the default.
      dtype: of the products.
    """

    run: Run
    made: list[records.LayerRecord]
    tokens: np.ndarray
    held_out: int
    order: list[int]
    what: str
    peak: float | None
    dtype: str

    def __post_init__(self) -> None:
        self.model = self.run.model
        self._directory = self.run.work / self.run.directory
        config = self.model.config
        self._config = {
            "head_dim": config.head_dim, "eps": config.rms_norm_eps, "window": config.window
        }  # fmt: skip
        self.kl: list[tuple[int, float]] = []  # held-out loss by number of steps

    @property
    def largest_rate(self) -> float:
        """`peak`; by default, the farther from the dense model, the larger."""
        if self.peak is None:
            return min(RATE_OF_LOSS * self.kl[0][1], HIGHEST_RATE)
        return self.peak

    @property
    def best(self) -> tuple[int, float]:
        """The smallest held-out loss, and after how many steps; the first of equals."""
        return min(self.kl, key=lambda point: point[1])

    def layers(self) -> Iterator[records.LayerRecord]:
        """Train, then yield each layer's record with its weights."""
        self._directory.mkdir(exist_ok=True)
        if not self._finished:
            self._train()
        self._state.forget()
        for path in self._directory.iterdir():
            if workdir.FILES.fullmatch(path.name):
                path.unlink()
        steps, after = self.best
        said = {
            "kl_before": self.kl[0][1], "kl_after": after, "steps": steps,
            "learning_rate": self.largest_rate,
        }  # fmt: skip
        for record in self.made:
            if steps:
                yield record.adding({"recover": self._file(record.index)}, {"recover": said})
            else:
                yield record

    def _file(self, layer: int) -> str:
        return workdir.layer_file(self.run.directory, layer)

    @property
    def needed_bytes(self) -> int:
        """Disk for the state (one layer's twice), the weights, and the streams."""
        if self._finished:
            return 0
        state = self._state
        every = sum(math.prod(extent) for shapes in state.shapes for extent in shapes.values())
        trained = [
            sum(math.prod(shapes[part]) for part in state.trained(layer))
            for layer, shapes in enumerate(state.shapes)
        ]
        stream = self.tokens.shape[1] * self.model.config.hidden_size * 4
        streams: int = (2 * len(self.tokens) + len(trained) + 2) * stream
        return 4 * every + 12 * sum(trained) + 12 * max(trained) + streams

    @cached_property
    def _shapes(self) -> list[LayerShape]:
        """What each layer keeps."""
        pairs = zip(self.model.config.layer_shapes, self.made, strict=True)
        return [kept_shape(s, kept_units(self.run.work, record, s)) for s, record in pairs]

    @cached_property
    def _padded(self) -> list[LayerShape]:
        """The same with channels rounded up to one of `SIZES`, so that few shapes are compiled."""
        step = -(-max(shape.channels for shape in self._shapes) // SIZES)
        return [
            shape.keeping(shape.kv_heads, -(-shape.channels // step) * step)
            for shape in self._shapes
        ]

    @cached_property
    def _state(self) -> Trained:
        config = self.model.config
        shapes = [part_shapes(config, shape) for shape in self._padded]
        trained = set(NORMS) if self.what == "norms" else {*PARTS, FINAL}
        return Trained(self._directory, [*shapes, {FINAL: (config.hidden_size,)}], trained)

    def _train(self) -> None:
        dense = final_stream(self.model, self.tokens, self.dtype, self._directory)
        ends = Ends.of(self.model, self.dtype)
        done, last = self._resume()
        steps = console.progress(range(done, len(self.order)), len(self.order), done, "step")
        try:
            self._measure(done, dense, ends)
            self._check_loss()  # a killed run may have measured it
            for step in steps:
                self._step(step, last, dense, ends)
                last = None
                self._measure(step + 1, dense, ends)
                self._check_loss()
        except NumericalError as error:
            if not self.kl:  # the weights that came in
                raise
            console.log.warning(
                "%s: %s; what was best before is kept; try a lower --learning-rate",
                error.where,
                error.what,
            )
        self._write_progress(finished=True)

    def _check_loss(self) -> None:
        """Refuse to go on from a held-out loss that diverged."""
        count, loss = self.kl[-1]
        if count and not loss < WORSE * self.kl[0][1]:
            raise NumericalError("recover", f"diverged after {console.counted(count, 'step')}", "")

    @cached_property
    def _finished(self) -> bool:
        """Whether an earlier run did all, and its files are as written; reads what it measured."""
        try:
            said = checksum.read_sealed(self._directory / workdir.PROGRESS_NAME)
        except CheckpointError:
            return False
        self.kl = [(int(step), float(loss)) for step, loss in said["kl"]]
        if not said["finished"]:
            return False
        try:
            for layer in range(self.model.layers) if self.best[0] else ():
                workdir.TensorFile(self.run.work, self._file(layer)).check()
        except RecordError as error:
            console.log.warning("%s: %s; training again", error.where, error.what)
            return False
        return True

    def _write_progress(self, *, finished: bool) -> None:
        value = {"kl": self.kl, "finished": finished, "sketch": overlap.sketch(self.tokens)}
        files.write_json(self._directory / workdir.PROGRESS_NAME, checksum.sealed(value))

    def _resume(self) -> tuple[int, int | None]:
        """Number of whole steps, and the lowest layer that had one more update; None if none had.

        Starts again if files are missing.
        """
        state, last = self._state, self.model.layers
        counts = [state.updates(layer) for layer in range(last + 1)]
        known = [count for count in counts if count is not None]
        whole = len(known) == len(counts) and bool(self.kl)
        done, partly = (min(known), None) if whole else (0, None)
        if whole and max(known) > done:
            partly = known.index(done + 1)
            there = [self._stream(layer).is_whole() for layer in range(partly)]
            whole = all(there) and self._stream(partly, "gradient").is_whole()
        if not whole:
            if known:
                console.log.warning("%s: files are missing; starting again", self._directory)
            state.forget()
            self.kl = []
            for layer, record in enumerate(console.progress(self.made, last)):
                state.start(layer, self._initial(record))
            state.start(last, {FINAL: self.model.final_norm()})
            return 0, None
        for layer, count in enumerate(known):
            state.keep_only(layer, count)
        return done, partly

    def _initial(self, record: records.LayerRecord) -> dict[str, np.ndarray]:
        shape, target = self._shapes[record.index], self._padded[record.index]
        layer = scatter(
            pruned_layer(self.model, self.run.work, record), shape, target,
            np.arange(shape.kv_heads), np.arange(shape.channels),
        )  # fmt: skip
        return {part: array for part, array in layer._asdict().items() if array is not None}

    def _stream(self, layer: int, kind: str = "residual") -> streaming.HiddenStates:
        path = streaming.path_before(self._directory, layer, kind=kind)
        size = self.model.config.hidden_size
        return streaming.HiddenStates(path, size, 1, self.tokens.shape[1], durable=False)

    def _read(self, layer: int, count: int) -> Layer:
        """A layer's weights after ``count`` updates, on the device, in the dtype of products."""
        dtype, weights = jnp.dtype(self.dtype), self._rounded(layer, count)
        return Layer(**{part: array.astype(dtype) for part, array in weights.items()})

    def _rounded(self, layer: int, count: int) -> dict[str, jax.Array]:
        """Weights after ``count`` updates as export rounds them, so that these are measured."""
        weights, dtype = self._state.weights(layer, count), jnp.dtype(self.model.dtype)
        return {part: jnp.asarray(array).astype(dtype) for part, array in weights.items()}

    def _final_norm(self, count: int) -> jax.Array:
        return self._rounded(self.model.layers, count)[FINAL].astype(jnp.float32)

    def _ahead(self, numbers: range, count: int) -> Iterator[tuple[int, Layer]]:
        """Layers' weights, each read while the one before is in use."""
        with ThreadPoolExecutor(1) as thread:
            ahead = [thread.submit(self._read, n, count) for n in numbers[:1]]
            for n in numbers:
                weights = ahead.pop().result()
                if n + numbers.step in numbers:
                    ahead.append(thread.submit(self._read, n + numbers.step, count))
                yield n, weights

    def _forward(self, h: np.ndarray, count: int) -> Iterator[np.ndarray]:
        """The streams before every layer, and after the last; (D, B, N) each."""
        rope, step = streaming.rotation(self.model, h.shape[2]), layer_step(**self._config)
        for n, w in self._ahead(range(self.model.layers), count):
            yield h
            h = np.asarray(step(jnp.asarray(h), w, rope)[0])
            streaming.check_finite(h, n)
        yield h

    def _embedded(self, numbers: range | list[int]) -> np.ndarray:
        rows = self.model.embedding()[self.tokens[numbers]].astype(np.float32)
        return np.asarray(rows.transpose(2, 0, 1))

    def _step(
        self, step: int, partly: int | None, dense: streaming.HiddenStates, ends: Ends
    ) -> None:
        """One step; if ``partly`` layers are left of it, only these."""
        last, sequence = self.model.layers, self.order[step]
        rate = learning_rate(step, len(self.order), self.largest_rate)
        if partly is None:
            for layer, h in enumerate(self._forward(self._embedded([sequence]), step)):
                self._put(layer, "residual", h)
            self._top(h, dense.read(range(sequence, sequence + 1)), ends, step, rate)
        rope = streaming.rotation(self.model, self.tokens.shape[1])
        below = range((last if partly is None else partly) - 1, -1, -1)
        for n, w in self._ahead(below, step):
            h, g = self._stream(n).read(range(1)), self._stream(n + 1, "gradient").read(range(1))
            found, inputs = _gradients(jnp.asarray(h), jnp.asarray(g), w, rope, **self._config)
            before = np.asarray(found.before)
            streaming.check_finite(before, n, "its gradients are NaN or infinite")
            self._put(n, "gradient", before)
            for part in self._state.trained(n):
                gradient = Gradient(*_of_part(part, found, inputs))
                self._state.update(n, part, step, gradient, rate)
            self._state.keep_only(n, step + 1)
            self._stream(n + 1, "gradient").path.unlink()
            console.within(last - n, last, "layer")
        self._stream(0, "gradient").path.unlink()
        streaming.return_free_memory()

    def _put(self, layer: int, kind: str, h: np.ndarray) -> None:
        with self._stream(layer, kind).writing() as write:
            write(range(1), h)

    def _top(self, h: np.ndarray, dense: np.ndarray, ends: Ends, step: int, rate: float) -> None:
        """Write the loss's gradient after the last layer, and update the final norm."""
        last, length = self.model.layers, h.shape[2]
        norm = self._final_norm(step)
        g, of_norm = [], jnp.zeros_like(norm)
        for start in range(0, length, LOGIT_TOKENS):
            block = slice(start, start + LOGIT_TOKENS)
            of_h, to_norm = _top(h[:, :, block], dense[:, :, block], norm, ends, ends.eps)
            g.append(np.asarray(of_h))
            of_norm += to_norm
        found = np.concatenate(g, axis=2) / np.float32(length)
        streaming.check_finite(found, last - 1, "the gradients after it are NaN or infinite")
        self._put(last, "gradient", found)
        self._state.update(last, FINAL, step, Gradient(of_norm / np.float32(length)), rate)
        self._state.keep_only(last, step + 1)

    def _measure(self, count: int, dense: streaming.HiddenStates, ends: Ends) -> None:
        """Measure the held-out loss if it is time, and write the weights if it is the best."""
        every = max((len(self.tokens) - self.held_out) // MEASURED, 1)
        due = count == len(self.order) or count % every == 0
        if not due or any(count == done for done, _ in self.kl):
            return
        held, total = range(len(self.tokens) - self.held_out, len(self.tokens)), 0.0
        norm = self._final_norm(count)
        for batch in streaming.batches(held.start, held.stop, streaming.batch_size(dense.length)):
            h = deque(self._forward(self._embedded(batch), count), maxlen=1).pop()  # keeps one
            target = dense.read(batch)
            for i in range(len(batch)):
                for start in range(0, dense.length, LOGIT_TOKENS):
                    block = np.s_[:, i : i + 1, start : start + LOGIT_TOKENS]
                    total += float(_divergence(h[block], target[block], norm, ends, ends.eps))
        loss = total / (len(held) * dense.length)
        if not math.isfinite(loss):
            raise NumericalError(
                "recover",
                f"has a loss of {loss} after {console.counted(count, 'step')}",
                "export what came in, and evaluate it",
            )
        self.kl.append((count, loss))
        console.log.debug("after %d of %d steps: held-out KL %.4f", count, len(self.order), loss)
        if count and self.best[0] == count:
            self._write_weights(count)
        self._write_progress(finished=False)

    def _write_weights(self, count: int) -> None:
        """Write all layers' weights after ``count`` updates, without their padding."""
        for layer, shape in enumerate(self._shapes):
            shapes = part_shapes(self.model.config, shape)
            weights = self._state.weights(layer, count)
            arrays = {
                part: weights[part][tuple(map(slice, shapes[part]))]
                for part in self._state.trained(layer)
            }
            if layer == self.model.layers - 1:
                arrays |= self._state.weights(layer + 1, count)
            workdir.write(self.run.work, self._file(layer), arrays)


def _of_part(
    part: str, found: backward.LayerGradients, inputs: forward.Taps
) -> tuple[jax.Array, jax.Array | None]:
    """The gradient of a part, as outputs and inputs or as it is."""
    if part in MATRICES:
        return found.outputs[part], getattr(inputs, GIVEN[part])
    if part in found.norms:
        return found.norms[part], None
    return jnp.sum(found.outputs[part.removesuffix("_bias")], axis=(1, 2)), None


@partial(jax.jit, static_argnames=("head_dim", "eps", "window"))
def _gradients(
    h: jax.Array, g: jax.Array, w: Layer, rope: forward.Rotation, **sizes: Any
) -> tuple[backward.LayerGradients, forward.Taps]:
    return backward.layer_gradients(h, g, w, rope, **sizes)


@partial(jax.jit, static_argnames="eps")
def _divergence(
    h: jax.Array, dense: jax.Array, norm: jax.Array, ends: Ends, eps: float
) -> jax.Array:
    """Σ KL(dense ‖ pruned) over tokens, from the streams after the last layer, (D, 1, n)."""
    target = forward.logits(dense, ends.norm, ends.head, eps=eps)
    return jnp.sum(forward.divergences(target, forward.logits(h, norm, ends.head, eps=eps)))


@partial(jax.jit, static_argnames="eps")
def _top(
    h: jax.Array, dense: jax.Array, norm: jax.Array, ends: Ends, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `_divergence` with respect to ``h`` and ``norm``."""
    target = forward.logits(dense, ends.norm, ends.head, eps=eps)

    def loss(scores: jax.Array) -> jax.Array:
        return jnp.sum(forward.divergences(target, scores))

    return backward.top(loss, h, norm, ends.head, eps=eps)[1:]
