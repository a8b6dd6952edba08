"""The forward pass over the calibration sequences, layer by layer, and its sums."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunetool import __version__, console, corpus, plan, records, stats, streaming, workdir
from prunetool.checkpoint import checksum
from prunetool.checkpoint.writer import need_room
from prunetool.devices import BY_DEVICE, BY_SEQUENCE, EVERYWHERE, Spread, Team, own_terms
from prunetool.errors import ConfigError
from prunetool.llama import forward
from prunetool.llama.parts import EMBEDDING, FINAL_NORM, LM_HEAD
from prunetool.llama.weights import Layer
from prunetool.model import Model
from prunetool.profiling import Profile
from prunetool.pruning import gram
from prunetool.steps.backward import Backward, Precision, names, padded_sizes, refuse_other_weights
from prunetool.steps.run import Opens, recall_weights

# What the first tokens count as, of the tokens to fit: measured on SmolLM2-135M
# (examples/methods.md).
FIRST_SHARE = 0.1


class AttentionSamples(NamedTuple):
    """Number of first, and of last, sequences whose attention inputs are kept, and their length."""

    samples: int
    length: int


def draw_first_tokens(tokens: np.ndarray, count: int) -> np.ndarray:
    """Draw some of the calibration's tokens, to run each as a text of its own.

    In a model whose texts begin with no fixed token, whichever comes first is what later tokens
    attend to for lack of anything else (StreamingLLM's attention sink, arXiv 2309.17453), and its
    inputs are like no other token's. Sequences show one such token each, too few for a refit to
    keep what the rarer ones need.

    Args:
      tokens: all sequences, (samples, N); also those held out.
      count: how many, rounded up to whole rows; at most as many as there are.

    Returns:
      (rows, N), int32.
    """
    samples, length = tokens.shape
    rows = min(-(-count // length), samples)
    places = np.random.default_rng(0).choice(tokens.size, rows * length, replace=False)
    drawn: np.ndarray = tokens.ravel()[places].reshape(rows, length)
    return drawn


@dataclass
class Calibration:
    """One calibration: everything its layers share.

    A layer's stats are written first and the residual stream after it last, so a layer is done
    once a ``hidden-`` file with a higher number exists. Each process keeps the stream of its own
    sequences, and removes a file of it only when all have the next one.

    Attributes:
      first: ids to run as texts of one token each (`draw_first_tokens`), (rows, N).
      batch: sequences processed at a time.
      gradients: number of sequences of which a loss's gradients are summed; 0 for none.
      chosen: how ``tokens`` were chosen, for the history.
      labels: of the loss: ``model`` or ``text``.
      overwrite: start again if the checkpoint has changed since a killed run.
    """

    model: Model
    tokens: np.ndarray
    held_out: int
    stats: str
    precision: Precision
    work: Path
    attention: AttentionSamples
    first: np.ndarray
    batch: int
    gradients: int
    team: Team
    profile: Profile
    chosen: Mapping[str, Any]
    labels: str
    overwrite: bool = False

    def write(self, model: str, open_sink: Opens) -> None:
        """Claim the work directory, and write the records of all layers (only process 0).

        Args:
          model: the checkpoint as named by the user.
          open_sink: opens the records' destination.

        Raises:
          ConfigError: if the processes differ in what they run.
          WorkError: if the work directory has another run, or the disk is too small.
        """
        samples, length = self.tokens.shape
        how = {
            "samples": samples,
            "sequence_length": length,
            **self.chosen,
            "held_out": self.held_out,
            "first_tokens": self.first.size,
            "gradients": self.gradients,
            "labels": self.labels,
            "stats": self.stats,
            "attention": list(self.attention),
            **self.precision._asdict(),
        }
        known, team = self.model.identity(), self.team
        ids = corpus.fingerprint(self.tokens)
        run = workdir.identity("calibrate", known, ids, __version__, how)
        header = records.Header(
            str(self.model.directory),
            model,
            checksum.of_json(known),
            str(self.work),
            self.model.layers,
        ).after("calibrate", **how, tokens=ids)
        if not team.same(int(workdir.digest(run), 16)):
            raise ConfigError(
                "--coordinator",
                "the processes differ in checkpoint, text or options",
                "give all of them the same",
            )
        # Process 0 takes the lock, as a single process would.
        locked = self.work.with_name(f"{self.work.name}{team.suffix if team.index else ''}")
        with workdir.lock(locked), self.profile.trace():
            for index in range(team.count):  # process 0 first: others may share its directory
                if index == team.index:
                    workdir.claim(self.work, run, overwrite=self.overwrite)
                team.wait(f"claim of process {index}")
            if not self.whole:
                self._need_room()
            layers = self.layers()
            if team.index == 0:
                copied = workdir.records_copy(self.work, workdir.STATS)
                with open_sink() as stream, copied as copy:
                    records.write(stream, header, layers, copy)
            else:
                for _ in layers:
                    pass
            team.leave()

    def _need_room(self) -> None:
        _, stats_dtype, stream_dtype = self.precision
        samples, length = self.tokens.shape
        need = plan.stats_bytes(
            self.model, self.stats, self.attention, stats_dtype, first=len(self.first) > 0
        )
        need += plan.hidden_bytes(self.model, samples + len(self.first), length)
        need += plan.gradient_bytes(
            self.model, self.gradients, length, self.stats, stream_dtype, stats_dtype, self.labels
        )
        need_room(self.work, need - workdir.size_bytes(self.work, *workdir.CALIBRATED))

    def layers(self) -> Iterator[records.LayerRecord]:
        """Yield each layer's record once its files are complete, resuming where a run stopped."""
        back, layers = self._backward(), self.model.layers
        done, whole = self.team.least(self._done()), bool(self.team.least(self.whole))
        if self.team.index == 0:  # for recover; after `_done`, which may drop all files
            workdir.make_once(self.work, workdir.TOKENS_NAME, lambda: {"tokens": self.tokens})
        there = done == 0 or whole or back.has_streams(done)
        there = there and (done in (0, layers) or self._before(done).is_whole())
        done = self.team.least(done if there else 0)
        if not (whole and done):
            self._whole.unlink(missing_ok=True)
            if self.team.index == 0:
                (self.work / workdir.STREAM_NAME).unlink(missing_ok=True)
        streaming.keep_only(self._before(done).path, self.team.suffix)
        if done == 0:
            (self.work / workdir.DISCARDED_NAME).unlink(missing_ok=True)
        if done < layers:
            back.forget()
        forward = console.progress(
            chain(map(self._record, range(done)), self._compute(done)), layers
        )
        if self.gradients:
            made = list(forward)
            for layer in [] if whole and done else back.layers():
                made[layer] = made[layer].adding(
                    {}, self.profile.take("gradients", made[layer].values)
                )
            yield from made
        else:
            yield from forward
        if self.stats in stats.EVERY and not (whole and done):
            self._write_last()
        if self.team.index == 0:
            self._read_ends()
        self._whole.touch()
        self.team.wait("all layers")
        # Also those of a run with another number of processes.
        suffix = self.team.suffix if self.team.index else ""
        for leftover in chain(
            *(self.work.glob(f"{kind}-?????{suffix}*") for kind in streaming.KINDS)
        ):
            if workdir.FILES.fullmatch(leftover.name):
                leftover.unlink(missing_ok=True)

    def _backward(self) -> Backward:
        """The backward pass over some of the tokens to fit, in this process's part of them."""
        fit = len(self.tokens) - self.held_out
        every = np.arange(self.gradients) * fit // max(self.gradients, 1)
        start, stop = self._shares()["stats"]
        return Backward(
            self.model,
            self.tokens,
            every,
            every[(start <= every) & (every < stop)],
            self.work,
            self.precision,
            self.batch,
            self.team,
            self.profile,
            self.stats,
            self.labels,
        )

    def _before(self, layer: int) -> streaming.HiddenStates:
        """This process's part of the residual stream before a layer, or after the last."""
        path = streaming.path_before(self.work, layer, self.team.suffix)
        mine = sum(stop - start for start, stop in self._shares().values())
        size = self.model.config.hidden_size
        return streaming.HiddenStates(path, size, mine, self.tokens.shape[1])

    def _shares(self) -> dict[str, tuple[int, int]]:
        """Start and stop of this process's share of each part of the samples."""
        return {kind: self.team.share(*part) for kind, part in self._splits().items()}

    def _read_ends(self) -> None:
        """Read the tensors not used here that still belong to the run, for their checksums."""
        if not {FINAL_NORM, EMBEDDING if self.model.config.tied else LM_HEAD} <= (
            self.model.checksums.keys()
        ):
            self.model.final_norm(), self.model.head()
            self._remember()

    def _write_last(self) -> None:
        """Write ``gram``, Σ u uᵀ of the stream after the last layer, u of norm 1 (`basis`)."""
        size, stream = self.model.config.hidden_size, self._before(self.model.layers)
        total = np.zeros((size, size))
        start, stop = self._shares().get("first", (0, 0))  # the last ones in the stream
        for batch in streaming.batches(0, stream.samples - (stop - start), self.batch):
            total += np.asarray(_of_norm_1(jnp.asarray(stream.read(batch))))
        if self.team.count > 1:
            total = self.team.total(own_terms(total))
        if self.team.index == 0:
            arrays = {"gram": gram.pack(total), "tokens": np.array([self.tokens.size])}
            workdir.write(self.work, workdir.STREAM_NAME, arrays)

    def _remember(self) -> None:
        self.model.remember(self.work / workdir.WEIGHTS_NAME)

    @property
    def whole(self) -> bool:
        """Whether this process has done its part of all layers."""
        return self._whole.exists()

    def _compute(self, done: int) -> Iterator[records.LayerRecord]:
        (self.work / "stats").mkdir(exist_ok=True)
        if done == self.model.layers:
            return
        parts, back = self._shares(), self._backward()
        mine = [n for start, stop in parts.values() for n in range(start, stop)]
        stream = self._before(done)
        if done == 0:
            every = np.concatenate([self.tokens, self.first])
            streaming.embed(self.model, every[mine], stream)
            if len(back.mine):
                streaming.embed(self.model, self.tokens[back.mine], back.stream(0))
        config = self.model.config
        head_dim = config.head_dim
        how = head_dim, config.rms_norm_eps, config.window, self.attention.length
        together, alone = layer_function(*how), layer_function(*how, alone=True)
        everywhere = together.spread.everywhere
        ropes = {
            step: everywhere(streaming.rotation(self.model, length))
            for step, length in ((together, self.tokens.shape[1]), (alone, 1))
        }
        layers = self.model.padded_layers(done)
        console.doing("compiling")
        while True:
            with self.profile.phase("wait for weights"):
                number, layer = next(layers, (0, None))
                if layer is None:
                    return
                weights = everywhere(streaming.to_device(layer, self.precision.dtype))
                empty = jax.eval_shape(
                    partial(stats.zeros, self.stats, padded_sizes(layer), head_dim)
                )
                del layer
            read = [EMBEDDING] * (number == 0) + names(self.model, number)
            refuse_other_weights(self.team, self.model, f"layer {number}", read)
            behind = self._before(number + 1)
            samples = self._no_samples()
            with behind.writing() as write, back.keeping(number + 1) as keep:
                place = 0  # of the part's first sequence in this process's stream
                for kind, (start, stop) in parts.items():
                    first = kind == "first"
                    step = alone if first else together
                    sums = step.spread.zeros(stats.of_first_tokens(empty) if first else empty)
                    for batch in streaming.batches(place, place + stop - start, self.batch):
                        with self.profile.phase("compute"):
                            h, x, sums = step(stream.read(batch), weights, ropes[step], sums)
                        streaming.check_finite(h, number)
                        with self.profile.phase("write"):
                            write(batch, h)
                        numbers = [n - place + start for n in batch]
                        keep(numbers, h)
                        if not first:
                            self._sample(samples, numbers, x)
                        console.within(batch.stop, len(mine), "sequence")
                    place += stop - start
                    with self.profile.phase("add up"):
                        sums = self.team.total(sums)
                    if self.team.index == 0:
                        self._write_sums(number, kind, sums)
                    del sums
                self._write_samples(number, samples)
                if self.team.index == 0:
                    self._remember()
                self.team.wait(f"stats of layer {number}")
            self.team.wait(f"stream behind layer {number}")
            stream.path.unlink()
            stream = behind
            streaming.return_free_memory()
            yield self._record(number).adding({}, self.profile.take("calibrate", {}))

    def _splits(self) -> dict[str, tuple[int, int]]:
        """Start and stop of each part of the samples, by the kind of its stats."""
        count = len(self.tokens)
        fit = count - self.held_out
        parts = {
            "stats": (0, fit),
            "held_out": (fit, count),
            "first": (count, count + len(self.first)),
        }
        return {kind: part for kind, part in parts.items() if part[0] < part[1]}

    def _no_samples(self) -> np.ndarray:
        """Zeros for the kept attention inputs, (D, 2 A, N); other processes' parts are added."""
        kept = self.attention
        dtype = np.dtype(self.precision.dtype)
        return np.zeros((self.model.config.hidden_size, 2 * kept.samples, kept.length), dtype)

    def _sample(self, samples: np.ndarray, batch: list[int], x: jax.Array) -> None:
        """Store the attention inputs, (D, B, N), of the kept sequences of a batch."""
        half, count = self.attention.samples, len(self.tokens)
        for i, n in enumerate(batch):
            if n < half:
                samples[:, n] = x[:, i]
            elif n >= count - half:
                samples[:, 2 * half - count + n] = x[:, i]

    def _write_sums(self, layer: int, kind: str, sums: dict[str, Any]) -> None:
        """Write the sums over all sequences of a part of the samples."""
        first, last = self._splits()[kind]
        tokens = (last - first) * self.tokens.shape[1]
        with self.profile.phase("write"):
            config = self.model.config
            arrays = stats.arrays(
                sums, tokens, config, config.layer_shapes[layer], self.precision.stats_dtype
            )
            if kind == "first":
                fit = workdir.TensorFile(self.work, self._file(layer, "stats"))
                arrays = stats.at_the_scale_of(fit, arrays, FIRST_SHARE)
            workdir.write(self.work, self._file(layer, kind), arrays)

    def _write_samples(self, layer: int, samples: np.ndarray) -> None:
        """Write the kept attention inputs: ``fit`` and ``held_out``, (D, A, N) each."""
        half = self.attention.samples
        if not half:
            return
        if self.team.count > 1:
            samples = self.team.total(own_terms(samples))
        if self.team.index == 0:
            parts = {"fit": samples[:, :half], "held_out": samples[:, half:]}
            workdir.write(self.work, self._file(layer, "attention"), parts)

    def _kinds(self) -> list[str]:
        """Kinds of a layer's files."""
        attention = ["attention"] if self.attention.samples else []
        return [*self._splits(), *attention, *(["gradients"] if self.gradients else [])]

    @property
    def _whole(self) -> Path:
        """The file that marks all layers as done; their stats may have been deleted since."""
        return self.work / f"calibrated{self.team.suffix}"

    def _file(self, layer: int, kind: str) -> str:
        return workdir.layer_file("stats", layer, f".{kind}")

    def _done(self) -> int:
        """Number of layers that this process has done, with intact files."""
        done = self.model.layers
        if not self.whole:
            done = streaming.layers_done(self._before, self.model.layers)
        if done and self.team.index == 0:
            known = recall_weights(self.model, self.work, overwrite=self.overwrite)
            return done if known and self._are_intact(done) else 0
        return done

    def _are_intact(self, layers: int) -> bool:
        """Whether the files of the first layers, if not discarded, are as written."""
        kinds = [
            kind
            for kind in self._kinds()
            if kind != "gradients" or self.whole  # the backward pass looks at its own
        ]
        names = [self._file(layer, kind) for layer in range(layers) for kind in kinds]
        if self.stats in stats.EVERY and self.whole:
            names.append(workdir.STREAM_NAME)
        return all(workdir.is_intact(self.work, name) for name in names)

    def _record(self, layer: int) -> records.LayerRecord:
        return records.LayerRecord(layer, {kind: self._file(layer, kind) for kind in self._kinds()})


class LayerFunction:
    """The layer and the sums over its inputs.

    The sequences of a batch are split over this process's devices; each has its own sums, along
    their first axis.

    Args:
      head_dim, eps, window: as in `forward.decoder_layer`.
      sampled: the first tokens of whose attention inputs are returned.
      alone: each token is a text of its own, and counts as if its residual stream had norm 1
        after the output has joined it.
    """

    def __init__(
        self, head_dim: int, eps: float, window: int | None, sampled: int, *, alone: bool = False
    ) -> None:
        def step(
            h: jax.Array, real: jax.Array | None, w: Layer, rope: forward.Rotation, sums: Any
        ) -> Any:
            out, inputs = forward.decoder_layer(
                h, w, rope, head_dim=head_dim, eps=eps, window=window
            )
            added = {}
            for name, so_far in sums.items():
                x, joined = stats.given(inputs, name)
                if real is not None:
                    x = x * real[:, None].astype(x.dtype)
                if alone:  # relative to what the next norm divides by
                    of_attention = stats.SITES[name].joins == "before_attention"
                    joined = inputs.before_mlp if of_attention else out
                    norm = jnp.maximum(jnp.linalg.norm(joined, axis=0, keepdims=True), 1e-30)
                    x = x / norm.astype(x.dtype)
                so_far = jax.tree.map(lambda terms: terms[0], so_far)
                added[name] = jax.tree.map(lambda terms: terms[None], gram.add(so_far, x, joined))
            return out, inputs.attention[:, :, :sampled], added

        self._alone = alone
        self.spread = Spread(
            step,
            (BY_SEQUENCE, BY_DEVICE, EVERYWHERE, EVERYWHERE, BY_DEVICE),
            (BY_SEQUENCE, BY_SEQUENCE, BY_DEVICE),
            donated=4,
        )

    def __call__(
        self, h: np.ndarray, w: Layer, rope: forward.Rotation, sums: Any
    ) -> tuple[np.ndarray, jax.Array, Any]:
        """The stream after the layer, (D, B, N), the attention inputs' first tokens, the sums."""
        shape, spread = h.shape, self.spread
        if self._alone:
            h = h.reshape(len(h), -1, 1)
        B = h.shape[1]
        out, x, sums = spread.call(spread.sequences(h), spread.real(B), w, rope, sums)
        return np.asarray(out)[:, :B].reshape(shape), x, sums


layer_function = cache(LayerFunction)  # compiled once for all models of a process


@jax.jit
def _of_norm_1(h: jax.Array) -> jax.Array:
    """Σ u uᵀ of tokens scaled to norm 1, (D, D), of h, (D, B, N)."""
    h = h.reshape(len(h), -1)
    u = h / jnp.maximum(jnp.linalg.norm(h, axis=0, keepdims=True), 1e-30)
    return forward.dot(u, u, (1, 1))
