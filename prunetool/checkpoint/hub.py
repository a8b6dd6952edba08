"""The Hub's client, with its failures in plain words: no class names, no secrets in addresses."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prunetool import signals
from prunetool.checkpoint.writer import FULL
from prunetool.errors import HubError, PrunetoolError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SECRET = re.compile(r"\bhf_\w+|(?<=://)[^/\s@]+@|(?<=[?&])[\w-]+=[^&\s]+")
LOGIN = "set HF_TOKEN, or run: hf auth login"
AGAIN = "run again; what is there already is kept"


def hub_id(directory: Path) -> str | None:
    """The id of the Hub repository that a directory is a download of, if it is one.

    In the Hub's cache it is ``…/models--OWNER--NAME/snapshots/COMMIT``.
    """
    return cached_id(directory.parent.parent) if directory.parent.name == "snapshots" else None


def cached_id(directory: Path) -> str | None:
    """The id of the Hub repository whose cache a directory is (``…/models--OWNER--NAME``)."""
    name = directory.name.removeprefix("models--").replace("--", "/")
    return name if directory.name.startswith("models--") and HUB_ID.fullmatch(name) else None


def endpoint() -> str:
    """Address of the Hub, without any login in HF_ENDPOINT."""
    from huggingface_hub import constants

    return without_secrets(constants.ENDPOINT)


def without_secrets(text: str) -> str:
    """Remove tokens, logins and query parameters of addresses (may be signatures) from a text."""
    from huggingface_hub import get_token

    token = get_token()
    return SECRET.sub("…", text.replace(token, "…") if token else text)


@contextmanager
def asking(
    repository: str, failed: str, absent: str, revision: str | None = None
) -> Iterator[None]:
    """Raise HubError for any failure of the client, and keep the client itself quiet.

    A signal ends the process at once: the client would wait for all pending transfers.

    Args:
      repository: id of the repository.
      failed: how to begin the message, such as ``is not uploaded``.
      absent: what to say if it is not on the Hub.
      revision: the requested revision.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    # Its warnings quote possibly signed addresses.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not (sys.stderr.isatty() and logging.getLogger("prunetool").isEnabledFor(logging.INFO)):
        disable_progress_bars()  # some bars ignore whether stderr is a terminal
    try:
        with signals.at_once(signals.GO_ON):
            yield
    except PrunetoolError:
        raise
    except Exception as error:  # the client raises almost anything
        what, todo = _words(error, failed, absent, revision)
        raise HubError(without_secrets(repository), what, todo) from error


def _words(error: BaseException, failed: str, absent: str, revision: str | None) -> tuple[str, str]:
    """What is wrong and what to do, from the first cause that can tell."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    status_or_transport = HfHubHTTPError.__bases__[0]  # from httpx; since version 2 from httpx2
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            return _refusal(cause, failed, absent, revision)
        if isinstance(cause, OfflineModeIsEnabled):
            what = f"{failed} (HF_HUB_OFFLINE is set, and the cache does not hold all of it)"
            return what, "unset HF_HUB_OFFLINE and run again"
        if isinstance(cause, status_or_transport | ConnectionError):
            return f"{failed} (no answer from {endpoint()})", f"check the connection and {AGAIN}"
        if isinstance(cause, HFValidationError):
            return "is not an id of the Hub", "give an id such as owner/name"
        if isinstance(cause, OSError) and cause.errno in FULL:
            return f"{failed} (the disk is full)", f"make room and {AGAIN}"
        if isinstance(cause, OSError) and cause.filename:
            reason = f"{cause.filename}: {cause.strerror}"
            return f"{failed} ({reason})", f"fix it and {AGAIN}"
        error, cause = cause, cause.__cause__ or cause.__context__
    said = without_secrets(str(error)).strip().splitlines() or [type(error).__name__]
    if of_a_file := re.search(r"error for file with OID \w+: `?(.+?)`?$", said[-1]):
        return f"{failed} (a file was refused: {of_a_file[1]})", "see the Hub's limits"
    return f"{failed} ({said[-1]})", f"check the connection and {AGAIN}"


def _refusal(
    error: "HfHubHTTPError", failed: str, absent: str, revision: str | None
) -> tuple[str, str]:
    """What is wrong and what to do if the Hub refused."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status, token = error.response.status_code, get_token()
    if status == 401 and token:
        return "the token was refused: it is wrong or has expired", LOGIN
    if isinstance(error, GatedRepoError):
        return "is gated", "accept its terms on the Hub and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return absent, "check it, and the token's permissions" if token else f"check it, or {LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return f"no revision {revision!r}", "see its branches and tags"
    if status == 403:
        return (
            f"{failed} (the token lacks permission)",
            "use one that has it: Settings, Access Tokens",
        )
    if status == 413:
        return f"{failed} (a file is too large for the Hub)", "see its limits"
    if status == 429:
        return f"{failed} (too many requests)", f"wait a few minutes and {AGAIN}"
    if status >= 500:
        return f"{failed} (a fault of the Hub, status {status})", f"wait a little and {AGAIN}"
    said = " ".join(without_secrets(error.server_message or "no reason given").split())
    return f"{failed} (status {status}: {said})", "fix it and run again"
