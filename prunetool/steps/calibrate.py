"""The forward over the calibration sequences, layer by layer, with the sums it leaves."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from prunetool import records, streaming, workdir
from prunetool.checkpoint.writer import write_tensors
from prunetool.llama import forward
from prunetool.llama.weights import Layer
from prunetool.model import Model
from prunetool.pruning import gram


class AttentionSamples(NamedTuple):
    """Sequences whose attention inputs are kept: so many of the first, and of the last."""

    samples: int
    length: int


def disk_needed(model: Model, tokens: np.ndarray, stats: str, attention: AttentionSamples) -> int:
    """Bytes of the stats of all layers and of two generations of hidden states."""
    config = model.config
    total = 2 * tokens.size * config.hidden_size * 4
    for shape in config.layer_shapes:
        inputs = [shape.heads * config.head_dim, shape.channels]
        count = 2 if stats == "token" else 1
        if stats == "all":
            inputs += [config.hidden_size] * 2
        total += 2 * attention.samples * attention.length * config.hidden_size * 4
        total += sum(4 * count * size * (size + 1) // 2 for size in inputs) * 2
    return total


@dataclass
class Calibration:
    """One calibration: all that its layers share.

    A layer's stats are written first and the residual stream behind it last, so a layer is done
    when a ``hidden-`` file of a later number is there; when the run is done there is none.
    """

    model: Model
    tokens: np.ndarray
    held_out: int
    stats: str
    dtype: str
    work: Path
    attention: AttentionSamples

    def layers(self) -> Iterator[records.LayerRecord]:
        """Give each layer's record once its files are whole, going on where a run stopped."""
        done = self._done()
        yield from map(self._record, range(done))
        if done < self.model.layers:
            yield from self._compute(done)
        for leftover in self._hidden_files():
            leftover.unlink()

    def _compute(self, done: int) -> Iterator[records.LayerRecord]:
        (self.work / "stats").mkdir(exist_ok=True)
        stream = streaming.HiddenStates(
            self._hidden(done), self.model.config.hidden_size, *self.tokens.shape
        )
        if done == 0:
            streaming.embed(self.model, self.tokens, stream)
        step = _compiled_step(self.model, self.attention.length)
        rope = streaming.rotation(self.model, self.tokens.shape[1])
        for number, layer in self.model.padded_layers(done):
            weights = streaming.to_device(layer, self.dtype)
            behind = stream.at(self._hidden(number + 1))
            samples: list[np.ndarray] = []
            with behind.writing() as write:
                for kind, (start, stop) in self._parts().items():
                    sums = self._zeros(layer)
                    for batch in streaming.batches(start, stop, stream.length):
                        behind_batch, x, sums = step(stream.read(batch), weights, rope, sums)
                        h = np.asarray(behind_batch)
                        streaming.check_finite(h, number)
                        write(batch, h)
                        samples += self._sampled(batch, x)
                    write_tensors(
                        self.work / self._file(number, kind),
                        self._arrays(sums, (stop - start) * stream.length, number),
                    )
                if samples:
                    self._write_samples(number, samples)
            stream.path.unlink()
            stream = behind
            yield self._record(number)

    def _parts(self) -> dict[str, tuple[int, int]]:
        """First and last sequence of each part of the samples, by the kind of its stats."""
        fit = len(self.tokens) - self.held_out
        parts = {"stats": (0, fit), "held_out": (fit, len(self.tokens))}
        return parts if self.held_out else {"stats": parts["stats"]}

    def _sampled(self, batch: range, x: jax.Array) -> list[np.ndarray]:
        """The attention inputs, (D, N), of those sequences of a batch that are kept."""
        first, last = self.attention.samples, len(self.tokens) - self.attention.samples
        return [
            np.asarray(x[:, i]) for i, n in enumerate(batch) if n < first or n >= last
        ]  # fmt: skip

    def _write_samples(self, layer: int, samples: list[np.ndarray]) -> None:
        """Write the kept attention inputs: ``fit`` and ``held_out``, (D, samples, N) each."""
        half = self.attention.samples
        parts = {"fit": samples[:half], "held_out": samples[half:]}
        write_tensors(
            self.work / self._file(layer, "attention"),
            {name: np.stack(part, axis=1) for name, part in parts.items()},
        )

    def _kinds(self) -> list[str]:
        """Kinds of a layer's files."""
        return [*self._parts(), *(["attention"] if self.attention.samples else [])]

    def _hidden(self, layer: int) -> Path:
        return self.work / f"hidden-{layer:05d}"

    def _hidden_files(self) -> list[Path]:
        return sorted(self.work.glob("hidden-?????"))

    def _file(self, layer: int, kind: str) -> str:
        return workdir.layer_file("stats", layer, f".{kind}")

    def _done(self) -> int:
        """Layers done; leaves only the stream behind the last of them."""
        hidden = self._hidden_files()
        for path in hidden[:-1]:
            path.unlink()
        if hidden:
            return int(hidden[-1].name.removeprefix("hidden-"))
        final = [self._file(self.model.layers - 1, kind) for kind in self._kinds()]
        return self.model.layers if all((self.work / name).exists() for name in final) else 0

    def _record(self, layer: int) -> records.LayerRecord:
        return records.LayerRecord(layer, {kind: self._file(layer, kind) for kind in self._kinds()})

    def _zeros(self, layer: Layer) -> dict[str, Any]:
        """Empty sums of every matrix whose inputs are kept, in the sizes of a padded layer."""
        full = self.stats == "token"
        kv_heads = layer.k.shape[0] // self.model.config.head_dim
        sums = {
            "o": gram.zeros(layer.o.shape[1], blocks=kv_heads, full=full),
            "down": gram.zeros(layer.down.shape[1], diagonal=True, full=full),
        }
        if self.stats == "all":
            sums |= {name: gram.zeros(layer.q.shape[1]) for name in ("attention", "mlp")}
        return sums

    def _arrays(self, sums: dict[str, Any], tokens: int, layer: int) -> dict[str, np.ndarray]:
        """The sums as a file keeps them: without padding, Gram matrices packed, in float32."""
        shape = self.model.config.layer_shapes[layer]
        sizes = {"o": shape.heads * self.model.config.head_dim, "down": shape.channels}
        arrays = {"tokens": np.array([tokens])}
        for name, matrix in sums.items():
            size = sizes.get(name, self.model.config.hidden_size)
            for kind, value in matrix._asdict().items():
                if value is None:
                    continue
                if kind.endswith("gram"):
                    array = gram.pack_panels(value, size, np.float32)
                elif kind == "token_blocks":
                    array = np.asarray(value[: shape.kv_heads], np.float32)
                else:
                    array = np.asarray(value[:size], np.float32)
                arrays[f"{name}.{kind}"] = array
        return arrays


def _compiled_step(model: Model, sampled: int) -> Callable[..., Any]:
    """The layer and the sums over its inputs as one compiled function for all layers.

    It returns the first ``sampled`` tokens' attention inputs too.
    """
    config = model.config

    def step(h: Any, w: Layer, rope: Any, sums: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        out, inputs = forward.decoder_layer(
            h, w, rope, head_dim=config.head_dim, eps=config.rms_norm_eps
        )
        given = {
            "o": (inputs.o, inputs.before_attention),
            "down": (inputs.down, inputs.before_mlp),
            "attention": (inputs.attention, inputs.before_attention),
            "mlp": (inputs.mlp, inputs.before_mlp),
        }
        added = {name: gram.add(so_far, *given[name]) for name, so_far in sums.items()}
        return out, inputs.attention[:, :, :sampled], added

    return jax.jit(step, donate_argnames="sums")
