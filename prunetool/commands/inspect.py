"""``prunetool inspect``."""

import json

import click

from prunetool import console, options


@click.command()
@options.model_arg
@options.revision_opt
def inspect(model: str, revision: str | None) -> None:
    """Show what MODEL is: shapes, parameters by kind, sizes of the layers.

    Reads the headers only. The table goes to stderr, one JSON object to stdout.

    \b
    Example:
      prunetool inspect SmolLM2-135M
    """
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
    result = {
        "model": model,
        "model_type": config.raw["model_type"],
        "dtype": opened.dtype,
        "layers": config.layers,
        "hidden_size": config.hidden_size,
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
        f"{model}: {result['model_type']}, {everything:,} parameters ({sum(sizes):,} in the "
        f"layers' matrices), {result['size_bytes'] / 1e6:,.1f} MB, {opened.dtype}",
        ["layer", "heads", "KV heads", "channels", "parameters", "MB"],
        (
            [i, s.heads, s.kv_heads, s.channels, f"{p:,}", f"{b / 1e6:.2f}"]
            for i, (s, p, b) in enumerate(zip(config.layer_shapes, sizes, layer_bytes, strict=True))
        ),
    )
    click.echo(json.dumps(result))
