"""The model card of a pruned checkpoint: what was done to it, in full."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from prunetool import __version__
from prunetool.checkpoint.hub import HUB_ID, hub_id
from prunetool.checkpoint.source import front_matter
from prunetool.errors import plain, shown
from prunetool.llama.config import PICTURES, PRUNED, LlamaConfig
from prunetool.llama.forms import LOADERS
from prunetool.llama.weights import layer_parameters
from prunetool.model import Model
from prunetool.records import CHECKSUMS, Header

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

HISTORY_SHOWN = 2000  # characters of a step in the history
FIELD_SHOWN = 200  # characters of a field of the base's front matter; longer ones are dropped
ID_PLACE = '"OUT"'  # placeholder for the repository's name
ABSOLUTE = re.compile(r"(file:/|~)?[/\\].*|[A-Za-z]:[/\\].*", re.DOTALL)


def model_card(
    header: Header,
    dense: Model,
    form: str,
    pruned: LlamaConfig,
    parameters: int,
    densities: Sequence[dict[str, tuple[int, int]]],
    *,
    zeros: bool = False,
    recovered: bool = False,
) -> str:
    """README.md for the Hub: front matter, sizes, how to load, and how it was made.

    It contains no path of this machine.

    Args:
      header: of the records that were exported.
      dense: the original checkpoint.
      form: what config.json calls it.
      pruned: config of the result, with what each layer keeps.
      parameters: stored in the result.
      densities: nonzero and all weights of each layer's matrices; none if no weights were
        masked.
      zeros: it has the original shapes.
      recovered: recover changed the weights.
    """
    before = [dense.layer_parameters(shape) for shape in dense.config.layer_shapes]
    D, k = dense.config.hidden_size, pruned.hidden_size
    after = [layer_parameters(pruned, shape) for shape in pruned.layer_shapes]
    source = hub_id(Path(header.model)) or Path(header.source).name
    if source in ("", ".."):  # the path has no name, such as .
        source = Path(header.model).name
    data = _front_matter(header, dense)
    licence = data.license_name or data.license
    trained = "and trained on its predictions" if recovered else "without training"
    lines = [
        "---", data.to_yaml(line_break="\n"), "---", "",
        f"# {plain(Path(source).name)}, pruned", "",
        f"Made from {plain(source)} by prunetool {__version__}, {trained}. "
        f"The licence is the base model's{f': {plain(licence)}' if licence else ''}.", "",
        "| | before | after |", "|---|---:|---:|",
        f"| parameters in decoder layers | {sum(before):,} | {sum(after):,} "
        f"({_change(sum(before), sum(after))}) |",
        f"| parameters stored | {dense.parameters():,} | {parameters:,} "
        f"({_change(dense.parameters(), parameters)}) |",
        *([f"| hidden size | {D} | {k} |"] if k < D else []), "",
        *_how_to_load(form, pruned, zeros), "",
        "## What each layer keeps", "",
        "| layer | query heads | KV heads | MLP channels |", "|---:|---:|---:|---:|",
    ]  # fmt: skip
    for layer, (old, new) in enumerate(
        zip(dense.config.layer_shapes, pruned.layer_shapes, strict=True)
    ):
        cells = (
            f"{getattr(new, k)} / {getattr(old, k)}" for k in ("heads", "kv_heads", "channels")
        )
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    lines += _how_dense(densities)
    history = [_without_paths(step) for step in header.history]
    lines += ["", "## How it was made", "", "```sh", *commands(history, source), "```"]
    lines += ["", "As recorded:", "", "```json"]
    lines += [shown(json.dumps(step), HISTORY_SHOWN) for step in history]
    return "\n".join([*lines, "```", ""])


def _change(before: int, after: int) -> str:
    """−15.80%, or + if it is more: a head that was tied is stored apart once the size is cut."""
    return f"{'−' if after <= before else '+'}{abs(1 - after / before):.2%}"


def _how_dense(densities: Sequence[dict[str, tuple[int, int]]]) -> list[str]:
    """A table of the nonzero weights per layer; nothing if none were masked."""
    if not densities:
        return []
    lines = [
        "",
        "## Nonzero weights, of those stored",
        "",
        f"| layer | {' | '.join(densities[0])} |",
        f"|---:|{'---:|' * len(densities[0])}",
    ]
    for layer, of in enumerate(densities):
        cells = (
            f"{filled:,} / {size:,} ({filled / (size or 1):.2%})" for filled, size in of.values()
        )
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return lines


def published(card: str, repository: str, results: "Sequence[EvalResult]") -> str:
    """The card as published: with the id of its repository and the measured results.

    Raises:
      ValueError: if its front matter cannot be read, for example after an edit.
    """
    from huggingface_hub import ModelCard

    try:
        page = ModelCard(card.replace(ID_PLACE, json.dumps(repository)))
    except Exception as error:  # from YAML and from the library
        raise ValueError(str(error).partition("\n")[0]) from error
    if not results:
        return str(page)
    page.data["model_name"] = repository.rsplit("/")[-1]
    page.data["eval_results"] = list(results)
    rows = [
        f"| {plain(result.dataset_name)} | {result.metric_name} | {result.metric_value:.6g} |"
        for result in results
    ]
    page.text = "\n".join(
        [page.text.rstrip(), "", "## Evaluation", "", "| text | | |", "|---|---|---:|", *rows, ""]
    )
    return str(page)


def commands(history: Iterable[Mapping[str, Any]], model: str) -> list[str]:
    """The pipe that made a checkpoint as shell commands, one step per line.

    Args:
      history: history of the records; options go by the names of the command.
      model: name of the model in the commands.
    """
    steps = []
    for step in history:
        words = ["prunetool", step["command"]]
        if step["command"] == "calibrate":
            named = {"text", "dataset", "tokens_file"} & step["options"].keys()
            words += [model, *([] if named else ["--text", "TEXT"])]
        if step["command"] == "export":
            words.append("OUT")
        for option, value in step["options"].items():
            if option == "sequence_length" and "guidance" in step["options"]:
                continue  # a picture has its own
            words += _option(option, value)
        steps.append(" ".join(shlex.quote(shown(word)) for word in words))
    return " \\\n  | ".join(steps).split("\n")


def _option(option: str, value: Any) -> list[str]:
    """A history entry's option as command-line words."""
    match option, value:
        case _ if option in CHECKSUMS:
            return []
        case "tokens_file", _:
            return ["--tokens", "FILE"]
        case "bos", _:
            return ["--bos", "never" if value is None else "always"]
        case "attention", [samples, length]:
            if not samples:
                return []
            return ["--attention-samples", str(samples), "--attention-length", str(length)]
        case "lam", int() | float():
            return ["--lambda", str(value)]
        case _, None | False:
            return []
        case _, True:
            return [f"--{option.replace('_', '-')}"]
        case _, list():
            return [f"--{option.replace('_', '-')}", ",".join(map(str, value))]
    return [f"--{option.replace('_', '-')}", str(value)]


