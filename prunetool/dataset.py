"""Data sets of the Hub by name: which files hold a split, and how their rows become one text.

Files are downloaded one at a time, as far as their text is used, and stay in the Hub's cache.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from prunetool.checkpoint.hub import HUB_ID, asking
from prunetool.errors import CorpusError, HubError, shown


class Known(NamedTuple):
    """A data set with a short name.

    Attributes:
      repository: its id on the Hub.
      config: the directory of its files.
      field: the column of its text.
      between: what joins its rows.
      revision: branch, tag or commit.
      files: how many files of a split are used, None for all.
    """

    repository: str
    config: str
    field: str = "text"
    between: str = "\n\n"
    revision: str = "main"
    files: int | None = None


# Joined as in the code of SparseGPT and Wanda, which draw from one file of C4.
KNOWN = {
    "wikitext2": Known("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": Known("allenai/c4", "en", files=1),
    "ptb": Known(
        "ptb-text-only/ptb_text_only", "penn_treebank", "sentence", " ", "refs/convert/parquet"
    ),
    "alpaca": Known("tatsu-lab/alpaca", "data"),
}
SUFFIX = re.compile(r"\.(parquet|(jsonl?|ndjson)(\.(gz|zst|bz2|xz))?)$")
NOT_GIVEN = "is not here, and the Hub did not provide it"
NOT_THERE = "no such data set on the Hub"


@dataclass(frozen=True)
class Dataset:
    """A split of a data set.

    Attributes:
      name: as typed: NAME or OWNER/NAME, then perhaps :CONFIG and @REVISION.
      split: ``train``, ``validation``, ``test`` or another that its files are named after.
      column: the column of the text, if not the data set's own.
    """

    name: str
    split: str
    column: str | None = None
    _parts: re.Match[str] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = re.fullmatch(r"([^:@]+)(?::([^:@]+))?(?:@([^:@]+))?", self.name)
        if not found or not (found[1] in KNOWN or HUB_ID.fullmatch(found[1])):
            raise CorpusError(
                f"--dataset {shown(self.name)}",
                f"is neither {', '.join(KNOWN)} nor the id of a data set",
                "give OWNER/NAME, and perhaps :CONFIG and @REVISION",
            )
        object.__setattr__(self, "_parts", found)

    @cached_property
    def known(self) -> Known:
        """Where it is and how it is read."""
        assert self._parts
        name, config, revision = self._parts.groups()
        known = KNOWN.get(name, Known(name, ""))
        return known._replace(
            config=config or known.config,
            revision=revision or known.revision,
            field=self.column or known.field,
        )

    @property
    def where(self) -> str:
        """Its name in messages."""
        return f"--dataset {self.name}, split {self.split}"

    @cached_property
    def files(self) -> tuple[str, list[str]]:
        """The commit, and the names of the split's files in order.

        Raises:
          HubError: if the Hub does not answer, or has no such data set.
          CorpusError: if no file is of this split.
        """
        from huggingface_hub import HfApi

        known = self.known
        try:
            with asking(known.repository, NOT_GIVEN, NOT_THERE, known.revision):
                info = HfApi().dataset_info(known.repository, revision=known.revision)
        except HubError:
            if names := self._cached():
                return known.revision, self._of_split(names)
            raise
        return info.sha or known.revision, self._of_split(
            [f.rfilename for f in info.siblings or ()]
        )

    def _cached(self) -> list[str]:
        """The files of a commit that were downloaded before; none of a branch, which may move."""
        from huggingface_hub import snapshot_download

        known = self.known
        if not re.fullmatch("[0-9a-f]{40}", known.revision):
            return []
        with suppress(Exception):  # it is not there
            place = snapshot_download(
                known.repository,
                repo_type="dataset",
                revision=known.revision,
                local_files_only=True,
            )
            return [str(file.relative_to(place)) for file in Path(place).rglob("*")]
        return []

    def _of_split(self, names: Sequence[str]) -> list[str]:
        """The files of this split among all.

        Raises:
          CorpusError: if there are none.
        """
        known = self.known
        # Names come from outside: none may lead out of the cache.
        files = sorted(n for n in names if SUFFIX.search(n) and ".." not in n.split("/"))
        of_config = [name for name in files if name.startswith(f"{known.config}/")]
        of_split = re.compile(rf"(^|[/_.-]){re.escape(self.split)}([/.-]|_\d)")
        found = [n for n in (of_config if known.config else files) if of_split.search(n)]
        places = {Path(name).parent for name in found}
        if not found or (len(places) > 1 and not known.config):
            configs = sorted({name.rpartition("/")[0] for name in files})
            raise CorpusError(
                self.where,
                "has no Parquet or JSON-lines file of this split"
                if not found
                else "has files in several directories",
                f"name a --split and :CONFIG of these: {shown(', '.join(configs), 80) or 'none'}",
            )
        return found[: known.files]

    @property
    def pinned(self) -> str:
        """The name with its commit, which gives the same files again."""
        return f"{self.name.partition('@')[0]}@{self.files[0]}"

    def paths(self) -> Iterator[Path]:
        """Its files, each downloaded when it is asked for.

        Raises:
          HubError: if the Hub does not provide one.
        """
        from huggingface_hub import hf_hub_download

        commit, files = self.files
        for name in files:
            with asking(self.known.repository, NOT_GIVEN, NOT_THERE, commit):
                path = hf_hub_download(
                    self.known.repository, name, repo_type="dataset", revision=commit
                )
            yield Path(path)
