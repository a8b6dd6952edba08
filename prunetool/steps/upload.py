"""Upload a checkpoint that export wrote to the Hub."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prunetool import console
from prunetool.card import published
from prunetool.checkpoint.hub import LOGIN, asking, endpoint
from prunetool.checkpoint.index import SINGLE_NAME
from prunetool.checkpoint.source import ADAPTER_NAME, front_matter
from prunetool.checkpoint.writer import DATA_FILES, LICENSE_FILES, WRITTEN, whole_files
from prunetool.errors import HubError, RecordError, WorkError
from prunetool.model import Model, open_model
from prunetool.steps.report import read_evaluation

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, HfApi

CARD = "README.md"
# "Llama 3.2 Community License Agreement", llama3.2, and the like.
LLAMA_LICENCE = re.compile(r"llama[ -]?([34](?:\.\d)?)\b", re.IGNORECASE)
ABSENT = "is not on the Hub"
FAILED = "is not uploaded"


class Done(NamedTuple):
    """Where an upload can be seen, and whether it changed anything."""

    url: str
    changed: bool


def contents(out: Path, repository: str, metrics: Sequence[Path]) -> dict[str, Path | bytes]:
    """What goes to the Hub: the checkpoint's files by name, README.md in its published form.

    All files in the checkpoint's manifest, and any card, licence or notice added beside them.

    Args:
      out: the checkpoint.
      repository: its id on the Hub, for README.md.
      metrics: results of evaluate for this checkpoint.

    Raises:
      WorkError: if it is not a complete checkpoint of this tool, or its README.md cannot be read.
      RecordError: if a file of ``metrics`` is something else, or for another model.
    """
    names = whole_files(out)
    beside = [out / name for name in (CARD, *LICENSE_FILES) if name not in names]
    names += [path.name for path in beside if path.is_file() and not path.is_symlink()]
    files: dict[str, Path | bytes] = {name: out / name for name in sorted(names)}
    model = open_model(str(out))
    results = [result for path in metrics for result in read_metrics(path, model)]
    if CARD in files:
        try:
            card = (out / CARD).read_text(encoding="utf-8")
            files[CARD] = published(card, repository, results).encode()
        except ValueError as error:
            raise WorkError(
                out / CARD, f"has front matter that cannot be read ({error})", "fix it"
            ) from error
    elif results:
        raise WorkError(
            out / CARD, "no such file to put --metrics in", "write one, or omit --metrics"
        )
    return files


def size_bytes(content: Path | bytes) -> int:
    """Size of a file of `contents`."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def read_metrics(path: Path, model: Model) -> "list[EvalResult]":
    """Read a result of ``prunetool evaluate`` in the form of the Hub's model cards.

    The text is named after the file.

    Raises:
      RecordError: if it is something else, or for another model.
    """
    from huggingface_hub import EvalResult

    read_evaluation(path)
    value = json.loads(path.read_text("utf-8"))
    if value.get("parameters") != model.parameters():
        raise RecordError(
            path,
            f"is for a model of {value.get('parameters')} parameters, but OUT has "
            f"{model.parameters()}",
            "evaluate OUT and give that result",
        )
    measured = {"perplexity": ("Perplexity", value["perplexity"])}
    if value["perplexity"] is None:
        measured = {"loss": ("Loss, nats per token", value["loss"])}
    if "against" in value:
        measured["kl_divergence"] = ("KL divergence from the base, nats", value["against"]["kl"])
    if "accuracy" in value:
        measured["accuracy"] = ("Accuracy of choices", value["accuracy"])
    how = {
        key: value.get(key)
        for key in ("samples", "sequence_length", "bos", "dtype", "token_ids", "version")
    }
    return [
        EvalResult(
            task_type="text-generation", task_name="Text generation",
            dataset_type=re.sub(r"[^\w.-]+", "-", path.stem), dataset_name=path.stem,
            dataset_args=how, metric_type=kind, metric_name=name, metric_value=found,
        )
        for kind, (name, found) in measured.items()
    ]  # fmt: skip


