"""A local directory or a Hub id, made a local directory."""

import re
from pathlib import Path

from prunetool.checkpoint.writer import LICENSE_FILES, TEMPLATES, TOKENIZER_FILES
from prunetool.errors import CheckpointError, HubError

NEEDED_FILES = [
    "*.safetensors", "*.json", *TOKENIZER_FILES, f"{TEMPLATES}/*.jinja", *LICENSE_FILES,
]  # fmt: skip
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(model: str, revision: str | None = None) -> Path:
    """Return the directory of ``model``, downloading what is needed of a Hub repository.

    Args:
      model: a directory, or a Hub id such as ``HuggingFaceTB/SmolLM2-135M-Instruct``.
      revision: branch, tag or commit of the Hub repository.

    Raises:
      CheckpointError: if it is neither a directory nor of the form of a Hub id.
      HubError: if the Hub does not give the files. The token comes from the environment or the
        Hub's own login and is never printed.
    """
    directory = Path(model)
    if directory.is_dir():
        return directory.resolve()
    if directory.exists() or not HUB_ID.fullmatch(model):
        raise CheckpointError(
            model,
            "is neither a directory nor a Hub id",
            "give a directory or an id such as owner/name",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=NEEDED_FILES))
    except GatedRepoError as error:
        raise HubError(model, "is gated", "accept its terms on the Hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            model, "no such directory or Hub repository", "check the name, or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(model, f"no revision {revision!r}", "see its branches and tags") from error
    except (HfHubHTTPError, OSError) as error:
        raise HubError(
            model,
            f"no such directory, and the Hub did not give it ({type(error).__name__})",
            "check the path or the connection and run again; downloaded files are kept",
        ) from error
