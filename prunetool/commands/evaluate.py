"""``prunetool evaluate``."""

import json
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prunetool import __version__, console, options

if TYPE_CHECKING:
    from prunetool.corpus import Text


@click.command(cls=options.Command)
@options.model_arg
@partial(options.text_options, split="test")
@click.option(
    "--samples",
    type=click.IntRange(1),
    show_default="as many as the text has",
    help="Windows to measure, from the start, without overlap.",
)
@options.device_options
@options.revision_opt
@click.option(
    "--against",
    metavar="DENSE",
    help="Compare with the checkpoint before pruning: its "
    "perplexity, KL divergence of the next token, error of each head's attention matrices.",
)
@click.option(
    "--cfg-scale",
    type=options.Finite(1, min_open=True),
    help="For models of pictures, with --against: also the KL divergence with the null class, and "
    "of classifier-free guidance's mixture with this scale, above 1.",
)
@click.option(
    "--choices",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also measure how often the right one of several continuations is the likeliest: JSON "
    "lines with context, choices and answer (examples/cloze.py makes some of any text).",
)
@click.option(
    "--allow-calibrated",
    is_flag=True,
    help="Also measure on text that MODEL was pruned with, where its perplexity is too good.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    callback=options.named,
    metavar="DIR",
    help="Keep the residual stream there; if killed, the same command resumes.",
)
@options.overwrite_opt("the --work directory of another measurement")
def evaluate(
    model: str,
    text: "Text",
    samples: int | None,
    dtype: str,
    device: str,
    revision: str | None,
    against: str | None,
    cfg_scale: float | None,
    choices: Path | None,
    allow_calibrated: bool,
    work: Path | None,
    overwrite: bool,
) -> None:
    """Measure the perplexity of MODEL, dense or pruned, one layer at a time.

    Windows do not overlap; every token but a window's first is predicted; where --bos puts a
    BOS token first, that is all of the text. The result is one JSON object on stdout. Text that
    MODEL was calibrated or trained on is refused, if MODEL is the directory that export wrote.

    \b
    Example:
      prunetool evaluate OUT --text wiki.test.txt --samples 8 --dtype float32
      prunetool evaluate OUT --against MODEL --text wiki.test.txt > compared.json
      prunetool evaluate OUT --against MODEL --text wiki.test.txt --choices cloze.jsonl > all.json
      prunetool evaluate OUT --text wiki.txt --allow-calibrated
    """
    if work and against:
        raise click.UsageError("--work is for one model, without --against")
    if cfg_scale is not None and not against:
        raise click.UsageError("--cfg-scale is for --against")
    if overwrite and not work:
        raise click.UsageError("--overwrite is for --work")
    from prunetool import corpus, devices
    from prunetool.model import open_model
    from prunetool.steps.choices import Choices
    from prunetool.steps.compare import compare
    from prunetool.steps.evaluate import claimed, mean_loss, perplexity, used_before
    from prunetool.steps.run import read_text

    with console.summary("evaluate") as said, ExitStack() as stack:
        devices.start(device)
        opened = open_model(model, revision)
        if cfg_scale is not None and not opened.config.classes:
            raise click.UsageError("--cfg-scale is for models of pictures")
        tokens, bos_id = read_text(opened, text, samples)
        used = used_before(opened, tokens, text.where, allowed=allow_calibrated)
        asked = Choices.read(choices, opened, text.bos) if choices else None
        dtype = opened.product_dtype(dtype)
        how = {
            "samples": tokens.shape[0],
            "sequence_length": tokens.shape[1],
            "bos": bos_id,
            "dtype": dtype,
        }
        token_ids = corpus.fingerprint(tokens)
        if work:
            work = work.absolute()
            stack.enter_context(claimed(work, opened, token_ids, how, overwrite))
        dense = open_model(against) if against else None
        if dense is None:
            loss, compared = mean_loss(opened, tokens, dtype, work, overwrite=overwrite), {}
        else:
            comparison = compare(opened, dense, tokens, dtype, cfg_scale)
            loss, compared = comparison.loss, {"against": comparison.as_json(str(against))}
        if asked:
            if dense:
                compared["against"] |= asked.accuracy(dense, dtype).as_json()
            compared |= asked.accuracy(opened, dtype).as_json()
        result = {
            "model": model, "perplexity": perplexity(loss), "loss": loss,
            "tokens": len(tokens) * (tokens.shape[1] - 1), **how, "token_ids": token_ids,
            "parameters": opened.parameters(), "version": __version__, **text.said, **used,
            **compared,
        }  # fmt: skip
        console.write(sys.stdout, json.dumps(result) + "\n")
        said += [f"{model}, perplexity {_shown(result)}", f"{result['tokens']:,} tokens"]
        _say(result, said)


def _accuracy_of(of: dict[str, Any]) -> str:
    return f"accuracy {of['accuracy']:.1%} ± {of['standard_error']:.1%} of {of['items']} items"


def _shown(of: dict[str, Any]) -> str:
    """The perplexity, or the loss if that is too large."""
    if of["perplexity"] is None:
        return f"too large for a number (loss {of['loss']:.1f} nats)"
    return f"{of['perplexity']:.4f}"


def _say(result: dict[str, Any], said: list[str]) -> None:
    """Summarise accuracy and comparison, if there are any, on stderr."""
    if "accuracy" in result:
        said.append(_accuracy_of(result))
    if "against" not in result:
        return
    compared = result["against"]
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
    if "accuracy" in compared:
        said.append(f"{_accuracy_of(compared)} before")
    said.append(f"KL {compared['kl']:.4f} nats")
    if "kl_guided" in compared:
        said.append(f"guided {compared['kl_guided']:.4f}, null {compared['kl_null']:.4f}")
    for name, label in (("own", "own input"), ("same_input", "dense input")):
        if errors[name]["worst"] == 0:  # on the same input: q and k were not pruned
            said.append(f"no attention error on {label}")
        elif errors[name]["mean"] is not None:
            said.append(
                f"attention error on {label} {errors[name]['mean']:.4f} (worst "
                f"{errors[name]['worst']:.4f}, layer {errors[name]['worst_layer']} head "
                f"{errors[name]['worst_head']})"
            )
