"""``prunetool inspect``."""

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prunetool import console, options
from prunetool.errors import ConfigError, shown

if TYPE_CHECKING:
    from prunetool.model import Model

OPTIONAL = "recover"  # the step that a pipe can do without


@click.command(cls=options.Command)
@options.model_arg
@options.revision_opt
@click.option(
    "--plan",
    "planned",
    is_flag=True,
    help="Also measure this machine for a few seconds, and "
    "say how much memory, disk, arithmetic and time each step of a run will need.",
)
@click.option(
    "--samples",
    default=128,
    show_default=True,
    type=click.IntRange(1),
    help="Sequences to plan for.",
)
@options.length_opt
@click.option(
    "--sparsity",
    default=0.2,
    show_default=True,
    type=options.Finite(0, 1, max_open=True),
    help="Sparsity to plan for.",
)
@options.dtype_opt
def inspect(
    model: str,
    revision: str | None,
    planned: bool,
    samples: int,
    length: int,
    sparsity: float,
    dtype: str,
) -> None:
    """Show what MODEL is: shapes, parameters by kind, sizes of the layers.

    Reads only the headers; a Hub id is downloaded whole first. The tables go to stderr, one JSON
    object to stdout.

    \b
    Example:
      prunetool inspect SmolLM2-135M --plan --samples 32
    """
    for option in ("samples", "length", "sparsity", "dtype"):
        if not planned and options.given(option):
            name = "sequence-length" if option == "length" else option
            raise click.UsageError(f"--{name} goes with --plan")
    from prunetool.model import open_model

    opened = open_model(model, revision)
    config, index = opened.config, opened.index
    sizes = [opened.layer_parameters(shape) for shape in config.layer_shapes]
    in_layers = [name for name in index if name.startswith("model.layers.")]
    layer_bytes = [
        sum(index[n].size_bytes for n in in_layers if n.startswith(f"model.layers.{layer}."))
        for layer in range(config.layers)
    ]
    everything = opened.parameters()
    bases = {"sliced_from": config.size_before(config.layers)} if config.shortcuts else {}
    if planned and config.shortcuts:
        raise ConfigError(model, "is not pruned again (--basis layer)", "leave --plan out")
    result: dict[str, Any] = {
        "model": model,
        "model_type": config.raw["model_type"],
        "dtype": opened.dtype,
        "layers": config.layers,
        "hidden_size": config.hidden_size,
        **bases,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rope": config.rope.type,
        "tied": config.tied,
        "parameters": everything,
        "layer_matrices": sum(sizes),
        "other": everything - sum(sizes),
        "size_bytes": sum(info.size_bytes for info in index.values()),
        "per_layer": [
            {"heads": s.heads, "kv_heads": s.kv_heads, "channels": s.channels, "parameters": p,
             "size_bytes": b}
            for s, p, b in zip(config.layer_shapes, sizes, layer_bytes, strict=True)
        ],
    }  # fmt: skip
    console.table(
        f"{shown(model)}: {result['model_type']}, {everything:,} parameters ({sum(sizes):,} in the "
        f"layers' matrices), {result['size_bytes'] / 1e6:,.1f} MB, {opened.dtype}"
        f"{', a basis before each norm' if config.shortcuts else ''}",
        ["layer", "heads", "KV heads", "channels", "parameters", "MB"],
        (
            [i, s.heads, s.kv_heads, s.channels, f"{p:,}", f"{b / 1e6:.2f}"]
            for i, (s, p, b) in enumerate(zip(config.layer_shapes, sizes, layer_bytes, strict=True))
        ),
    )
    if planned:
        length = config.codes or length
        result["plan"] = _plan(opened, samples, length, sparsity, dtype)
    console.write(sys.stdout, json.dumps(result) + "\n")


def _plan(model: "Model", samples: int, length: int, sparsity: float, dtype: str) -> dict[str, Any]:
    """What the steps need and this machine's speed; prints them as a table."""
    from prunetool import plan, streaming
    from prunetool.commands.calibrate import split, usual_first_tokens
    from prunetool.commands.recover import HELD_OUT, SAMPLES
    from prunetool.steps import compensate, speed

    console.doing("measuring this machine")
    widest = model.config.widest
    dtype = model.product_dtype(dtype)
    here = Path.cwd()
    measured = speed.measure((widest.channels, model.config.hidden_size), dtype, here)
    batch = streaming.batch_size(length)
    held_out, backward = split(samples)
    # None if all samples begin alike, as those of a model with a BOS: that takes their text.
    alone = 0 if model.config.classes else usual_first_tokens(samples * length)
    first = -(-alone // length)
    trained = min(SAMPLES, samples - held_out), min(HELD_OUT, held_out)
    needs = {
        "calibrate": plan.calibrate(
            model, samples, length, batch, "structural", "float32", backward, first
        ),
        "score": plan.score(model, "float32"),
        "compensate": plan.compensate(model, sparsity, len(compensate.DAMPING_GRID)),
        "recover": plan.recover(model, sparsity, *trained, length),
        "export": plan.export(model, sparsity),
    }
    seconds = {
        step: need.products / measured.products
        + need.solves / (measured.solves * need.speed)
        + need.disk / measured.disk
        for step, need in needs.items()
    }
    console.table(
        f"{samples} x {length} tokens, {sparsity:.0%} of the layers removed; this machine: {dtype} "
        f"products {measured.products / 1e9:.0f}, float64 {measured.solves / 1e9:.0f} GFLOP/s, "
        f"disk {measured.disk / 1e6:.0f} MB/s",
        ["step", "memory, GB", "disk, GB", "TFLOP", "time, min"],
        [
            [
                step if step != OPTIONAL else f"{step} (optional)",
                f"{need.memory / 1e9:.2f}",
                f"{need.disk / 1e9:.2f}",
                f"{(need.products + need.solves) / 1e12:.2f}",
                f"{seconds[step] / 60:.1f}",
            ]
            for step, need in needs.items()
        ],
    )
    free = shutil.disk_usage(here).free
    total = sum(need.disk for step, need in needs.items() if step != OPTIONAL)
    if total > free:
        console.log.warning(
            "%s: %.1f GB of disk are needed and %.1f are free; see compensate --discard",
            here,
            total / 1e9,
            free / 1e9,
        )
    return {
        "samples": samples,
        "sequence_length": length,
        "sparsity": sparsity,
        "dtype": dtype,
        "speed": measured._asdict(),
        "steps": {
            step: need._asdict() | {"seconds": seconds[step]} for step, need in needs.items()
        },
    }