def _front_matter(header: Header, dense: Model) -> "ModelCardData":
    """Metadata that the Hub reads from the page: the base's licence and languages, and tags."""
    from huggingface_hub import ModelCardData

    base = front_matter(dense.directory)
    fields: dict[str, Any] = {
        key: _words(base.get(key))[:1] for key in ("license", "license_name", "license_link")
    }
    bases = [hub_id(Path(header.model))]
    if bases == [None]:  # a local model may be made from one on the Hub
        bases = [name for name in _words(base.get("base_model")) if HUB_ID.fullmatch(name)]
    fields |= {"base_model": bases, "language": _words(base.get("language"))}
    methods = [step["options"].get("method") for step in header.history]
    tags = [name for name in methods if isinstance(name, str) and re.fullmatch(r"[\w-]+", name)]
    known: dict[str, Any] = {
        key: found[0] if len(found) == 1 else found or None for key, found in fields.items()
    }
    if dense.config.classes:
        tags.append(PICTURES)
    else:
        known |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    return ModelCardData(tags=["pruned", "prunetool", *tags], **known)


def _words(value: object) -> list[str]:
    """Strings of a foreign front matter field (or list): short plain text, no local paths."""
    return [
        word
        for word in (value if isinstance(value, list) else [value])[:100]
        if isinstance(word, str)
        and word
        and shown(word, FIELD_SHOWN) == word
        and not ABSOLUTE.fullmatch(word)
    ]


def _without_paths(value: Any) -> Any:
    """Reduce every path of this machine in a JSON value to its last name."""
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    if isinstance(value, str) and ABSOLUTE.fullmatch(value):
        return PureWindowsPath(value).name
    return value


def _how_to_load_pictures() -> list[str]:
    (file,) = LOADERS[PICTURES]
    return [
        "For use in a checkout of [LlamaGen](https://github.com/FoundationVision/LlamaGen), a "
        f"loader is included. Read `{file}`, then:",
        "",
        "```python",
        f"from {Path(file).stem} import load",
        "",
        f"model = load({ID_PLACE})",
        "```",
    ]


def _how_to_load(form: str, pruned: LlamaConfig, zeros: bool) -> list[str]:
    if form == PICTURES:
        return _how_to_load_pictures()
    known = form != PRUNED
    more = "" if known else ", trust_remote_code=True"
    code = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({ID_PLACE}{more})",
        f"tokenizer = AutoTokenizer.from_pretrained({ID_PLACE}{more})",
        "```",
    ]
    if known:
        note = "Pruned weights are zeros in the original shapes. " if zeros else ""
        return [f"{note}Loads like the base model:", "", *code]
    files = ", ".join(f"`{file}` ({programs})" for file, programs in LOADERS[PRUNED].items())
    said = f"Layers differ in size, so a loader is included: {files}. Read it, then:"
    if pruned.shortcuts:
        said = (
            "Each norm has its own basis of the stream, so a loader is included, for transformers "
            "4.54 or later and for MLX-LM. Read it, then:"
        )
    return [said, "", *code]
