"""``prunetool evaluate``."""

import json
import math
import tempfile
from pathlib import Path

import click
import numpy as np

from prunetool import __version__, console, corpus, options
from prunetool.checkpoint.writer import need_room
from prunetool.model import Model, open_model


@click.command()
@options.model_arg
@options.text_opt
@options.text_field_opt
@options.tokens_opt
@click.option(
    "--samples", type=click.IntRange(1), show_default="all the text has",
    help="Windows to measure, from the start, not overlapping.",
)  # fmt: skip
@options.length_opt
@options.dtype_opt
@options.revision_opt
def evaluate(
    model: str,
    texts: tuple[Path, ...],
    text_field: str,
    tokens_path: Path | None,
    samples: int | None,
    length: int,
    dtype: str,
    revision: str | None,
) -> None:
    """Measure the perplexity of MODEL, dense or pruned, one layer at a time.

    Windows do not overlap, and have no BOS; every token but a window's first is predicted. The
    result is one JSON object on stdout.

    \b
    Example:
      prunetool evaluate OUT --text wiki.test.txt --samples 8 --dtype float32
    """
    if bool(texts) == bool(tokens_path):
        raise click.UsageError("give either --text or --tokens")
    with console.summary("evaluate") as said:
        opened = open_model(model, revision)
        if tokens_path is not None:
            ids = corpus.read_tokens(tokens_path)
        else:
            ids = corpus.tokenize(corpus.read_text(texts, text_field), opened.directory)
        where = tokens_path or ", ".join(map(str, texts))
        tokens = corpus.sequences(ids, samples, length, opened.config.vocab_size, where)
        dtype = options.product_dtype(dtype, opened.dtype)
        loss = mean_loss(opened, tokens, dtype)
        result = {
            "model": model,
            "perplexity": math.exp(loss),
            "loss": loss,
            "tokens": tokens.shape[0] * (length - 1),
            "samples": tokens.shape[0],
            "sequence_length": length,
            "dtype": dtype,
            "token_ids": corpus.fingerprint(tokens),
            "parameters": opened.parameters(),
            "version": __version__,
        }
        click.echo(json.dumps(result))
        said += [f"perplexity {result['perplexity']:.4f}", f"{result['tokens']:,} tokens"]


def mean_loss(model: Model, tokens: np.ndarray, dtype: str) -> float:
    """Mean of -log p over every predicted token, in nats.

    Args:
      model: the checkpoint.
      tokens: (samples, N), int32.
      dtype: of the products.
    """
    from prunetool import streaming  # JAX: not for --help

    samples, length = tokens.shape
    need = 2 * tokens.size * model.config.hidden_size * 4
    with tempfile.TemporaryDirectory(prefix="prunetool-") as directory:
        need_room(Path(directory), need)
        stream = streaming.HiddenStates(
            Path(directory) / "hidden", model.config.hidden_size, samples, length
        )
        streaming.embed(model, tokens, stream)
        step, rope = streaming.layer_step(model), streaming.rotation(model, length)
        layers = console.progress(model.padded_layers(), "evaluate", model.layers)
        for number, layer in layers:
            weights = streaming.to_device(layer, dtype)
            # Read before it is replaced: the new file takes the name when it is whole.
            with stream.writing() as write:
                for batch in streaming.batches(0, samples, length):
                    h = step(stream.read(batch), weights, rope)
                    streaming.check_finite(h, number)
                    write(batch, np.asarray(h))
        return streaming.mean_loss(model, stream, tokens, dtype)
