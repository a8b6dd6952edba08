"""``prunetool calibrate``."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from prunetool import __version__, console, corpus, options, records, workdir
from prunetool.checkpoint.writer import need_room, write_tensors
from prunetool.llama.weights import Layer
from prunetool.model import Model, open_model


@click.command()
@options.model_arg
@options.text_opt
@options.text_field_opt
@options.tokens_opt
@click.option(
    "--samples", default=128, show_default=True, type=click.IntRange(1), help="Sequences to use."
)
@options.length_opt
@click.option(
    "--shuffle", type=click.IntRange(0), metavar="SEED",
    help="Draw windows at random positions, instead of consecutive ones from the start.",
)  # fmt: skip
@click.option(
    "--held-out", type=click.IntRange(0), show_default="an eighth of --samples",
    help="Of the samples, how many (the last) only choose the damping of the refit.",
)  # fmt: skip
@click.option(
    "--stats", type=click.Choice(["structural", "token", "all"]), default="structural",
    show_default=True, help="structural: of the inputs of o_proj and down_proj. token: also their "
    "full token-weighted Gram matrices. all: also the inputs of q, k, v and of gate, up.",
)  # fmt: skip
@options.dtype_opt
@options.revision_opt
@click.option(
    "--work", type=click.Path(path_type=Path), metavar="DIR", show_default="NAME.prunetool",
    help="Work directory of this run; the same command goes on there where it was.",
)  # fmt: skip
@options.overwrite_opt
@options.output_opt
def calibrate(
    model: str,
    texts: tuple[Path, ...],
    text_field: str,
    tokens_path: Path | None,
    samples: int,
    length: int,
    shuffle: int | None,
    held_out: int | None,
    stats: str,
    dtype: str,
    revision: str | None,
    work: Path | None,
    overwrite: bool,
    sink: str,
) -> None:
    """Run text through MODEL and keep what each pruned matrix was given.

    MODEL is a directory of safetensors or a Hub id. Of the inputs of o_proj and down_proj it
    keeps, layer by layer: Gram matrix, mean, and token-weighted second moments. Killed, the same
    command goes on after the last whole layer.

    \b
    Example:
      prunetool calibrate SmolLM2-135M --text wiki.txt --samples 32 > stats.jsonl
    """
    if bool(texts) == bool(tokens_path):
        raise click.UsageError("give either --text or --tokens")
    held_out = samples // 8 if held_out is None else held_out
    if held_out >= samples:
        raise click.BadParameter(f"{held_out} of {samples} samples leave none to fit")

    with console.summary("calibrate") as said:
        opened = open_model(model, revision)
        tokens = _tokens(opened, texts, text_field, tokens_path, samples, length, shuffle)
        work = (work or Path(f"{Path(model).name}.prunetool")).absolute()
        how = {
            "samples": samples, "sequence_length": length, "shuffle": shuffle,
            "held_out": held_out, "stats": stats,
            "dtype": options.product_dtype(dtype, opened.dtype),
        }  # fmt: skip
        run = {
            "checkpoint": opened.index.fingerprint(), "tokens": corpus.fingerprint(tokens),
            **how, "version": __version__,
        }  # fmt: skip
        need_room(work, _disk_needed(opened, tokens, stats))
        workdir.claim(work, run, overwrite=overwrite)
        header = records.Header(
            str(opened.directory), model, run["checkpoint"], str(work), opened.layers
        ).after(options.history_step("calibrate", __version__, **how, tokens=run["tokens"]))
        with options.open_sink(sink) as stream:
            job = _Job(opened, tokens, held_out, stats, how["dtype"], work)
            layers = console.progress(job.layers(), "calibrate", opened.layers)
            records.write(stream, header, layers)
        said += [f"{opened.layers} layers", f"{tokens.size:,} tokens", f"work in {work}"]


def _tokens(
    model: Model, texts: tuple[Path, ...], field: str, path: Path | None, samples: int,
    length: int, shuffle: int | None,
) -> np.ndarray:  # fmt: skip
    if path is not None:
        ids = corpus.read_tokens(path)
    else:
        ids = corpus.tokenize(corpus.read_text(texts, field), model.directory)
    where = path or ", ".join(map(str, texts))
    return corpus.sequences(ids, samples, length, model.config.vocab_size, where, shuffle)


def _disk_needed(model: Model, tokens: np.ndarray, stats: str) -> int:
    """Bytes of the stats of all layers and of two generations of hidden states."""
    config = model.config
    total = 2 * tokens.size * config.hidden_size * 4
    for shape in config.layer_shapes:
        inputs = [shape.heads * config.head_dim, shape.channels]
        count = 2 if stats == "token" else 1
        if stats == "all":
            inputs += [config.hidden_size] * 2
        total += sum(4 * count * size * (size + 1) // 2 for size in inputs) * 2
    return total


@dataclass
class _Job:
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

    def layers(self) -> Iterator[records.LayerRecord]:
        """Give each layer's record once its files are whole, going on where a run stopped."""
        done = self._done()
        yield from map(self._record, range(done))
        if done < self.model.layers:
            yield from self._compute(done)
        for leftover in self._hidden_files():
            leftover.unlink()

    def _compute(self, done: int) -> Iterator[records.LayerRecord]:
        from prunetool import streaming  # JAX: not for --help

        (self.work / "stats").mkdir(exist_ok=True)
        stream = streaming.HiddenStates(
            self._hidden(done), self.model.config.hidden_size, *self.tokens.shape
        )
        if done == 0:
            streaming.embed(self.model, self.tokens, stream)
        step = _compiled_step(self.model)
        rope = streaming.rotation(self.model, self.tokens.shape[1])
        for number, layer in self.model.padded_layers(done):
            weights = streaming.to_device(layer, self.dtype)
            behind = stream.at(self._hidden(number + 1))
            with behind.writing() as write:
                for kind, (start, stop) in self._parts().items():
                    sums = self._zeros(layer)
                    for batch in streaming.batches(start, stop, stream.length):
                        h, sums = step(stream.read(batch), weights, rope, sums)
                        write(batch, np.asarray(h))
                        streaming.check_finite(h, number)
                    write_tensors(
                        self.work / self._file(number, kind),
                        self._arrays(sums, (stop - start) * stream.length, number),
                    )
            stream.path.unlink()
            stream = behind
            yield self._record(number)

    def _parts(self) -> dict[str, tuple[int, int]]:
        """First and last sequence of each part of the samples, by the kind of its stats."""
        fit = len(self.tokens) - self.held_out
        parts = {"stats": (0, fit), "held_out": (fit, len(self.tokens))}
        return parts if self.held_out else {"stats": parts["stats"]}

    def _hidden(self, layer: int) -> Path:
        return self.work / f"hidden-{layer:05d}"

    def _hidden_files(self) -> list[Path]:
        return sorted(self.work.glob("hidden-?????"))

    def _file(self, layer: int, kind: str) -> str:
        return workdir.layer_file("stats", layer, f".{kind}")

    def _done(self) -> int:
        """Layers done; leaves only the stream behind the last of them."""
        *old, last = self._hidden_files() or [None]
        for path in old:
            path.unlink()
        if last is not None:
            return int(last.name.removeprefix("hidden-"))
        final = [self._file(self.model.layers - 1, kind) for kind in self._parts()]
        return self.model.layers if all((self.work / name).exists() for name in final) else 0

    def _record(self, layer: int) -> records.LayerRecord:
        return records.LayerRecord(
            layer, {kind: self._file(layer, kind) for kind in self._parts()}, {}
        )

    def _zeros(self, layer: Layer) -> dict[str, Any]:
        """Empty sums of every matrix whose inputs are kept, in the sizes of a padded layer."""
        from prunetool.pruning import gram

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
        from prunetool.pruning.gram import pack

        shape = self.model.config.layer_shapes[layer]
        sizes = {"o": shape.heads * self.model.config.head_dim, "down": shape.channels}
        arrays = {"tokens": np.array([tokens])}
        for name, matrix in sums.items():
            size = sizes.get(name, self.model.config.hidden_size)
            for kind, value in matrix._asdict().items():
                if value is None:
                    continue
                array = np.asarray(value)
                if kind.endswith("gram"):
                    array = pack(array[:size, :size])
                elif kind == "token_blocks":
                    array = array[: shape.kv_heads]
                else:
                    array = array[:size]
                arrays[f"{name}.{kind}"] = array.astype(np.float32)
        return arrays


def _compiled_step(model: Model) -> Callable[..., Any]:
    """The layer and the sums over its inputs as one compiled function for all layers."""
    import jax

    from prunetool.llama import forward
    from prunetool.pruning import gram

    config = model.config

    def step(h: Any, w: Layer, rope: Any, sums: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        out, inputs = forward.decoder_layer(
            h, w, rope, head_dim=config.head_dim, eps=config.rms_norm_eps
        )
        given = {
            "o": (inputs.o, inputs.before_attention),
            "down": (inputs.down, inputs.before_mlp),
            "attention": (inputs.attention, inputs.before_attention),
            "mlp": (inputs.mlp, inputs.before_mlp),
        }
        return out, {name: gram.add(so_far, *given[name]) for name, so_far in sums.items()}

    return jax.jit(step, donate_argnames="sums")
