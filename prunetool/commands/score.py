"""``prunetool score``."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from prunetool import console, options, records
from prunetool.errors import RecordError
from prunetool.llama.parts import MATRICES
from prunetool.methods import (
    BASES,
    CHANNELS,
    DAMPED,
    HIDDEN,
    HIDDEN_TARGETS,
    LAYER,
    NAMES,
    OF_METHODS,
    PATTERNS,
    PUBLISHED,
    QK,
    REDUCE,
    TAYLOR,
    UNIT_TARGETS,
    UNITS,
    WEIGHTS,
    default_of,
    methods_of,
)

OF_UNITS = ("weighting", "multiple_of", "min_channels", "newton_iterations", "taylor", "reduce")
OF_CHANNELS = ("multiple_of", "min_channels")
OF_WEIGHTS = ("pattern", "iterations", "learning_rate", "refine")
PLACE = "{sparsity}"  # in the name of an output, for each of several
OF_HIDDEN = ("method", "multiple_of", "basis")
OTHER_SIZE = 8  # --multiple-of of hidden dimensions
SHORTHANDS = {"qk": MATRICES[:2], "weights": MATRICES}


@click.command(cls=options.Command)
@options.source_arg
@click.option(
    "--sparsity",
    "sparsities",
    required=True,
    type=options.Several(options.Finite(0, 1, max_open=True)),
    metavar="LIST",
    help="Fraction to remove; several, separated by commas, for one output each (-o "
    f"kept-{PLACE}.jsonl). heads and channels: of the parameters of all decoder layers' seven "
    "matrices. hidden: of each matrix. Weights: of each matrix (or row, see --pattern); with "
    "--allocation loss, of all matrices of --target together.",
)
@click.option(
    "--method",
    type=click.Choice(NAMES),
    show_default=f"{next(iter(UNITS))}; weights: {next(iter(WEIGHTS))}; q,k: {next(iter(QK))}",
    help=f"How to rank them. heads and channels: {', '.join(UNITS)}. Weights: "
    f"{', '.join(WEIGHTS)}; q,k also {', '.join(QK)}. hidden: {', '.join(HIDDEN)}, as SliceGPT.",
)
@click.option(
    "--target",
    default="heads,channels",
    show_default=True,
    metavar="LIST",
    help="What to prune: heads (whole KV groups) and channels (of the MLP); single weights of "
    "q, k, v, o, gate, up, down (qk: the first two; weights: all); or hidden: directions of the "
    "residual stream, so that OUT has fewer of them.",
)
@click.option(
    "--basis",
    type=click.Choice(BASES),
    default=BASES[0],
    show_default=True,
    help="Of --target hidden. shared: one basis for the whole model; OUT is a stock model, unless "
    "it has biases and the hidden size left is no multiple of its heads. layer: one for each norm, "
    "and a matrix from each to the next, as SliceGPT, from calibrate --stats residual; OUT needs "
    "its loader. --sparsity is then of all parameters of the layers, these matrices included.",
)
@click.option(
    "--allocation",
    type=click.Choice(["global", "uniform", "share", "loss"]),
    show_default="loss, or what --published sets; taylor: share; weights by a method without "
    "gradients, or with another --pattern than unstructured: uniform",
    help="global: one ranking over all layers. uniform: the same counts in "
    "every layer, so that --sparsity is met to within one step of --multiple-of in each; of "
    "weights, the same share of each matrix. share: the same share of KV groups and of channels in "
    "every layer, in whole units: the total may miss --sparsity. loss: the least predicted loss of "
    "the model, from calibrate --gradients --labels model; --method then only "
    "orders the channels of a layer, or the weights of a matrix.",
)
@click.option(
    "--layers",
    type=options.Slice(),
    show_default="all",
    help="Prune only these layers, as a slice in Python: 4:-2 leaves the first four and the last "
    "two whole. --sparsity counts all layers for heads and channels, and these for weights.",
)
@click.option(
    "--weighting",
    type=click.Choice(["none", "token"]),
    default="none",
    show_default=True,
    help="token: weigh each token by 1/‖residual stream‖² when layers are compared.",
)
@click.option(
    "--multiple-of",
    default=32,
    show_default=True,
    type=click.IntRange(1),
    help="A pruned layer keeps a multiple of this many channels (layers of unequal size are stored "
    "in multiples of 32); hidden: of dimensions, default 8.",
)
@click.option(
    "--min-channels",
    default=32,
    show_default=True,
    type=click.IntRange(1),
    help="No layer keeps fewer channels.",
)
@click.option(
    "--lambda",
    "lam",
    type=options.Finite(0, min_open=True, infinity=True),
    show_default="1; attention-gd: a thousandth of its loss's largest curvature",
    help="λ of newton and its variants, for inputs of spectral norm 1 (inf makes the count a "
    "hard constraint), and of attention-gd.",
)
@click.option(
    "--newton-iterations",
    type=click.IntRange(1),
    metavar="T",
    help="Run Algorithm 1 of arXiv 2412.12441 for T steps instead of its closed form (same "
    "result).",
)
@click.option(
    "--taylor",
    type=click.Choice(TAYLOR),
    default=TAYLOR[0],
    show_default=True,
    help="For --method taylor: the score of a row or column of weights w, from the loss's slope "
    "g and its mean square F: first: Σ |w g|; vector: |Σ w g|; second: Σ w² F; mix: Σ |w g − ½ w² "
    "F|.",
)
@click.option(
    "--reduce",
    type=click.Choice(REDUCE),
    default=REDUCE[0],
    show_default=True,
    help="For --method taylor: how the scores of a unit's matrices are combined; first: q or gate "
    "alone.",
)
@click.option(
    "--damping",
    default=None,
    show_default=default_of("damping"),
    type=options.Finite(0),
    help=f"What the solves of {', '.join(DAMPED)} add to the diagonal, as a fraction of its mean; "
    "newton's systems are scaled to a diagonal of ones first.",
)
@click.option(
    "--pattern",
    type=click.Choice(PATTERNS),
    show_default=default_of("pattern"),
    help="Where the sparsity of weights is met: over the matrix, in each row, or as two of every "
    "four neighbours along the input.",
)
@click.option(
    "--iterations",
    default=100,
    show_default=True,
    type=click.IntRange(1),
    metavar="T",
    help="Maximum steps of attention-gd; it stops if the held-out loss rises.",
)
@click.option(
    "--learning-rate",
    type=options.Finite(0, min_open=True),
    metavar="η",
    show_default="1/(λ + largest curvature)",
    help="Step of attention-gd.",
)
@click.option(
    "--published",
    is_flag=True,
    help="A method as published: newton (its λ, one global ranking, no weighting); taylor (the "
    "same share of each layer but the first four and last two); of q,k attention-gd (λ, η, T and "
    "order).",
)
@click.option(
    "--refine",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    metavar="STEPS",
    help="After masking q and k, tune the kept weights for STEPS steps.",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed for --method random."
)
@options.discard_opt
@options.device_opt
@options.profile_opt
@options.output_opt
def score(
    source: str,
    target: str,
    sparsities: tuple[tuple[str, float], ...],
    discard: bool,
    device: str,
    profile: Path | None,
    sink: str,
    **how: Any,
) -> None:
    """Choose which heads and channels, or which weights, each layer keeps.

    Reads the records of calibrate and adds what is kept; several score steps in one pipe each
    decide their own --target. A global ranking of heads and channels, and --allocation loss, need
    all layers before they write their first record; else weights are decided layer by layer.

    \b
    Example:
      prunetool calibrate MODEL --text wiki.txt | prunetool score --sparsity 0.2 > kept.jsonl
      prunetool score stats.jsonl --target qk --method attention-gd --refine 100 --sparsity .5 |
        prunetool score --target v,o,gate,up,down --method wanda --sparsity .5 > masked.jsonl
    """
    targets = _targets(target)
    if how["published"]:
        _publish(targets, how)
    _check(targets, how, [number for _, number in sparsities])
    how = _resolved(targets, how)
    if len(sparsities) > 1 and PLACE not in sink:
        raise click.UsageError(f"several sparsities need -o with {PLACE}, as in kept-{PLACE}.jsonl")
    if len(sparsities) > 1 and profile and PLACE not in str(profile):
        raise click.UsageError(f"several sparsities need --profile with {PLACE} in its name")
    sinks = [sink.replace(PLACE, typed) for typed, _ in sparsities]
    options.keep_inputs([*sinks, profile], [source])

    from prunetool import devices, plan
    from prunetool.steps.hidden import Slicing
    from prunetool.steps.mask import Masking
    from prunetool.steps.run import Run
    from prunetool.steps.score import Scoring

    with console.summary("score") as said, options.open_source(source) as stream:
        devices.start(device)
        header, layers = records.read(stream)
        options.keep_inputs([*sinks, profile], [header.source])
        if header.had("compensate", "recover"):
            raise RecordError(
                source,
                "was already refitted for what is kept so far",
                "run compensate and recover after the last score",
            )
        if header.cuts_hidden:
            raise RecordError(
                source, "has its hidden dimensions cut", "give --target hidden in the last score"
            )
        # One sparsity streams: a mask of weights goes on as soon as it is made.
        source_of = list(layers) if len(sinks) > 1 else layers
        for number, ((typed, sparsity), place) in enumerate(zip(sparsities, sinks, strict=True), 1):
            own = how | {"sparsity": sparsity}
            row = methods_of(targets)[how["method"]]
            recorded = {k: v for k, v in own.items() if k in row.options or k not in OF_METHODS}
            after = header.after("score", target=",".join(targets), **recorded)
            trace = Path(str(profile).replace(PLACE, typed)) if profile else None
            run = Run.of(after, trace, discard and number == len(sinks))
            job: Scoring | Slicing | Masking
            if targets[0] in UNIT_TARGETS:
                job, need = Scoring(run, targets, own), plan.units_bytes(run.model)
            elif targets == HIDDEN_TARGETS:
                need = plan.basis_bytes(run.model, by_norm=own["basis"] == LAYER)
                job = Slicing(run, targets, own)
            else:
                by_loss = own["allocation"] == "loss"
                need = plan.masks_bytes(run.model, targets, by_loss=by_loss)
                job = Masking(run, targets, own)
            run.write(partial(options.open_sink, place), job.layers(iter(source_of)), need)
            said += job.said


def _targets(target: str) -> tuple[str, ...]:
    """The units, or the matrices in the order of a layer, that a --target names."""
    named = [part for name in target.split(",") for part in SHORTHANDS.get(name, (name,))]
    for known in (UNIT_TARGETS, MATRICES, HIDDEN_TARGETS):
        if set(named) <= set(known) and len(set(named)) == len(named):
            return tuple(part for part in known if part in named)
    raise click.BadParameter(
        f"{target!r}: give some of {', '.join(UNIT_TARGETS)}, or some of "
        f"{', '.join((*MATRICES, *SHORTHANDS))}, separated by commas, or hidden"
    )


def _flag(option: str) -> str:
    return "--lambda" if option == "lam" else f"--{option.replace('_', '-')}"


def _publish(targets: tuple[str, ...], how: dict[str, Any]) -> None:
    """Set the method and options that ``--published`` stands for.

    Raises:
      click.UsageError: if none of the targets' methods has such options, or another was given.
    """
    rows = {n: row.published for n, row in methods_of(targets).items() if row.published is not None}
    if not options.given("method"):
        how["method"] = next(iter(rows), next(iter(methods_of(targets))))
    if how["method"] not in rows:
        raise click.UsageError(
            f"--published goes with --method {' or '.join(PUBLISHED)}, not {how['method']} of "
            f"{','.join(targets)}"
        )
    for option, value in rows[how["method"]].items():
        if options.given(option) and how[option] != value:
            raise click.UsageError(
                f"--published sets {_flag(option)} itself: leave out one of them"
            )
        how[option] = value


def _check(targets: tuple[str, ...], how: dict[str, Any], sparsities: list[float]) -> None:
    """Refuse options that contradict each other."""
    allowed = methods_of(targets)
    method = how["method"] = how["method"] or next(iter(allowed))
    if method not in allowed:
        raise click.UsageError(
            f"--method {method} does not score {','.join(targets)}; give {', '.join(allowed)}"
        )
    takes = allowed[method].options
    if how["newton_iterations"] and (
        "newton_iterations" not in takes or how["lam"] == float("inf")
    ):
        raise click.UsageError("--newton-iterations goes with --method newton and a finite λ")
    for option in sorted(OF_METHODS - {*takes}):
        if options.given(option):
            rows = {**UNITS, **WEIGHTS, **QK}.items()
            those = " or ".join(name for name, row in rows if option in row.options)
            raise click.UsageError(f"{_flag(option)} goes with --method {those}")
    if how["refine"] and targets != SHORTHANDS["qk"]:
        raise click.UsageError("--refine goes with --target qk")
    if how["pattern"] == "2:4" and sparsities != [0.5]:
        raise click.UsageError("--pattern 2:4 removes half: give --sparsity 0.5")


def _resolved(targets: tuple[str, ...], how: dict[str, Any]) -> dict[str, Any]:
    """The options that apply to units or to weights, with the method's defaults.

    Raises:
      click.UsageError: if an option was given that does not matter.
    """
    if targets == HIDDEN_TARGETS:
        if wrong := [key for key in how if options.given(key) and key not in OF_HIDDEN]:
            raise click.UsageError(f"{_flag(wrong[0])} is not for --target hidden")
        multiple = how["multiple_of"] if options.given("multiple_of") else OTHER_SIZE
        return {"method": how["method"], "multiple_of": multiple, "basis": how["basis"]}
    if options.given("basis"):
        raise click.UsageError("--basis goes with --target hidden")
    how.pop("basis")
    units = targets[0] in UNIT_TARGETS
    for key in OF_WEIGHTS if units else OF_UNITS:
        if options.given(key):
            raise click.UsageError(
                f"{_flag(key)} is only for "
                f"{'weights' if units else 'heads and channels'}, "
                "but --target names others"
            )
        how.pop(key)
    if units and CHANNELS not in targets and (wrong := [*filter(options.given, OF_CHANNELS)]):
        raise click.UsageError(f"{_flag(wrong[0])} goes with --target {CHANNELS}")
    method = methods_of(targets)[how["method"]]
    if method.needs_slopes and how["allocation"] == "loss":
        raise click.UsageError(
            f"--allocation loss needs calibrate --labels model, but --method {how['method']} needs "
            "--labels text; give share, uniform or global"
        )
    if units and how["lam"] is None:
        how["lam"] = 1.0
    if how["damping"] is None:
        how["damping"] = method.damping
    if not units:
        how["pattern"] = how["pattern"] or method.pattern
    by_loss = units or (method.needs_gradients and how["pattern"] == "unstructured")
    usual = method.allocation or ("loss" if by_loss else "uniform")
    how["allocation"] = how["allocation"] or usual
    if not units:
        if how["allocation"] in ("global", "share"):
            raise click.UsageError(
                f"--allocation {how['allocation']} is only for heads and channels; give uniform or "
                "loss"
            )
        if how["allocation"] == "loss" and how["pattern"] != "unstructured":
            raise click.UsageError(
                f"--pattern {how['pattern']} fixes what each matrix loses; --allocation loss goes "
                "with --pattern unstructured"
            )
    return how
