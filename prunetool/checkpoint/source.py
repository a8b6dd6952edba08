"""Resolve a path or Hub id to a local directory."""

import glob
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from prunetool.checkpoint.hub import HUB_ID, asking, cached_id, hub_id, without_secrets
from prunetool.checkpoint.index import INDEX_NAME, SINGLE_NAME, read_json, read_weight_map
from prunetool.checkpoint.writer import DATA_FILES, LICENSE_FILES, TEMPLATES, TOKENIZER_FILES
from prunetool.errors import CheckpointError, ConfigError, HubError

# Files that may be read from a checkpoint's directory.
NEEDED_FILES = [
    "*.safetensors",
    "*.json",
    *TOKENIZER_FILES,
    f"{TEMPLATES}/*.jinja",
    *LICENSE_FILES,
    "README.md",
]
ADAPTER_NAME = "adapter_config.json"
SMALL_FILES = (
    *DATA_FILES, f"{TEMPLATES}/*.jinja", *LICENSE_FILES, INDEX_NAME, ADAPTER_NAME, "README.md",
)  # fmt: skip
NOT_GIVEN = "no such directory, and the Hub did not provide it"
NOT_THERE = "no such directory or Hub repository"

README_BYTES = 1 << 18  # nearly all on the Hub are below 2¹⁷
FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", re.DOTALL)
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Suffixes that repositories of quantised models add to the original's name.
QUANTISED_NAME = re.compile(
    r"[-_.](unsloth-bnb|bnb|awq|gptq|gguf|mlx|int[48]|fp[48]|nf4|w\d+a\d+|quantized|\d+bit|[348]-bit)"
    r"([-_.]\w+)*$",
    re.IGNORECASE,
)


def locate(model: str, revision: str | None = None) -> Path:
    """Return the directory of ``model``; download all but the weights if it is on the Hub.

    Args:
      model: a directory, or a Hub id such as ``HuggingFaceTB/SmolLM2-135M-Instruct``.
      revision: branch, tag or commit of the Hub repository.

    Raises:
      CheckpointError: if it is neither a directory nor shaped like a Hub id, or is a directory
        of something else.
      ConfigError: if its weights are quantised.
      HubError: if the Hub does not provide the files. The token comes from the environment or
        the Hub's own login and is never printed.
    """
    directory = Path(model)
    if directory.is_dir():
        directory = directory.resolve()
        names = {path.name for path in directory.iterdir()}
        if not _weight_files(directory, names) and (error := _not_a_model(model, directory, names)):
            raise error
    elif HUB_ID.fullmatch(model) and not directory.exists():
        directory = _download_small(model, revision)
    else:
        raise _no_directory(model)
    _refuse_quantised(model, directory)
    return directory


