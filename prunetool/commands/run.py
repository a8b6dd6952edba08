"""``prunetool run``: the steps of a pipe, one after the other."""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from prunetool import options
from prunetool.commands.calibrate import calibrate
from prunetool.commands.compensate import compensate
from prunetool.commands.export import export
from prunetool.commands.recover import recover
from prunetool.commands.score import score
from prunetool.formats import FORMATS

STEPS = (calibrate, score, compensate, recover, export)
OPTIONAL = recover
# The arguments and options of the steps that run has, too; for the others there is the pipe.
TAKEN = (
    "model", "out", "texts", "text_field", "chat", "dataset", "split", "tokens_path", "sparsities",
    "allocation", "samples", "gradients", "first_tokens", "length", "shuffle", "bos", "guidance",
    "form", "dtype", "device", "revision", "work", "overwrite",
)  # fmt: skip
# Of calibrate, and not of recover, which trains on the same tokens.
OF_CALIBRATE = (
    "samples", "gradients", "first_tokens", "texts", "text_field", "chat", "dataset", "split",
    "tokens_path", "length", "bos",
)  # fmt: skip


class Run(options.Command):
    """A command whose options are those of others, to which it passes what was given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the values as they were typed."""
        ctx.meta["typed"] = self.make_parser(ctx).parse_args(list(args))[0]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the steps: each shows its own progress and summary."""
        verbose, quiet = ctx.params["verbose"], ctx.params["quiet"]
        flags = ["-v"] * verbose + ["-q"] * quiet
        out = Path(ctx.params["out"])
        if out.exists() and out.resolve() == Path(ctx.params["model"]).resolve():
            raise click.UsageError(f"{out} is MODEL itself: name another directory for OUT")
        form = FORMATS[ctx.params["form"]]
        if wrong := form.wrong_name(out):
            raise click.UsageError(wrong)
        allocation = ctx.params["allocation"] or "loss"  # the default of score
        if ctx.params["gradients"] == 0 and allocation == "loss":
            raise click.UsageError("--gradients 0 goes with --allocation uniform or share")
        if ctx.params["samples"] == 1:
            raise click.UsageError("--samples 1 leaves none to choose a damping on: give 2 or more")
        from prunetool.methods import load
        from prunetool.model import open_model
        from prunetool.steps.export import refuse_taken, refuse_taken_file
        from prunetool.steps.score import common_shape

        if form.suffix:
            refuse_taken_file(out, overwrite=ctx.params["overwrite"])
        elif not ctx.params["overwrite"]:
            asked = {
                "sparsity": ctx.params["sparsities"],
                "allocation": allocation,
                "recover": ctx.params["recover"],
            }
            refuse_taken(out, asked)
        if form.check or allocation != "loss":
            model = open_model(ctx.params["model"], ctx.params["revision"])
            if form.check:
                load(form.check)(model, model.config)
            if allocation != "loss":
                common_shape(allocation, model.config.layer_shapes)
        made = "-"
        with TemporaryDirectory(prefix="prunetool-") as directory:
            for step in STEPS:
                if step is OPTIONAL and not ctx.params["recover"]:
                    continue
                arguments, words = _words(step, ctx)
                words += flags
                if step is not calibrate:
                    arguments.append(made)
                if step is not export:
                    made = str(Path(directory) / f"{step.name}.jsonl")
                    words += ["--output", made]
                try:
                    with step.make_context(
                        step.name, [*words, "--", *arguments], parent=ctx
                    ) as own:
                        step.invoke(own)
                except click.UsageError as error:
                    error.ctx = ctx  # the user typed no step
                    raise


def _words(step: click.Command, ctx: click.Context) -> tuple[list[str], list[str]]:
    """What was typed of a step's own arguments, and of its options."""
    arguments, words = [], []
    for name in TAKEN:
        if step is OPTIONAL and name in OF_CALIBRATE:
            continue
        for param in step.params:
            typed = ctx.meta["typed"].get(name)
            if param.name != name or ctx.get_parameter_source(name) is None or typed is None:
                continue
            if isinstance(param, click.Argument):
                arguments.append(typed)
            elif isinstance(param, click.Option) and param.is_flag:
                words += param.opts if typed else []
            else:
                each = typed if isinstance(typed, list) else [typed]
                words += [word for value in each for word in (param.opts[-1], value)]
    return arguments, words


def _params() -> list[click.Parameter]:
    """The parameters: those of `TAKEN` as their first step has them, but for four."""
    steps = {param.name: param for step in reversed(STEPS) for param in step.params}
    own = {
        "sparsities": click.Option(
            ["--sparsity", "sparsities"],
            required=True,
            type=options.Finite(0, 1, max_open=True),
            help="Fraction to remove of the parameters of all decoder layers' seven matrices.",
        ),
        "allocation": click.Option(
            ["--allocation"],
            type=click.Choice(["loss", "uniform", "share"]),
            show_default="loss",
            help="How the removal is shared between the layers. loss: so that the predicted loss "
            "of the model is least. uniform: the same counts in every layer, so that OUT loads "
            "without a loader file. share: the same share of KV groups and of channels in every "
            "layer, in whole units: the total may miss --sparsity.",
        ),
        "overwrite": click.Option(
            ["--overwrite"],
            is_flag=True,
            help="Replace OUT, and the work directory of another calibration.",
        ),
        "recover": click.Option(
            ["--recover"],
            is_flag=True,
            help="Also train the kept weights to predict what MODEL predicts: the step recover.",
        ),
    }
    known = {**steps, **own}
    return [copy.copy(known[name]) for name in (*TAKEN, "recover")]


def run_steps(**_: Any) -> None:
    """Prune MODEL into OUT, in one command.

    Calibrates, scores, compensates and exports; OUT has the same bytes as that of the pipe. If
    killed, the same command goes on where it was. The work directory stays, so that another
    sparsity needs no new calibration. The steps themselves have more options.

    \b
    Example:
      prunetool run SmolLM2-135M SmolLM2-pruned --text wiki.txt --sparsity 0.2
    """


run = Run("run", callback=run_steps, params=_params(), help=run_steps.__doc__)
