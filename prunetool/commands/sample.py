"""``prunetool sample``."""

from pathlib import Path

import click

from prunetool import console, options


@click.command(cls=options.Command)
@options.model_arg
@click.option(
    "--classes",
    default="all",
    show_default=True,
    metavar="LIST",
    help="Which: numbers separated by commas, or all.",
)
@click.option(
    "--per-class",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Pictures of each class.",
)
@click.option(
    "--cfg-scale",
    "scale",
    default=1.75,
    show_default=True,
    type=options.Finite(0),
    help="Scale of classifier-free guidance; at most 1: none, at half the cost. LlamaGen measures "
    "its sizes B and L with 2, XL and XXL with 1.75, 3B with 1.65.",
)
@click.option(
    "--temperature",
    default=1.0,
    show_default=True,
    type=options.Finite(0),
    help="Divides the scores; 0: always the likeliest code.",
)
@click.option(
    "--top-k",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Draw among the k likeliest codes; 0: all.",
)
@click.option(
    "--top-p",
    default=1.0,
    show_default=True,
    type=options.Finite(0, 1, min_open=True),
    help="Draw among the fewest codes that together are likelier than p; 1: all.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Random seed.")
@options.device_options
@options.revision_opt
@click.option(
    "-o",
    "--output",
    "out",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    callback=options.named,
    help="Write the ids here (.npy).",
)
@options.overwrite_opt("FILE, and what a killed run of other pictures left")
def sample(
    model: str, classes: str, per_class: int, scale: float, temperature: float, top_k: int,
    top_p: float, seed: int, dtype: str, device: str, revision: str | None, out: Path,
    overwrite: bool,
) -> None:  # fmt: skip
    """Make pictures with a model of pictures, as codes: to calibrate on, or to look at.

    MODEL is a LlamaGen checkpoint (prunetool convert), dense or pruned. FILE gets a row of ids for
    each picture: the class, then the codes of the grid, row by row. A picture does not depend on
    which others are made with it. The whole model is in memory, which no step of the pipe needs.
    If killed, the same command goes on.

    \b
    Example:
      prunetool sample XXL --per-class 1 -o pictures.npy
      prunetool sample XXL-pruned --classes 207,360,387 --cfg-scale 4 --top-k 2000 -o few.npy
    """
    if out.suffix != ".npy":
        raise click.BadParameter(f"{out}: name a file that ends in .npy", param_hint="-o")
    from prunetool import devices
    from prunetool.model import open_model
    from prunetool.steps.sample import Pictures, parse_classes, write

    with console.summary("sample") as said:
        devices.start(device)
        opened = open_model(model, revision)
        chosen = parse_classes(classes, opened)
        pictures = Pictures(
            opened, opened.config.codes + 1, None, opened.product_dtype(dtype), seed, chosen,
            scale, temperature, top_k, top_p,
        )  # fmt: skip
        said += write(pictures, per_class, out, overwrite=overwrite)