def say_licence(out: Path, repository: str, names: Sequence[str]) -> None:
    """Say what a Llama licence requires for redistribution; nothing for other licences."""
    front = front_matter(out)
    said = [str(front.get(key)) for key in ("license_name", "license")]
    texts = [name for name in names if name in LICENSE_FILES]
    for name in texts:
        said.append((out / name).read_text(encoding="utf-8", errors="replace")[:300])
    if not (found := next(filter(None, map(LLAMA_LICENCE.search, said)), None)):
        return
    page = out / CARD
    card = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    duties = {
        "a copy of the licence": any(name.startswith("LICENSE") for name in texts),
        "a Notice file": any(name.lower().startswith("notice") for name in texts),
        "“Built with Llama” on the page": "Built with Llama" in card,
        "a name that begins with “Llama”": repository.split("/")[-1].startswith("Llama"),
    }
    asked = ", ".join(f"{duty} ({'there' if met else 'NOT there'})" for duty, met in duties.items())
    console.log.warning("The Llama %s licence requires: %s", found[1], asked)


def upload(
    files: Mapping[str, Path | bytes],
    repository: str,
    *,
    private: bool,
    revision: str | None,
    create_pr: bool,
    overwrite: bool,
) -> Done:
    """Put files into a Hub repository, created if missing, in one commit.

    Files that an earlier upload brought to the Hub are not sent again.

    Args:
      files: `contents`.
      repository: id of the repository.
      private: create it so that nobody else can see it.
      revision: branch, created if missing; for a pull request, its target branch.
      create_pr: open a pull request instead.
      overwrite: replace an existing other checkpoint; its files are deleted.

    Raises:
      HubError: if the Hub does not accept it, or has another checkpoint there, or a public
        repository although ``private`` is requested.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise HubError(repository, "needs a token with write access, but there is none", LOGIN)
    api = HfApi()
    with asking(repository, "is not there and cannot be made", ABSENT):
        api.create_repo(repository, private=private or None, exist_ok=True)
    with asking(repository, FAILED, ABSENT, revision):
        if private and not api.repo_info(repository).private:
            raise HubError(
                repository,
                "exists and is public",
                "make it private in its settings, or name another",
            )
        if revision and not create_pr:
            api.create_branch(repository, branch=revision, exist_ok=True)
        before = api.repo_info(repository, revision=revision).sha
        other = _other_checkpoint(api, repository, revision, files)
        if other and not (overwrite or create_pr):
            todo = "name another repository or --revision, or give --overwrite"
            raise HubError(repository, f"holds another checkpoint ({other[0]})", todo)
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in other if name not in files),
            ],
            commit_message="Upload a checkpoint pruned by prunetool",
            revision=revision,
            create_pr=create_pr,
        )
    url = f"{endpoint()}/{repository}{f'/tree/{revision}' if revision else ''}"
    return Done(commit.pr_url or url, commit.oid != before)


def _other_checkpoint(
    api: "HfApi", repository: str, revision: str | None, files: Mapping[str, Path | bytes]
) -> list[str]:
    """Files of a repository that a program would load but that belong to other weights.

    Weights of the same name with other content, and names that these lack: they would get mixed.
    """
    from huggingface_hub.hf_api import RepoFile

    found = []
    for entry in api.list_repo_tree(repository, revision=revision):
        if not isinstance(entry, RepoFile):
            continue
        weights = entry.path.endswith(".safetensors")
        known = entry.path in (*DATA_FILES, SINGLE_NAME, ADAPTER_NAME)
        content = files.get(entry.path)
        if content is None:
            if weights or known or WRITTEN.fullmatch(entry.path):
                found.append(entry.path)
        elif weights and isinstance(content, Path):
            sha = entry.lfs.sha256 if entry.lfs else None
            if entry.size != size_bytes(content) or sha != _sha256(content):
                found.append(entry.path)
    return sorted(found)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