def _download_small(model: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    with asking(model, NOT_GIVEN, NOT_THERE, revision):
        small = list(SMALL_FILES)
        directory = Path(snapshot_download(model, revision=revision, allow_patterns=small))
        if (directory / "config.json").exists():
            return directory
        names = set(HfApi().list_repo_files(model, revision=directory.name))
    raise _not_a_model(model, directory, names) or HubError(
        model, "has no config.json", "give a repository of a Llama model"
    )


def fetch_weights(model: str, directory: Path) -> None:
    """Download the weights of a Hub repository whose other files `locate` has downloaded.

    Only the files that `read_index` reads, no second copy in another format. Existing files are not
    requested again; a killed download resumes.

    Raises:
      HubError: if the Hub does not provide them, or has none in a supported format.
    """
    if Path(model).is_dir():
        return
    there = {path.name for path in directory.iterdir() if path.exists()}
    needed = _weight_files(directory, there)
    if needed and needed <= there:
        return
    from huggingface_hub import HfApi, snapshot_download

    with asking(model, NOT_GIVEN, NOT_THERE):
        names = set(HfApi().list_repo_files(model, revision=directory.name))
    needed = _weight_files(directory, names)
    if not needed:
        raise _not_a_model(model, directory, names) or HubError(
            model,
            f"holds neither {INDEX_NAME} nor {SINGLE_NAME}",
            "give a repository with safetensors weights",
        )
    if lacking := sorted(needed.difference(names)):
        raise HubError(
            model, f"lacks {lacking[0]}, which its index names", "give another --revision"
        )
    with asking(model, NOT_GIVEN, NOT_THERE):
        # The names are untrusted, and the library treats them as patterns.
        patterns = [glob.escape(name) for name in sorted(needed)]
        snapshot_download(model, revision=directory.name, allow_patterns=patterns)


def front_matter(directory: Path) -> dict[str, Any]:
    """README.md's front matter; empty if it cannot be read."""
    path = directory / "README.md"
    if not path.is_file() or path.stat().st_size > README_BYTES:
        return {}
    from huggingface_hub import RepoCard

    try:
        found = FRONT_MATTER.match(path.read_text(encoding="utf-8-sig"))
        if found and "<<" not in found[1]:  # merged keys can grow without bound
            return dict(vars(RepoCard(found[0]).data))
    except Exception:  # foreign YAML can fail in any way
        return {}
    return {}


def _weight_files(directory: Path, names: Collection[str]) -> set[str]:
    """The weight files among these names that `read_index` would read."""
    if SINGLE_NAME in names:
        return {SINGLE_NAME}
    if INDEX_NAME in names and (directory / INDEX_NAME).exists():
        return set(read_weight_map(directory / INDEX_NAME).values())
    return set()


def _not_a_model(model: str, directory: Path, names: Collection[str]) -> CheckpointError | None:
    """The error for a directory or repository without weights, judged by its file names.

    Args:
      model: what the user called it.
      directory: directory with its small files.
      names: names of all its files.
    """
    of = {Path(name).suffix: name for name in sorted(names, reverse=True) if "/" not in name}
    root = directory.parent if directory.name == "snapshots" else directory
    if ADAPTER_NAME in names:
        base = read_json(directory / ADAPTER_NAME).get("base_model_name_or_path")
        what = f"is an adapter{f' of {base}' if isinstance(base, str) else ''}, not a model"
        todo = "merge it into its base: PeftModel.merge_and_unload(), then save_pretrained()"
    elif (root / "snapshots").is_dir() and (name := cached_id(root)):
        what, todo = f"is where the Hub's cache keeps {name}", f"give the id: {name}"
    elif cached := sorted(filter(None, (cached_id(directory / name) for name in names))):
        what, todo = "is the Hub's cache", f"give an id, such as {cached[0]}"
    elif ".gguf" in of:
        what = "holds GGUF files and no safetensors"
        todo = "convert one to a checkpoint: prunetool convert FILE OUT"
    elif of.keys() & set(PICKLED):
        what = f"holds neither {INDEX_NAME} nor {SINGLE_NAME}, only pickled files (never read)"
        todo = "load it in transformers and save_pretrained it, or try another revision"
    else:
        return None
    return CheckpointError(model, what, todo)


def _no_directory(model: str) -> CheckpointError:
    """The error for a name that is neither a directory nor an id."""
    path = Path(model)
    what, todo = (
        "is neither a directory nor a Hub id",
        "give a directory or an id such as owner/name",
    )
    if url := re.match(r"(?:https?://|hf://)(?:[^/]+\.[^/]+/)?([\w.-]+/[\w.-]+)", model):
        todo = f"give the id: {url[1]}"
    elif path.is_file() and path.suffix == ".gguf":
        what, todo = (
            "is a GGUF file",
            f"convert it to a checkpoint: prunetool convert {path.name} OUT",
        )
    elif path.is_file() and path.suffix in (".safetensors", ".json"):
        what, todo = "is one file of a checkpoint", f"give its directory: {path.parent}"
    elif path.is_file() and path.suffix in PICKLED:
        what = "is a pickled file, which is never read"
        todo = "load it in transformers and save_pretrained it"
        if path.suffix in (".pt", ".pth"):
            what = "is a PyTorch file"
            todo = "convert LlamaGen's (prunetool convert); save_pretrained others in transformers"
    return CheckpointError(without_secrets(model), what, todo)


def _refuse_quantised(model: str, directory: Path) -> None:
    """Refuse quantised weights, pointing to the original.

    Raises:
      ConfigError: if they are quantised; says how, and where the original usually is.
    """
    path = directory / "config.json"
    config = read_json(path) if path.exists() else {}
    for key in ("quantization_config", "quantization", "compression_config"):
        if config.get(key) is not None:
            raise ConfigError(
                model,
                f"is quantised{_method(config[key])}",
                f"give the unquantised original{_original(directory)}",
            )


def _method(config: object) -> str:
    """How weights were quantised, as far as their config says."""
    if not isinstance(config, dict):
        return ""
    method, bits = config.get("quant_method"), config.get("bits")
    if bits is None:
        bits = next((n for n in (4, 8) if config.get(f"load_in_{n}bit") is True), None)
    said = [method] if isinstance(method, str) else []
    said += [f"{bits} bits"] if type(bits) is int else []
    return f" ({', '.join(said)})" if said else ""


def _original(directory: Path) -> str:
    """Where the unquantised original is: what the card names, or the plain name."""
    base = front_matter(directory).get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    if isinstance(base, str):
        return f": {base}, as its card says"
    name = (hub_id(directory) or directory.name).rsplit("/")[-1]
    plain = QUANTISED_NAME.sub("", name)
    return f": probably {plain}" if plain != name else ", which its card may name"
