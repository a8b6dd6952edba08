"""``prunetool evaluate``."""

import json
import math
from pathlib import Path

import click

from prunetool import __version__, console, options


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
    from prunetool import corpus
    from prunetool.model import open_model
    from prunetool.steps.evaluate import mean_loss

    with console.summary("evaluate") as said:
        opened = open_model(model, revision)
        tokens = corpus.load(
            opened.directory, opened.config.vocab_size, texts, text_field, tokens_path,
            samples=samples, length=length,
        )  # fmt: skip
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
