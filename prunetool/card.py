"""The model card of a pruned checkpoint: what was done to it, in full."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from prunetool import __version__
from prunetool.checkpoint.hub import HUB_ID
from prunetool.errors import shown
from prunetool.llama.config import LayerShape
from prunetool.llama.forms import LOADER_FILES
from prunetool.model import Model
from prunetool.records import Header

HISTORY_SHOWN = 2000  # characters of a step in the history


def model_card(
    header: Header,
    dense: Model,
    form: str,
    shapes: Sequence[LayerShape],
    parameters: int,
    densities: Sequence[dict[str, tuple[int, int]]],
) -> str:
    """README.md for the Hub: front matter, sizes, how to load, and the history.

    Args:
      header: of the records that were exported.
      dense: the checkpoint before.
      form: what config.json calls it, or ``dense``.
      shapes: what each layer keeps.
      parameters: stored in the result.
      densities: of each layer's matrices, weights that are not zero and all; none where no weights
        were masked.
    """
    before = [dense.layer_parameters(shape) for shape in dense.config.layer_shapes]
    after = [dense.layer_parameters(shape) for shape in shapes]
    hub = hub_id(Path(header.model))
    source = hub or header.source
    if Path(source).name in ("", ".."):  # a path that names nothing, such as .
        source = Path(header.model).name
    name, source = plain(Path(source).name), plain(source)
    front = ["---", *([f"base_model: {hub}"] if hub else [])]
    front += ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- pruned"]
    lines = [
        *front, "---", "",
        f"# {name}, pruned", "",
        f"Made from {source} by [prunetool](https://pypi.org/project/prunetool) "
        f"{__version__}, without training. The licence is the base model's.", "",
        "| | before | after |", "|---|---:|---:|",
        f"| parameters in decoder layers | {sum(before):,} | {sum(after):,} "
        f"(−{1 - sum(after) / sum(before):.2%}) |",
        f"| parameters stored | {dense.parameters():,} | {parameters:,} "
        f"(−{1 - parameters / dense.parameters():.2%}) |", "",
        *_how_to_load(form), "",
        "## What each layer keeps", "",
        "| layer | query heads | KV heads | MLP channels |", "|---:|---:|---:|---:|",
    ]  # fmt: skip
    for layer, (old, new) in enumerate(zip(dense.config.layer_shapes, shapes, strict=True)):
        cells = (
            f"{getattr(new, k)} / {getattr(old, k)}" for k in ("heads", "kv_heads", "channels")
        )
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    if densities:
        lines += [
            "", "## Weights that are not zero, of those stored", "",
            f"| layer | {' | '.join(densities[0])} |", f"|---:|{'---:|' * len(densities[0])}",
        ]  # fmt: skip
    for layer, of in enumerate(densities):
        cells = (
            f"{filled:,} / {size:,} ({filled / (size or 1):.2%})" for filled, size in of.values()
        )
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    lines += ["", "## History", "", "```json"]
    lines += [shown(json.dumps(step), HISTORY_SHOWN) for step in header.history]
    return "\n".join([*lines, "```", ""])


def hub_id(directory: Path) -> str | None:
    """The id of the Hub repository that a directory is a download of, if it is one.

    It lies in the Hub's cache as ``…/models--OWNER--NAME/snapshots/COMMIT``.
    """
    repository, snapshots = directory.parent.parent.name, directory.parent.name
    name = repository.removeprefix("models--").replace("--", "/")
    cached = repository.startswith("models--") and snapshots == "snapshots"
    return name if cached and HUB_ID.fullmatch(name) else None


def plain(text: str) -> str:
    """Foreign text in a Markdown page: one short line, in which nothing is markup."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|&~$:@])", r"\\\1", shown(text))


def _how_to_load(form: str) -> list[str]:
    if form != "pruned_llama":
        note = "Pruned weights are zeros in the original shapes. " if form == "dense" else ""
        return [f"{note}Loads like the base model."]
    files = ", ".join(f"`{file}` ({programs})" for file, programs in LOADER_FILES.items())
    return [
        f"Layers differ in size, so the loader comes along: {files}. Read it, then:", "",
        "```python",
        'AutoModelForCausalLM.from_pretrained("…", trust_remote_code=True)',
        "```",
    ]  # fmt: skip
