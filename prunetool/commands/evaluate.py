"""``prunetool evaluate``."""

import json
import math
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from prunetool import __version__, console, options


@click.command(cls=options.Command)
@options.model_arg
@options.text_opt
@options.text_field_opt
@options.tokens_opt
@click.option(
    "--samples", type=click.IntRange(1), show_default="all the text has",
    help="Windows to measure, from the start, not overlapping.",
)  # fmt: skip
@options.length_opt
@options.bos_opt
@options.dtype_opt
@options.device_opt
@options.revision_opt
@click.option(
    "--against", metavar="DENSE", help="Compare with the checkpoint before pruning: its "
    "perplexity, KL divergence of the next token, error of each head's attention matrices.",
)  # fmt: skip
@click.option(
    "--work", type=click.Path(path_type=Path), callback=options.named, metavar="DIR",
    help="Keep the residual stream there: killed, the same command goes on where it was.",
)  # fmt: skip
@options.overwrite_opt
def evaluate(
    model: str,
    texts: tuple[Path, ...],
    text_field: str,
    tokens_path: Path | None,
    samples: int | None,
    length: int,
    bos: str,
    dtype: str,
    device: str,
    revision: str | None,
    against: str | None,
    work: Path | None,
    overwrite: bool,
) -> None:
    """Measure the perplexity of MODEL, dense or pruned, one layer at a time.

    Windows do not overlap; every token but a window's first is predicted, and with --bos the
    first is the BOS token. The result is one JSON object on stdout.

    \b
    Example:
      prunetool evaluate OUT --text wiki.test.txt --samples 8 --dtype float32
      prunetool evaluate OUT --against MODEL --text wiki.test.txt > compared.json
    """
    if bool(texts) == bool(tokens_path):
        raise click.UsageError("give either --text or --tokens")
    if work and against:
        raise click.UsageError("--work is for one model, without --against")
    if overwrite and not work:
        raise click.UsageError("--overwrite is for --work")
    from prunetool import corpus, devices, tokenizer, workdir
    from prunetool.model import open_model
    from prunetool.steps.compare import compare
    from prunetool.steps.evaluate import mean_loss

    with console.summary("evaluate") as said, ExitStack() as stack:
        devices.start(device)
        opened = open_model(model, revision)
        bos_id = tokenizer.bos_id(opened.directory, opened.config.vocab_size, bos, tokens_path)
        console.doing("reading text")
        tokens = corpus.load(
            opened.directory, opened.config.vocab_size, texts, text_field, tokens_path,
            samples=samples, length=length, bos=bos_id,
        )  # fmt: skip
        dtype = options.product_dtype(dtype, opened.dtype)
        token_ids = corpus.fingerprint(tokens)
        if work:
            work = work.absolute()
            stack.enter_context(workdir.lock(work))
            run = workdir.identity(
                "evaluate", opened.identity(), token_ids, __version__,
                {
                    "samples": tokens.shape[0], "sequence_length": length, "bos": bos_id,
                    "dtype": dtype,
                },
            )  # fmt: skip
            workdir.claim(work, run, overwrite=overwrite)
        if against is None:
            loss, compared = mean_loss(opened, tokens, dtype, work, overwrite=overwrite), {}
        else:
            comparison = compare(opened, open_model(against), tokens, dtype)
            loss, compared = comparison.loss, {"against": _compared(against, comparison)}
        result = {
            "model": model,
            "perplexity": _perplexity(loss),
            "loss": loss,
            "tokens": tokens.shape[0] * (length - 1),
            "samples": tokens.shape[0],
            "sequence_length": length,
            "bos": bos_id,
            "dtype": dtype,
            "token_ids": token_ids,
            "parameters": opened.parameters(),
            "version": __version__,
            **compared,
        }
        console.write(sys.stdout, json.dumps(result) + "\n")
        if work:
            workdir.clear(work)
        said += [f"perplexity {_shown(result)}", f"{result['tokens']:,} tokens"]
        if compared:
            _say(compared["against"], said)


def _perplexity(loss: float) -> float | None:
    """exp(loss); None if that is too large for a float64, above 709 nats."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else None


def _shown(of: dict[str, Any]) -> str:
    """A perplexity; the loss if it is too large."""
    if of["perplexity"] is None:
        return f"too large for a number (loss {of['loss']:.1f} nats)"
    return f"{of['perplexity']:.4f}"


def _compared(against: str, comparison: Any) -> dict[str, Any]:
    """A comparison as JSON: NaN is null."""
    import numpy as np

    errors = {}
    for name in ("own", "same_input"):
        by_head = getattr(comparison, name)
        known = np.isfinite(by_head)
        layer, head = np.unravel_index(np.argmax(np.where(known, by_head, -1)), by_head.shape)
        errors[name] = {
            "mean": float(by_head[known].mean()) if known.any() else None,
            "worst": float(by_head[layer, head]) if known.any() else None,
            "worst_layer": int(layer), "worst_head": int(head),
            "by_head": [[float(e) if e == e else None for e in row] for row in by_head],
        }  # fmt: skip
    return {
        "model": against,
        "perplexity": _perplexity(comparison.dense_loss),
        "loss": comparison.dense_loss,
        "kl": comparison.divergence,
        "attention_error": errors,
    }


def _say(compared: dict[str, Any], said: list[str]) -> None:
    """Say a comparison on stderr."""
    errors = compared["attention_error"]
    rows = []
    for layer, by_name in enumerate(
        zip(*(errors[name]["by_head"] for name in errors), strict=True)
    ):
        known = [[error for error in row if error is not None] for row in by_name]
        cells = [
            f"{value:.4f}" for row in known if row for value in (sum(row) / len(row), max(row))
        ]
        rows.append([layer, *(cells or ["–"] * 4)])
    console.table(
        "Relative error of the attention matrices: each model's own input, the dense model's input",
        ["layer", "own: mean head", "worst", "dense: mean head", "worst"],
        rows,
        by=[max(errors["own"]["by_head"][row[0]], key=lambda e: e or 0.0) or 0.0 for row in rows],
    )
    said.append(f"{_shown(compared)} before")
    said.append(f"KL {compared['kl']:.4f} nats")
    for name, label in (("own", "own input"), ("same_input", "dense input")):
        if errors[name]["mean"] is not None:
            said.append(
                f"attention error on {label} {errors[name]['mean']:.4f} (worst "
                f"{errors[name]['worst']:.4f}, layer {errors[name]['worst_layer']} head "
                f"{errors[name]['worst_head']})"
            )
